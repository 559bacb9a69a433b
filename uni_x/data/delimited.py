"""Records of fields between tabs or commas, of which a broken one costs its own line alone."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uni_x.data.utf8 import utf8_fault

MAX_RECORD_BYTES = 64 * 2**20

_SEPARATED = {"\t": "tab-separated", ",": "comma-separated"}


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it stands in the file, and its fields, or the fault for which they cannot be told.

    `line` is the number of its first line, counted from 1. An empty line is a record without fields.
    """

    line: int
    raw: bytes
    fields: tuple[str, ...] = ()
    fault: str = ""


def text_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends, which may be `\\r` too; a byte order mark is dropped."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for line in lines:
            yield line.encode("utf-8", "surrogateescape")


def read_records(lines: Iterable[bytes], delimiter: str) -> Iterator[Record]:
    """The records of lines, the header first, whose number of fields is that of all others.

    Where a field is in quotation marks, they are doubled inside it. A field that opens with one and never closes it
    would take the rest of the file with it, so of a record that cannot be read only the first line is taken.
    """
    # The limit is one for the whole process; pictures in base64 pass the usual one of 128 KB.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    pending = _Lines(iter(lines))
    width = 0
    while record := _read_record(pending, delimiter, width):
        width = width or len(record.fields)
        yield record


class _Lines(Iterator[bytes]):
    """Lines that can be given back, to be read again; `passed` are those before the next one."""

    def __init__(self, lines: Iterator[bytes]):
        self.passed = 0
        self._lines = lines
        self._returned: deque[bytes] = deque()

    def __next__(self) -> bytes:
        line = self._returned.popleft() if self._returned else next(self._lines)
        self.passed += 1
        return line

    def give_back(self, lines: list[bytes]) -> None:
        self._returned.extendleft(reversed(lines))
        self.passed -= len(lines)


def _read_record(lines: _Lines, delimiter: str, width: int) -> Record | None:
    """The next record, of `width` fields where that is known already; None at the end of the file."""
    number = lines.passed + 1
    taken: list[bytes] = []

    def decoded() -> Iterator[str]:
        size = 0
        for line in lines:
            taken.append(line)
            size += len(line)
            if size > MAX_RECORD_BYTES:
                raise csv.Error("no end of it in sight")
            yield line.decode("utf-8")

    try:
        fields = next(csv.reader(decoded(), delimiter=delimiter, strict=True), None)
        fault = f"{len(fields)} fields under a header of {width}" if fields and width not in (0, len(fields)) else ""
    except (csv.Error, UnicodeDecodeError) as error:
        fields = []
        fault = _fault(error, delimiter, spans_lines=len(taken) > 1)
    if not taken:
        return None
    if fault:
        lines.give_back(taken[1:])
        return Record(number, taken[0], fault=fault)
    return Record(number, b"".join(taken), tuple(fields or ()))


def _fault(error: csv.Error | UnicodeDecodeError, delimiter: str, spans_lines: bool) -> str:
    if spans_lines or "end of data" in str(error):
        return "a quotation mark opens a field, and none closes it"
    if isinstance(error, UnicodeDecodeError):
        return utf8_fault(error)
    return f"not a {_SEPARATED[delimiter]} row ({error})"
