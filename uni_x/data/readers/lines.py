"""Files of lines, plain or gzipped, and JSON in them: one object a line, or one array of objects."""

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from uni_x.data.readers.fields import load_fields
from uni_x.data.readers.parts import Resolve, reject_rest
from uni_x.data.schema import Load, Rejection
from uni_x.data.utf8 import decode_utf8
from uni_x.errors import DataError

LINE_LIMIT = 64 * 2**20
_CHUNK = 2**20
_ARRAY_DELIMITER = re.compile(r"[ \t\r\n]*([\[,\]])[ \t\r\n]*")


def json_rows(path: Path, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    """Rows of a JSON Lines file, or of the array that a JSON file is; pictures are files that they name."""
    return reject_rest(part, _json_rows(path, part, source, resolve))


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank with their numbers, counted from 1; None where one is longer than `LINE_LIMIT`.

    Raises `DataError` where a gzipped file is damaged.
    """
    with _opened(path) as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT and not line.endswith(b"\n"):
                while (tail := stream.readline(_CHUNK)) and not tail.endswith(b"\n"):
                    pass
                yield number, None
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def too_long(row_id: str) -> Load:
    """What stands for a line of which `read_lines` gives None."""
    return partial(Rejection, row_id, f"the line is longer than {LINE_LIMIT // 2**20} MiB")


def parse_json(content: bytes) -> Any:
    """Raises `DataError` for what is not UTF-8 or not JSON."""
    text = decode_utf8(content)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from None


def parse_object(content: bytes) -> dict[str, Any]:
    """Raises `DataError` for what is not UTF-8, not JSON, or another thing than an object."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise DataError(f"a JSON object is needed, not {type(value).__name__}")
    return value


def _json_rows(path: Path, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    for number, content in _array_elements(path) if _is_array(path) else read_lines(path):
        row_id = f"{part}:{number}"
        if content is None:
            yield too_long(row_id)
        else:
            yield partial(load_fields, partial(parse_object, content), row_id, source, resolve)


def _is_array(path: Path) -> bool:
    if not path.name.lower().removesuffix(".gz").endswith(".json"):
        return False
    with _opened(path) as stream:
        return stream.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array_elements(path: Path) -> Iterator[tuple[int, bytes]]:
    with _opened(path) as stream:
        # Bytes that are not UTF-8 go through as lone surrogates, so that they cost their own element alone.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        for number, element in enumerate(_cut_array(text), start=1):
            yield number, element.encode("utf-8", "surrogateescape")


def _cut_array(text: TextIO) -> Iterator[str]:
    """The elements of a JSON array as they are written, with a piece of the file in memory at a time."""
    decode = json.JSONDecoder().raw_decode
    buffer, position, count, at_end = "", 0, 0, False
    while True:
        delimiter = _ARRAY_DELIMITER.match(buffer, position)
        if delimiter is not None:
            start = delimiter.end()
            if delimiter[1] == "]":
                if buffer[start:] or text.read(_CHUNK).strip():
                    raise DataError(f"the JSON goes on behind the array of {count} elements")
                return
            if delimiter[1] != ("," if count else "["):
                raise DataError(f"not valid JSON behind element {count}")
            if not count and buffer[start : start + 1] == "]":
                position = start
                continue
            end = _end_of_element(decode, buffer, start)
            if end is not None and (end < len(buffer) or at_end):  # else it may go on in the next piece
                yield buffer[start:end]
                position, count = end, count + 1
                continue
        if at_end or len(buffer) - position > LINE_LIMIT:
            raise DataError(f"the JSON array breaks off or is not valid behind element {count}")
        piece = text.read(max(_CHUNK, len(buffer) - position))
        buffer, position, at_end = buffer[position:] + piece, 0, not piece


def _end_of_element(decode: Callable[[str, int], tuple[Any, int]], buffer: str, start: int) -> int | None:
    try:
        return decode(buffer, start)[1]
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            with path.open("rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"the gzipped file is damaged or cut off ({error})") from None
