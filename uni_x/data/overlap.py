"""Finds the prompts and questions of benchmarks among other texts.

Texts are compared as words, without regard to case, width, punctuation and white space. A text of a benchmark is found
where another is the same, and inside another where it is long enough not to stand there by chance.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uni_x.data.arrow import to_python, whole_parquet
from uni_x.data.delimited import Record, read_records, text_lines
from uni_x.data.readers.lines import LINE_LIMIT, parse_json, parse_object, read_lines
from uni_x.data.schema import IMAGE_PLACEHOLDER
from uni_x.data.utf8 import decode_utf8
from uni_x.errors import DataError, UsageError, one_line
from uni_x.pictures import check_plain_file

FIELDS = ("prompt", "question", "text", "caption")
LONG_WORDS, LONG_CHARACTERS = 8, 16  # a Chinese or Japanese character counts as half a word
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"([{_IDEOGRAPHS}])|[^\s{_IDEOGRAPHS}]+")  # each of these characters is a word of its own
_START = 8  # words that lead to a long text; every text that is long enough has as many


@dataclass(frozen=True, slots=True)
class Match:
    """A benchmark's text that was found: where it stands, and whether it is a part of a longer text."""

    where: str
    inside: bool


class BenchmarkTexts:
    """The texts of some benchmark files, in memory.

    A `.txt` file has a text a line, a folder a text in each of its `.txt` files, and a `.json` file is a list of texts
    or of objects. Of the fields of objects, there and in `.jsonl` files, and of the columns of `.tsv` and `.parquet`
    files those of `FIELDS` count.
    """

    def __init__(self, paths: Sequence[Path]):
        """Raises `DataError` for files that cannot be read or hold no such text, `UsageError` for other suffixes."""
        self._separators = _Separators()
        self._whole: dict[tuple[str, ...], str] = {}
        self._long: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for path in paths:
            self._add(path)

    def find(self, text: str) -> Match | None:
        """A text of a benchmark that is this one, or that stands whole inside it; None where there is none."""
        words = self._words(text)
        if where := self._whole.get(words):
            return Match(where, inside=False)
        if self._long:
            for place in range(len(words) - _START + 1):
                for found in self._long.get(words[place : place + _START], ()):
                    if words[place : place + len(found)] == found:
                        return Match(self._whole[found], inside=True)
        return None

    def _add(self, path: Path) -> None:
        empty = True
        for where, text in _read_texts(path):
            words = self._words(text)
            if not words:
                continue
            empty = False
            if words in self._whole:
                continue
            self._whole[words] = f"{path.name}, {where}"
            if _is_long(words):
                self._long.setdefault(words[:_START], []).append(words)
        if empty:
            raise DataError(f"{path}: no text in it; looked for {_looked_for(path)}")

    def _words(self, text: str) -> tuple[str, ...]:
        text = unicodedata.normalize("NFKC", text.replace(IMAGE_PLACEHOLDER, " ")).casefold()
        text = unicodedata.normalize("NFKC", text).translate(self._separators)
        return tuple(found[0] for found in _WORD.finditer(text))


class _Separators(dict[int, int]):
    """For `str.translate`: punctuation, separators and control characters become spaces."""

    def __missing__(self, character: int) -> int:
        self[character] = 32 if unicodedata.category(chr(character))[0] in "PZC" else character
        return self[character]


def _is_long(words: tuple[str, ...]) -> bool:
    characters = sum(_WORD.fullmatch(word)[1] is not None for word in words)  # type: ignore[index]
    return (len(words) - characters) / LONG_WORDS + characters / LONG_CHARACTERS >= 1


def _looked_for(path: Path) -> str:
    if path.is_dir():
        return "files that end in .txt"
    return "lines of text" if path.suffix.lower() == ".txt" else ", ".join(FIELDS)


def _read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """The texts of a benchmark's file or folder, each with its place in it."""
    reader = _folder_rows if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: a benchmark's file ends in one of {', '.join(_READERS)}, or it is a folder of .txt")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        for where, row in reader(path):
            yield from ((where, row[name]) for name in FIELDS if isinstance(row.get(name), str))
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in read_lines(path):
        if line is None:
            raise DataError(f"line {number} is longer than {LINE_LIMIT // 2**20} MiB")
        yield f"line {number}", line


def _folder_rows(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".txt" and not path.name.startswith("."):
            check_plain_file(path)
            yield path.name, {"text": decode_utf8(path.read_bytes(), path.name)}


def _text_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _lines(path):
        yield where, {"text": decode_utf8(line, where)}


def _json_list_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    elements = parse_json(path.read_bytes())
    if not isinstance(elements, list):
        raise DataError(f"a JSON list of texts or objects is needed, not {type(elements).__name__}")
    for number, element in enumerate(elements, start=1):
        where = f"element {number}"
        if not isinstance(element, str | dict):
            raise DataError(f"{where}: a text or an object is needed, not {type(element).__name__}")
        yield where, {"text": element} if isinstance(element, str) else element


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _lines(path):
        try:
            yield where, parse_object(line)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _tab_separated_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    records = read_records(text_lines(path), "\t")
    header = next(records, Record(1, b""))
    if header.fault:
        raise DataError(f"the header cannot be read: {header.fault}")
    _known_columns(header.fields)
    for number, record in enumerate(records, start=1):
        where = f"row {number}"
        if record.fields or record.fault:
            yield where, dict(zip(header.fields, _fields(record, len(header.fields), where), strict=True))


def _fields(record: Record, width: int, where: str) -> Sequence[str]:
    """The fields; of a record with quotation marks that open and never close, they are part of the texts."""
    if not record.fault:
        return record.fields
    fields = decode_utf8(record.raw, where).rstrip("\r\n").split("\t")
    if len(fields) != width:
        raise DataError(f"{where}: {record.fault}")
    return fields


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq

    with whole_parquet(), pq.ParquetFile(path) as file:
        yield from _batch_rows(file.iter_batches(1024, columns=_known_columns(file.schema_arrow.names)))


def _known_columns(names: Sequence[str]) -> list[str]:
    columns = [name for name in FIELDS if name in names]
    if not columns:
        raise DataError(f"none of the columns {', '.join(FIELDS)}; it has {', '.join(names)}")
    return columns


def _batch_rows(batches: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = (
        dict(zip(batch.schema.names, values, strict=True))
        for batch in batches
        for values in zip(*map(to_python, batch.columns), strict=True)
    )
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if isinstance(value, DataError):
                raise DataError(f"row {number}, {name}: {value}")
        yield f"row {number}", row


_READERS = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".tsv": _tab_separated_rows,
    ".parquet": _parquet_rows,
    ".json": _json_list_rows,
}
