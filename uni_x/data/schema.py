"""What travels through the data layer: source rows, samples, and the rules that both obey.

A sample holds exactly one kind of content. A *caption* goes with one picture. *Messages* are a conversation, and
*text* is a document; both mark the place of each picture with `<image>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from uni_x.errors import DataError
from uni_x.pictures import Picture
from uni_x.words import count_of

IMAGE_PLACEHOLDER = "<image>"
ROLES = ("system", "user", "assistant")
CONTENT_FIELDS = ("caption", "messages", "text")


@dataclass(frozen=True, slots=True, eq=False)
class CodeGrid:
    """The codes of one image in reading order: `height * width` of them, uint16 or uint32, counted from 0.

    `height` and `width` are those of the grid in codes; the pixel sizes are those of the picture it was made from.
    """

    codes: np.ndarray  # (height * width,)
    height: int
    width: int
    pixel_height: int | None = None
    pixel_width: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `content` marks the place of each image with `<image>`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training sample with its images as codes."""

    id: str
    images: tuple[CodeGrid, ...] = ()
    caption: str | None = None
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class SourceRow:
    """What a reader gives: a sample whose pictures need not be encoded yet.

    `content_field` is what the source calls its caption, messages or text, where that is another name. `input_ids` are
    a text that a tokenizer has made into ids already; `uni_x.data.ready_ids` turns them back.
    """

    id: str
    images: tuple[Picture | CodeGrid, ...] = ()
    caption: str | None = None
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    source: str = ""
    content_field: str | None = None
    input_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that cannot be used, and why. Readers give it in the row's place, so that nothing disappears silently."""

    id: str
    reason: str


Load: TypeAlias = Callable[[], SourceRow | Rejection]
"""Reads one row. Getting it costs next to nothing, so that rows which are not wanted can be passed over."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a source, or another piece of it that is read on its own.

    `name` is unique within the source and the same in every run, and so are the rows and their order.
    """

    name: str
    rows: Callable[[], Iterator[Load]]


def check_content(row: Sample | SourceRow) -> None:
    """Checks the content of a row against its number of images.

    Raises `DataError`, which names the id and the field.
    """
    kinds = [name for name in CONTENT_FIELDS if getattr(row, name) is not None]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise DataError(f"sample {row.id!r}: exactly one of caption, messages and text must be given, found {found}")
    for field, text in (("id", row.id), *_texts(row)):
        check_text(text, f"sample {row.id!r}, {field}")
    if row.messages is not None:
        _check_messages(row.id, row.messages, _content_field(row))
    _check_placeholders(row)


def check_sample(sample: Sample, codebook_size: int) -> None:
    """Checks a sample's content and codes: their number, type and range, which is `0 .. codebook_size - 1`.

    Raises `DataError`, which names the id and the field.
    """
    check_content(sample)
    for number, grid in enumerate(sample.images):
        where = f"sample {sample.id!r}, images[{number}].codes"
        if grid.codes.ndim != 1 or grid.codes.dtype not in (np.uint16, np.uint32):
            found = f"{grid.codes.dtype} of shape {grid.codes.shape}"
            raise DataError(f"{where}: one row of uint16 or uint32 is needed, not {found}")
        if grid.height < 1 or grid.width < 1 or len(grid.codes) != grid.height * grid.width:
            raise DataError(f"{where}: {len(grid.codes)} codes do not fill a grid of {grid.height} x {grid.width}")
        if grid.codes.max() >= codebook_size:
            raise DataError(f"{where}: code {grid.codes.max()} is not in a codebook of {codebook_size}")


def check_text(text: str, where: str) -> None:
    """Raises `DataError`, which says where, for a text that is empty or holds half of a surrogate pair."""
    if not text.strip():
        raise DataError(f"{where}: it is empty")
    if not is_unicode(text):
        raise DataError(f"{where}: it is not valid Unicode (a lone surrogate)")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; one with half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _content_field(row: Sample | SourceRow) -> str:
    """What the user calls the content."""
    own = row.content_field if isinstance(row, SourceRow) else None
    return own or next(name for name in CONTENT_FIELDS if getattr(row, name) is not None)


def _texts(row: Sample | SourceRow) -> Iterator[tuple[str, str]]:
    field = _content_field(row)
    for text in (row.caption, row.text):
        if text is not None:
            yield field, text
    for number, message in enumerate(row.messages or ()):
        yield f"{field}[{number}].content", message.content


def _check_messages(row_id: str, messages: tuple[Message, ...], field: str) -> None:
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"sample {row_id!r}, {field}[{number}].role: {message.role!r} is none of {known}")
    if not messages or messages[-1].role != "assistant":
        raise DataError(f"sample {row_id!r}, {field}: a conversation must end with the assistant's turn")


def _check_placeholders(row: Sample | SourceRow) -> None:
    where, images = f"sample {row.id!r}, {_content_field(row)}", len(row.images)
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for _, text in _texts(row))
    if row.caption is not None:
        if images != 1:
            raise DataError(f"sample {row.id!r}, images: a caption goes with exactly one image, found {images}")
        if placeholders:
            raise DataError(f"{where}: a caption holds no {IMAGE_PLACEHOLDER}; use messages or text")
        return
    images_first = row.messages is not None and not placeholders
    if placeholders != images and not images_first:
        raise DataError(f"{where}: {placeholders} {IMAGE_PLACEHOLDER} for {count_of(images, 'image')}")
