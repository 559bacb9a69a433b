"""WebDataset tars: neighbouring members with the same name up to its first dot are one row."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from uni_x.data.readers.fields import load_fields
from uni_x.data.readers.lines import parse_object
from uni_x.data.readers.parts import reject_rest, to_unicode
from uni_x.data.schema import Load
from uni_x.data.utf8 import decode_utf8
from uni_x.errors import DataError
from uni_x.pictures import is_picture_name

_TEXTS = ("txt", "caption")
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class _Member:
    """Where the content of a member stands in the tar.

    Attributes:
        extension: all behind the first dot of the base name.
        unusable: why it cannot be read, where it cannot.
    """

    key: str
    extension: str
    offset: int
    size: int
    unusable: str | None


def tar_rows(path: Path, part: str, source: str) -> Iterator[Load]:
    """Rows of a tar: pictures with a caption (`txt`, `caption`), or with the fields of a row (`json`).

    Ids are the keys behind the tar's name. Several pictures of a row come in the order of their names, `img10.jpg`
    behind `img9.jpg`. Nothing is unpacked to disk.
    """
    return reject_rest(part, _tar_rows(path, part, source))


def _tar_rows(path: Path, part: str, source: str) -> Iterator[Load]:
    for key, members in groupby(_members(path), key=lambda member: member.key):
        row_id = to_unicode(f"{part}:{key}")
        yield partial(load_fields, partial(_fields, path, list(members)), row_id, source, None)


def _members(path: Path) -> Iterator[_Member]:
    """Raises `DataError` where the tar breaks off; the row that was begun there is not given."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # they would pile up
                directory, slash, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if key and not member.isdir():  # hidden files are litter of file managers
                    place = (member.offset_data, member.size)
                    yield _Member(f"{directory}{slash}{key}", extension.lower(), *place, _why_unusable(member))
                if member.offset_data + member.size > size:  # a row before it is whole, its own is not
                    raise DataError(f"the tar breaks off in {to_unicode(member.name)}")
            _check_end(path, tar.offset)
    except DataError:
        raise
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"not a whole tar ({error})") from None


def _why_unusable(member: tarfile.TarInfo) -> str | None:
    name = to_unicode(member.name)
    if member.islnk() or member.issym():
        return f"links in a tar are not followed; pack the file itself: {name}"
    if not member.isreg() or member.issparse():
        return f"no plain file: {name}"
    return None if "." in name.rpartition("/")[2] else f"nothing in its name says what it is, such as .jpg: {name}"


def _check_end(path: Path, offset: int) -> None:
    """Python's reader takes a cut or a damaged header for the end, where in truth nothing but zeros follow."""
    with path.open("rb") as stream:
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"the tar breaks off or is damaged at byte {offset:,}")
        while piece := stream.read(_CHUNK):
            if piece.strip(b"\0"):
                raise DataError(f"it goes on behind its end at byte {offset:,}; it is damaged, or several tars in one")


def _fields(path: Path, members: list[_Member]) -> dict[str, Any]:
    if unusable := next((member.unusable for member in members if member.unusable), None):
        raise DataError(unusable)
    extensions = [member.extension for member in members]
    for number, extension in enumerate(extensions):
        if extension in extensions[:number]:
            raise DataError(f"two members of the row end in .{extension}")
    pictures = sorted(
        (member for member in members if is_picture_name(f"_.{member.extension}")),
        key=lambda member: _natural_order(member.extension),
    )
    text = next((member for name in _TEXTS for member in members if member.extension == name), None)
    fields = next((member for member in members if member.extension == "json"), None)
    if text is not None and not pictures:
        raise DataError("no picture stands beside the caption (the members of a row must be neighbours)")
    if text is None and fields is None:
        raise DataError(f"neither txt, caption nor json in it (its members end in {', '.join(extensions)})")
    with path.open("rb") as stream:
        images = {"images": [_read(stream, member) for member in pictures]} if pictures else {}
        if text is not None:
            return {**images, "caption": decode_utf8(_read(stream, text), "caption").strip()}
        assert fields is not None
        return {**parse_object(_read(stream, fields)), **images}


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(digits or -1), text) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _read(stream: Any, member: _Member) -> bytes:
    stream.seek(member.offset)
    content: bytes = stream.read(member.size)
    if len(content) != member.size:
        raise DataError("the tar has become shorter while it was read")
    return content
