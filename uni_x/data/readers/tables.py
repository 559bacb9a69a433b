"""Tab-separated lines with a picture in base64 and its caption, as the image-pair dumps have them."""

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uni_x.data.readers.fields import first_caption, load_fields
from uni_x.data.readers.lines import parse_json, read_lines, too_long
from uni_x.data.readers.parts import reject_rest
from uni_x.data.schema import Load, Rejection
from uni_x.data.utf8 import decode_utf8
from uni_x.errors import DataError

_IMAGE_NAMES = ("image", "image_base64", "img", "base64")
_CAPTION_NAMES = ("caption", "captions", "text", "json")
_ID_NAMES = ("id", "uid", "key")
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftypavi[fs]", re.DOTALL
)
_JSON_OF_TEXTS = re.compile(rb'\s*[\[{]\s*"')
_HEAD = 32  # characters of base64, which hold any signature


@dataclass(frozen=True)
class _Columns:
    """Which column is which, of how many."""

    count: int
    image: int
    caption: int
    id: int | None = None


def table_rows(path: Path, part: str, source: str) -> Iterator[Load]:
    """Rows of a file of tab-separated lines, plain or gzipped.

    A first line of names tells the columns; without one, the first line with a picture in it tells them by their
    content. Each caption is plain text or JSON: a string, a list of strings (the first that is not empty counts), or an
    object with `caption`, `text`, `captions` or `texts`.
    """
    return reject_rest(part, _table_rows(path, part, source))


def _table_rows(path: Path, part: str, source: str) -> Iterator[Load]:
    columns: _Columns | None = None
    for number, line in read_lines(path):
        row_id = f"{part}:{number}"
        if line is None:
            yield too_long(row_id)
            continue
        if columns is None:
            columns = _columns_by_name(line) if number == 1 else None
            if columns is not None:
                continue
            columns = _columns_by_content(line)
            if columns is None:
                yield partial(Rejection, row_id, "no column holds a picture in base64")
                continue
        yield partial(load_fields, partial(_fields, line, columns), row_id, source, None)


def _columns_by_name(line: bytes) -> _Columns | None:
    names = [cell.strip().decode("utf-8", "replace").lower() for cell in line.split(b"\t")]
    image, caption, row_id = (
        next((names.index(name) for name in known if name in names), None)
        for known in (_IMAGE_NAMES, _CAPTION_NAMES, _ID_NAMES)
    )
    return None if image is None or caption is None else _Columns(len(names), image, caption, row_id)


def _columns_by_content(line: bytes) -> _Columns | None:
    cells = line.split(b"\t")
    images = [number for number, cell in enumerate(cells) if _is_picture(cell)]
    if not images:
        return None
    image = max(images, key=lambda number: len(cells[number]))
    rest = [number for number in range(len(cells)) if number != image]
    if not rest:
        return None
    caption = next((number for number in rest if _is_json(cells[number])), rest[-1])
    return _Columns(len(cells), image, caption, None if 0 in (image, caption) else 0)


def _is_picture(cell: bytes) -> bool:
    try:
        return (
            _SIGNATURE.match(base64.b64decode(cell[:_HEAD], altchars=b"-_" if _is_url_safe(cell) else None)) is not None
        )
    except binascii.Error:
        return False


def _is_url_safe(cell: bytes) -> bool:
    return b"-" in cell or b"_" in cell


def _is_json(cell: bytes) -> bool:
    """Whether it is JSON of the kinds that captions come in, damaged or not; a number and `[sic]` are text."""
    if _JSON_OF_TEXTS.match(cell):
        return True
    if cell.strip()[:1] not in (b'"', b"[", b"{"):
        return False
    try:
        parse_json(cell)
    except DataError:
        return False
    return True


def _fields(line: bytes, columns: _Columns) -> dict[str, Any]:
    cells = line.split(b"\t")
    if len(cells) != columns.count:
        raise DataError(f"{len(cells)} columns, where the lines before have {columns.count}")
    caption = cells[columns.caption]
    return {
        "id": None if columns.id is None else decode_utf8(cells[columns.id]).strip(),
        "image": _to_picture(cells[columns.image]),
        "caption": _caption(parse_json(caption)) if _is_json(caption) else decode_utf8(caption).strip(),
    }


def _to_picture(cell: bytes) -> bytes:
    cell = cell.strip()
    if _is_url_safe(cell):
        cell = cell.translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(cell + b"=" * (-len(cell) % 4), validate=True)
    except binascii.Error:
        raise DataError("the picture is not valid base64") from None


def _caption(value: object) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in ("caption", "text", "captions", "texts") if value.get(name)), None)
    return first_caption(value if isinstance(value, list) else [value], "caption")
