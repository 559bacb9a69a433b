"""Parquet files of which some columns can be rewritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uni_x.data.arrow import to_python
from uni_x.data.shards import check_name
from uni_x.data.translation import rows
from uni_x.data.translation.rows import Changes, Row, check_columns, make_row, too_large
from uni_x.errors import DataError, one_line
from uni_x.runs import writing_whole

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file; its schema, metadata, row groups and compression are those of the copy."""

    path: Path
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        check_name(self.path)
        with self._open() as file:
            check_columns(self.path, self.columns, file.schema_arrow.names)

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        with self._open() as file:
            number = 0
            for group in range(file.num_row_groups):
                self._check_sizes(file, group, number)
                for batch in file.iter_batches(64, row_groups=[group], columns=list(self.columns)):
                    yield from self._rows_of(batch, number)
                    number += batch.num_rows

    def copy(self, out: Path, changes: Changes) -> None:
        """See `Table`."""
        import pyarrow.parquet as pq

        with self._open() as file, writing_whole(out) as stream:
            writer = pq.ParquetWriter(stream, file.schema_arrow, compression=_compression(file))
            with writer:
                number = 0
                for group in range(file.num_row_groups):
                    table = self._change(file.read_row_group(group), number, changes)
                    number += table.num_rows
                    writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def _rows_of(self, table: pa.Table | pa.RecordBatch, before: int) -> Iterator[Row]:
        """Rows of which the first is number `before + 1`."""
        columns = [to_python(table.column(name)) for name in self.columns]
        for number, values in enumerate(zip(*columns, strict=True), start=before + 1):
            fault = next((value for value in values if isinstance(value, DataError)), None)
            if fault:
                yield Row(number, {}, f"column {self.columns[values.index(fault)]!r}: {fault}")
            else:
                yield make_row(number, dict(zip(self.columns, values, strict=True)))

    def _change(self, table: pa.Table, before: int, changes: Changes) -> pa.Table:
        """A row group, the first row of which is number `before + 1`, with its changes."""
        changed: dict[str, dict[int, Any]] = {}
        for index, row in enumerate(self._rows_of(table, before)):
            for name, value in changes(row).items():
                changed.setdefault(name, {})[index] = value
        for name, values in changed.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), _replace(table.column(place), values))
        return table

    def _check_sizes(self, file: pq.ParquetFile, group: int, before: int) -> None:
        if file.metadata.row_group(group).total_byte_size <= rows.MAX_ROW_BYTES:
            return
        for batch in file.iter_batches(16, row_groups=[group]):
            if batch.nbytes > rows.MAX_ROW_BYTES:
                for index in range(batch.num_rows):
                    if batch.slice(index, 1).nbytes > rows.MAX_ROW_BYTES:
                        raise too_large(self.path, f"row {before + index + 1}")
            before += batch.num_rows

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = one_line(error)
            raise DataError(f"{self.path}: the Parquet file cannot be read or copied ({reason})") from None


def _replace(column: pa.ChunkedArray, values: Mapping[int, Any]) -> pa.ChunkedArray:
    """The column with new values by index; others stay as they are stored, whether or not they can be read."""
    import pyarrow as pa

    new = pa.array(list(values.values()), type=column.type)
    order = np.arange(len(column))
    order[list(values)] = len(column) + np.arange(len(values))
    return pa.chunked_array([*column.chunks, new]).take(pa.array(order))


def _compression(file: pq.ParquetFile) -> str:
    if not file.num_row_groups or not file.metadata.num_columns:
        return "snappy"
    name = file.metadata.row_group(0).column(0).compression.lower()
    return "none" if name == "uncompressed" else name
