"""Parquet files, of which a few rows are in memory, however large their row groups are."""

import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from uni_x.data.arrow import to_python, whole_parquet
from uni_x.data.readers.fields import KNOWN_FIELDS, load_fields
from uni_x.data.readers.parts import Resolve, reject_rest
from uni_x.data.schema import Load
from uni_x.errors import DataError, one_line

_BATCH_BYTES = 4 * 2**20
_BATCH_ROWS = (4, 1024)  # at the least and at the most
_KEPT_BATCHES = 4  # threads read neighbouring rows, and need not do so in order
_STREAM_BYTES = 2**20  # of a column, read from the file at once


def parquet_rows(path: Path, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    """Rows of a Parquet file, numbered from 1; pictures without bytes are files that they name."""
    return reject_rest(part, _parquet_rows(path, part, source, resolve))


def _parquet_rows(path: Path, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    file = _ParquetFile(path)
    places = ((group, row) for group, rows in enumerate(file.group_sizes) for row in range(rows))
    for number, place in enumerate(places, start=1):
        yield partial(load_fields, partial(file.fields, *place), f"{part}:{number}", source, resolve)


def known_fields(row: pa.RecordBatch | pa.Table) -> dict[str, Any]:
    """The columns of a table of one row that a reader looks at; the others are None, whatever stands in them.

    Raises `DataError`, which names the column, for a value that cannot be read.
    """
    fields = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        (value,) = to_python(column) if name in KNOWN_FIELDS else (None,)
        if isinstance(value, DataError):
            raise DataError(f"{name}: {value}")
        fields[name] = value
    return fields


class _ParquetFile:
    """Rows of a Parquet file, wanted more or less in their order; those before are decoded on the way.

    Attributes:
        group_sizes: rows of each row group.
    """

    def __init__(self, path: Path):
        with whole_parquet():
            self._file = pq.ParquetFile(path, buffer_size=_STREAM_BYTES, pre_buffer=False)
            metadata = self._file.metadata
            self.group_sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            names = self._file.schema_arrow.names
        self._columns = [name for name in names if name in KNOWN_FIELDS]
        self._unread = dict.fromkeys(name for name in names if name not in KNOWN_FIELDS)
        self._lock = threading.Lock()
        self._group, self._next_row = -1, 0
        self._batches: Iterator[Any] = iter(())  # of the group, from the next row on
        self._kept: deque[tuple[int, int, Any]] = deque(maxlen=_KEPT_BATCHES)  # with group and first row
        self._damaged: dict[int, tuple[int, str]] = {}  # for a group the row from which on it cannot be read, and why

    def fields(self, group: int, row: int) -> dict[str, Any]:
        """The known columns of a row; the others are None.

        Raises `DataError` where the row group is damaged, or a value of the row cannot be read.
        """
        with self._lock:
            first, batch = self._kept_batch(group, row) or self._read(group, row)
        return {**self._unread, **known_fields(batch.slice(row - first, 1))}

    def _kept_batch(self, group: int, row: int) -> tuple[int, Any] | None:
        return next(
            (
                (first, batch)
                for kept_group, first, batch in self._kept
                if kept_group == group and first <= row < first + len(batch)
            ),
            None,
        )

    def _read(self, group: int, row: int) -> tuple[int, Any]:
        """Goes on to the batch that holds a row, and gives it with its first row."""
        damaged_from, reason = self._damaged.get(group, (self.group_sizes[group], ""))
        if row >= damaged_from:
            raise DataError(reason)
        if group != self._group or row < self._next_row:
            self._start(group)
        try:
            while row >= self._next_row:
                batch, first = next(self._batches, None), self._next_row
                if batch is None:
                    raise ValueError("it has fewer rows than it says")
                self._next_row += len(batch)
                self._kept.append((group, first, batch))
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = f"row group {group} cannot be read from its row {self._next_row + 1} on ({one_line(error)})"
            self._damaged[group] = (self._next_row, reason)
            self._group = -1
            raise DataError(reason) from None
        return first, batch

    def _start(self, group: int) -> None:
        metadata = self._file.metadata.row_group(group)
        chunks = map(metadata.column, range(metadata.num_columns))
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in KNOWN_FIELDS
        )
        least, most = _BATCH_ROWS
        rows = min(max(_BATCH_BYTES // (size // max(metadata.num_rows, 1) + 1), least), most)
        self._batches = self._file.iter_batches(rows, row_groups=[group], columns=self._columns, use_threads=False)
        self._group, self._next_row = group, 0
