"""Tables of which some columns can be rewritten: JSONL, Parquet, tab-separated files and lists of prompts.

A table gives its rows in order, with the columns that were asked for, and writes a copy of itself in which nothing but
rewritten values differs. Lines without any are copied as they stand, and so are the other fields of JSON rows.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from uni_x.data.translation.values import kind_of
from uni_x.errors import DataError, UsageError
from uni_x.runs import writing_whole

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_ROW_BYTES = 64 * 2**20
PROMPT = "prompt"  # the one column of a list of prompts

_JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row, counted from 1, with those of the asked columns that it has."""

    number: int
    values: Mapping[str, Any]


Changes: TypeAlias = Callable[[Row], Mapping[str, Any]]
"""Gives the new values of a row by column; empty where the row stays as it is."""


class Table(Protocol):
    """A file of rows. Both methods raise `DataError`, which names file and row, for what cannot be read."""

    def rows(self) -> Iterator[Row]:
        """The rows in their order; each call starts again at the first."""
        ...

    def copy(self, out: Path, changes: Changes) -> None:
        """Writes the table with changes to `out`, in one step once it is whole."""
        ...


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


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; rows are counted as lines are, and an empty line is a row without columns."""

    path: Path
    columns: tuple[str, ...]

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        return (row for row, _ in self._rows())

    def copy(self, out: Path, changes: Changes) -> None:
        """See `Table`."""
        with writing_whole(out) as stream:
            for row, line in self._rows():
                if values := changes(row):
                    line = _splice(line, values)
                stream.write(line.encode("utf-8"))

    def _rows(self) -> Iterator[tuple[Row, str]]:
        for number, line in enumerate(_read_lines(self.path), start=1):
            found = self._parse(number, line) if line.strip() else {}
            yield Row(number, {name: found[name] for name in self.columns if name in found}), line

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or "it is nested too deeply, or holds a number too long"
            raise DataError(f"{self.path}, row {number}: not valid JSON ({reason})") from None
        if not isinstance(found, dict):
            raise DataError(f"{self.path}, row {number}: a JSON object is needed, not {kind_of(found)}")
        return found


@dataclass(frozen=True)
class TabSeparated:
    """Fields between tabs under a header; where a field is in quotes, they are doubled inside it."""

    path: Path
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        _, header = next(self._records(), ("", []))
        _check_columns(self.path, self.columns, header)

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        return (row for row, _, _ in self._rows())

    def copy(self, out: Path, changes: Changes) -> None:
        """See `Table`."""
        with writing_whole(out) as stream:
            raw, header = next(self._records())
            stream.write(raw.encode("utf-8"))
            for row, raw, fields in self._rows():
                if values := changes(row):
                    end = raw[len(raw.rstrip("\r\n")) :]
                    new = [values.get(name, field) for name, field in zip(header, fields, strict=True)]
                    raw = "\t".join(map(_quote, new)) + end
                stream.write(raw.encode("utf-8"))

    def _rows(self) -> Iterator[tuple[Row, str, list[str]]]:
        records = self._records()
        _, header = next(records)
        for number, (raw, fields) in enumerate(records, start=1):
            if len(fields) != len(header):
                raise DataError(f"{self.path}, row {number}: {len(fields)} fields under a header of {len(header)}")
            found = dict(zip(header, fields, strict=True))
            yield Row(number, {name: found[name] for name in self.columns}), raw, fields

    def _records(self) -> Iterator[tuple[str, list[str]]]:
        """Records as they stand and as fields, the header first; lines that are empty go with the record below."""
        lines: list[str] = []
        size = 0

        def take() -> Iterator[str]:
            nonlocal size
            for number, line in enumerate(_read_lines(self.path), start=1):
                size += len(line)
                if size > MAX_ROW_BYTES:
                    raise DataError(_too_large(self.path, f"the row that ends in line {number} or later"))
                lines.append(line)
                yield line

        # The limit is one for the whole process; pictures in base64 pass the usual one of 128 KB.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        reader = csv.reader(take(), delimiter="\t", strict=True)
        try:
            for fields in reader:
                if fields:
                    yield "".join(lines), fields
                    lines.clear()
                    size = 0
        except csv.Error as error:
            raise DataError(f"{self.path}, line {reader.line_num}: not a tab-separated row ({error})") from None


@dataclass(frozen=True)
class PromptList:
    """One prompt a line, in a column called `prompt`; an empty line is a row too."""

    path: Path

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        return (row for row, _ in self._rows())

    def copy(self, out: Path, changes: Changes) -> None:
        """See `Table`."""
        with writing_whole(out) as stream:
            for row, end in self._rows():
                stream.write((changes(row) or row.values)[PROMPT].encode("utf-8") + end)

    def _rows(self) -> Iterator[tuple[Row, bytes]]:
        for number, line in enumerate(_read_lines(self.path), start=1):
            prompt = line.rstrip("\r\n")
            yield Row(number, {PROMPT: prompt}), line[len(prompt) :].encode()


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file; its schema, metadata, row groups and compression are those of the copy."""

    path: Path
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        with self._open() as file:
            _check_columns(self.path, self.columns, file.schema_arrow.names)

    def rows(self) -> Iterator[Row]:
        """See `Table`."""
        with self._open() as file:
            number = 0
            for group in range(file.num_row_groups):
                self._check_sizes(file, group, number)
                for batch in file.iter_batches(64, row_groups=[group], columns=list(self.columns)):
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(number, {name: values[name] for name in self.columns})

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

    def _change(self, table: pa.Table, before: int, changes: Changes) -> pa.Table:
        """A row group, the first row of which is number `before + 1`, with its changes."""
        import pyarrow as pa

        columns = {name: table.column(name).to_pylist() for name in self.columns}
        changed = set()
        for index in range(table.num_rows):
            row = Row(before + index + 1, {name: values[index] for name, values in columns.items()})
            for name, value in changes(row).items():
                columns[name][index] = value
                changed.add(name)
        for name in changed:
            place = table.schema.get_field_index(name)
            field = table.schema.field(place)
            table = table.set_column(place, field, pa.array(columns[name], type=field.type))
        return table

    def _check_sizes(self, file: pq.ParquetFile, group: int, before: int) -> None:
        if file.metadata.row_group(group).total_byte_size <= MAX_ROW_BYTES:
            return
        for batch in file.iter_batches(16, row_groups=[group]):
            if batch.nbytes > MAX_ROW_BYTES:
                for index in range(batch.num_rows):
                    if batch.slice(index, 1).nbytes > MAX_ROW_BYTES:
                        raise DataError(_too_large(self.path, f"row {before + index + 1}"))
            before += batch.num_rows

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path}: the Parquet file cannot be read or copied ({reason})") from None


def _compression(file: pq.ParquetFile) -> str:
    if not file.num_row_groups or not file.metadata.num_columns:
        return "snappy"
    name = file.metadata.row_group(0).column(0).compression.lower()
    return "none" if name == "uncompressed" else name


_KINDS: dict[str, Callable[..., Table]] = {
    ".jsonl": JsonLines,
    ".parquet": ParquetTable,
    ".tsv": TabSeparated,
    ".txt": PromptList,
}


def _read_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, which are `\\n` alone or after `\\r`; a byte order mark is dropped."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise DataError(_too_large(path, f"line {number}"))
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {number}: not valid UTF-8") from None


def _too_large(path: Path, place: str) -> str:
    return f"{path}, {place}: larger than {MAX_ROW_BYTES // 2**20} MB; take it out, or store its pictures smaller"


def _check_columns(path: Path, columns: tuple[str, ...], header: list[str]) -> None:
    for name in columns:
        if header.count(name) != 1:
            found = "no column" if name not in header else "more than one column"
            raise DataError(f"{path}: {found} {name!r}; its columns are {', '.join(header) or 'none'}")


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
