"""What every table has in common: rows in their order, and a copy with changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from uni_x.data.delimited import MAX_RECORD_BYTES
from uni_x.data.translation.values import texts_of
from uni_x.errors import DataError

MAX_ROW_BYTES = MAX_RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Row:
    """One row, counted from 1, with those of the asked columns that it has.

    A broken row has no values and a `fault`, which says why it cannot be read.
    """

    number: int
    values: Mapping[str, Any]
    fault: str = ""


Changes: TypeAlias = Callable[[Row], Mapping[str, Any]]
"""Gives the new values of a row by column; empty where the row stays as it is."""


class Table(Protocol):
    """A file of rows. Both methods raise `DataError`, which names the file, where it is broken as a whole."""

    def rows(self) -> Iterator[Row]:
        """The rows in their order, broken ones too; each call starts again at the first."""
        ...

    def copy(self, out: Path, changes: Changes) -> None:
        """Writes the table with changes to `out`, in one step once it is whole; broken rows are copied as they stand.

        `changes` is asked for every row.
        """
        ...


def make_row(number: int, values: Mapping[str, Any]) -> Row:
    """The row of these values; a broken one where a value holds what is no text."""
    for column, value in values.items():
        try:
            texts = texts_of(value)
        except DataError as error:
            return Row(number, {}, f"column {column!r}: {error}")
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            return Row(number, {}, f"column {column!r}: not valid Unicode (a lone surrogate)")
    return Row(number, values)


def too_large(path: Path, place: str) -> DataError:
    """Of a row that would not fit into memory."""
    return DataError(
        f"{path}, {place}: larger than {MAX_ROW_BYTES // 2**20} MB; take it out, or store its pictures smaller"
    )


def check_columns(path: Path, columns: tuple[str, ...], header: Sequence[str]) -> None:
    """Raises `DataError` where the header does not name each column once."""
    for name in columns:
        if header.count(name) != 1:
            found = "no column" if name not in header else "more than one column"
            raise DataError(f"{path}: {found} {name!r}; its columns are {', '.join(header) or 'none'}")
