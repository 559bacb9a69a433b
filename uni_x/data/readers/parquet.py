"""Parquet files, of which a row group is read when the first of its rows is wanted."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from uni_x.data.readers.fields import load_fields
from uni_x.data.readers.parts import file_inside, reject_rest
from uni_x.data.schema import Load
from uni_x.errors import DataError


def parquet_rows(path: Path, part: str, source: str) -> Iterator[Load]:
    """Rows of a Parquet file, numbered from 0; pictures without bytes are files inside its folder."""
    return reject_rest(part, _parquet_rows(path, part, source))


def _parquet_rows(path: Path, part: str, source: str) -> Iterator[Load]:
    resolve = partial(file_inside, path.parent)
    groups = _RowGroups(path)
    number = 0
    for group, rows in enumerate(groups.sizes):
        for row in range(rows):
            yield partial(load_fields, partial(groups.fields, group, row), f"{part}:{number}", source, resolve)
            number += 1


class _RowGroups:
    """A Parquet file with two row groups in memory: threads that are a row apart may stand in different ones."""

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
            metadata = self._file.metadata
            self.sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"not a whole Parquet file ({' '.join(str(error).split())})") from None
        self._lock = threading.Lock()
        self._loaded: dict[int, Any] = {}  # for a group's number its table, or why it cannot be read

    def fields(self, group: int, row: int) -> dict[str, Any]:
        """Raises `DataError` where the row group or the row's text is damaged."""
        table = self._table(group)
        if isinstance(table, str):
            raise DataError(f"row group {group} cannot be read ({table})")
        try:
            return table.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            raise DataError("not valid UTF-8") from None

    def _table(self, group: int) -> Any:
        import pyarrow as pa

        with self._lock:
            if group not in self._loaded:
                if len(self._loaded) > 1:
                    del self._loaded[next(iter(self._loaded))]
                try:
                    self._loaded[group] = self._file.read_row_group(group)
                except (pa.ArrowException, OSError, ValueError) as error:
                    self._loaded[group] = " ".join(str(error).split())
            return self._loaded[group]
