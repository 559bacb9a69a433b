"""Tables of which some columns can be rewritten: JSONL, Parquet, tab-separated files and lists of prompts.

A table gives its rows in order, with the columns that were asked for, and writes a copy of itself in which nothing but
rewritten values differs. Lines without any are copied as they stand, and so are the other fields of JSON rows.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uni_x.data.delimited import Record, read_records
from uni_x.data.translation import rows
from uni_x.data.translation.parquet_table import ParquetTable
from uni_x.data.translation.rows import Changes, Row, Table, check_columns, make_row, too_large
from uni_x.data.translation.values import kind_of
from uni_x.data.utf8 import decode_utf8
from uni_x.errors import DataError, UsageError
from uni_x.runs import writing_whole

PROMPT = "prompt"  # the one column of a list of prompts

_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def open_table(path: Path, columns: tuple[str, ...]) -> Table:
    """The table in a `.jsonl`, `.parquet`, `.tsv` or `.txt` file; a `.txt` has one column that needs no name.

    Raises `UsageError` for another suffix and for columns that do not go with it, `DataError` where the file is not
    there or its header lacks a column.
    """
    kind = path.suffix.lower()
    if kind not in _KINDS:
        raise UsageError(f"{path}: the name must end in one of {', '.join(_KINDS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if kind == ".txt":
        if columns:
            raise UsageError(f"{path}: a list of prompts has no columns; leave --column out")
        return PromptList(path)
    if not columns:
        raise UsageError(f"{path}: which columns? name at least one with --column")
    return _KINDS[kind](path, columns)


def json_columns(path: Path) -> list[str]:
    """The names in the objects of a `.jsonl` file, in the order in which they come."""
    names: dict[str, None] = {}
    for line in _read_lines(path):
        with suppress(DataError):
            names |= dict.fromkeys(_parse_object(line))
    return list(names)


class _RowALine:
    """What tables of one row a line have in common."""

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        return (row for row, _ in self._rows())

    def copy(self, out: Path, changes: Changes) -> None:
        """See `Table`."""
        with writing_whole(out) as stream:
            for row, line in self._rows():
                values = changes(row)
                stream.write(self._rewritten(line, values) if values else line)

    def _rows(self) -> Iterator[tuple[Row, bytes]]:
        """Each row with its line."""
        raise NotImplementedError

    def _rewritten(self, line: bytes, values: Mapping[str, Any]) -> bytes:
        """The line with these values in it."""
        raise NotImplementedError


@dataclass(frozen=True)
class JsonLines(_RowALine):
    """One JSON object a line; rows are counted as lines are, and an empty line is a row without columns."""

    path: Path
    columns: tuple[str, ...]

    def _rows(self) -> Iterator[tuple[Row, bytes]]:
        for number, line in enumerate(_read_lines(self.path), start=1):
            try:
                found = _parse_object(line)
            except DataError as error:
                yield Row(number, {}, str(error)), line
            else:
                yield make_row(number, {name: found[name] for name in self.columns if name in found}), line

    def _rewritten(self, line: bytes, values: Mapping[str, Any]) -> bytes:
        return _splice(line.decode("utf-8"), values).encode("utf-8")


@dataclass(frozen=True)
class TabSeparated:
    """Fields between tabs under a header; where a field is in quotes, they are doubled inside it.

    An empty line is a row without columns. Where a record cannot be read, its first line is the broken row.
    """

    path: Path
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        header = next(self._records(), Record(1, b""))
        if header.fault:
            raise DataError(f"{self.path}: the header cannot be read: {header.fault}")
        check_columns(self.path, self.columns, header.fields)

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        records = self._records()
        header = next(records)
        return (self._row(number, header, record) for number, record in enumerate(records, start=1))

    def copy(self, out: Path, changes: Changes) -> None:
        """See `Table`."""
        with writing_whole(out) as stream:
            records = self._records()
            header = next(records)
            stream.write(header.raw)
            for number, record in enumerate(records, start=1):
                values = changes(self._row(number, header, record))
                stream.write(_join(header, record, values) if values else record.raw)

    def _row(self, number: int, header: Record, record: Record) -> Row:
        if record.fault or not record.fields:
            return Row(number, {}, record.fault)
        found = dict(zip(header.fields, record.fields, strict=True))
        return make_row(number, {name: found[name] for name in self.columns})

    def _records(self) -> Iterator[Record]:
        """The header first."""
        return read_records(_read_lines(self.path), "\t")


@dataclass(frozen=True)
class PromptList(_RowALine):
    """One prompt a line, in a column called `prompt`; an empty line is a row too."""

    path: Path

    def _rows(self) -> Iterator[tuple[Row, bytes]]:
        for number, line in enumerate(_read_lines(self.path), start=1):
            try:
                prompt = decode_utf8(line.removesuffix(_end(line)))
            except DataError as error:
                yield Row(number, {}, str(error)), line
            else:
                yield Row(number, {PROMPT: prompt}), line

    def _rewritten(self, line: bytes, values: Mapping[str, Any]) -> bytes:
        prompt: str = values[PROMPT]
        return prompt.encode("utf-8") + _end(line)


def _join(header: Record, record: Record, values: Mapping[str, str]) -> bytes:
    """The record's line or lines with new values of some fields."""
    fields = [values.get(name, field) for name, field in zip(header.fields, record.fields, strict=True)]
    return "\t".join(map(_quote, fields)).encode("utf-8") + _end(record.raw)


_KINDS: dict[str, Callable[..., Table]] = {
    ".jsonl": JsonLines,
    ".parquet": ParquetTable,
    ".tsv": TabSeparated,
    ".txt": PromptList,
}


def _read_lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, which are `\\n` alone or after `\\r`; a byte order mark is dropped."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(rows.MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > rows.MAX_ROW_BYTES:
                raise too_large(path, f"line {number}")
            yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _end(line: bytes) -> bytes:
    return line[len(line.rstrip(b"\r\n")) :]


def _parse_object(line: bytes) -> dict[str, Any]:
    text = decode_utf8(line)
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1} of its line)"
        ) from None
    except (ValueError, RecursionError):
        raise DataError("not valid JSON (it is nested too deeply, or holds a number too long)") from None
    if not isinstance(found, dict):
        raise DataError(f"a JSON object is needed, not {kind_of(found)}")
    return found


def _quote(field: str) -> str:
    if any(character in field for character in '\t\r\n"'):
        return '"' + field.replace('"', '""') + '"'
    return field


def _splice(line: str, values: Mapping[str, Any]) -> str:
    """A JSON object's line with new values of some keys; every other character stays."""
    places = _places(line)
    for name in sorted(values, key=lambda name: places[name], reverse=True):
        start, end = places[name]
        line = line[:start] + _dump(values[name]) + line[end:]
    return line


def _places(line: str) -> dict[str, tuple[int, int]]:
    """Where the value of each key stands in the line of a JSON object that is known to be valid."""
    decoder = json.JSONDecoder()
    places = {}
    at = _skip_space(line, line.index("{") + 1)
    while line[at] != "}":
        name, at = decoder.raw_decode(line, at)
        start = _skip_space(line, line.index(":", at) + 1)
        _, end = decoder.raw_decode(line, start)
        places[name] = (start, end)
        at = _skip_space(line, end)
        if line[at] == ",":
            at = _skip_space(line, at + 1)
    return places


def _skip_space(line: str, at: int) -> int:
    found = _JSON_SPACE.match(line, at)
    return found.end() if found else at


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate in a neighbouring field, which JSON alone can spell
        return json.dumps(value)
    return text
