"""What Arrow raises on files and values of others, as errors of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from uni_x.errors import DataError, one_line


@contextmanager
def whole_parquet(path: Path | None = None) -> Iterator[None]:
    """Raises `DataError`, which names the file where `path` is given, for what Arrow cannot read of a Parquet file."""
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        where = "" if path is None else f"{path}: "
        raise DataError(f"{where}not a whole Parquet file ({one_line(error)})") from None


def to_python(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values; in place of one that Python has none for (invalid UTF-8, a date of year 0) a `DataError`."""
    try:
        return column.to_pylist()
    except Exception:  # each type of Arrow has errors of its own, and a time zone's are those of a library
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return DataError("not valid UTF-8")
    except Exception as error:  # as above
        return DataError(f"a value of the type {scalar.type} that cannot be read ({one_line(error)})")
