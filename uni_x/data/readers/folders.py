"""Folders of pictures, each with its caption in a file beside it, or all of them in one table."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from uni_x.data.delimited import read_records, text_lines
from uni_x.data.readers.fields import load_fields
from uni_x.data.readers.lines import parse_object, read_lines, too_long
from uni_x.data.readers.parts import Resolve, reject_rest, to_unicode
from uni_x.data.schema import Load, Part, Rejection, check_text
from uni_x.data.utf8 import decode_utf8
from uni_x.errors import DataError
from uni_x.pictures import check_plain_file, is_picture_name

TABLES = ("captions.csv", "metadata.csv", "metadata.jsonl")
"""Names of tables at the top of a folder of pictures."""

_FILE_COLUMNS = ("file_name", "file", "image", "path")
_CAPTION_SUFFIXES = (".txt", ".json")  # the first counts where both are there


def picture_folder(folder: Path, source: str, leave_out: Path | None = None) -> Part | None:
    """The pictures of a folder, subfolders included, whose captions stand beside them; None where there are none.

    The caption of `cat.jpg` stands in `cat.txt` (UTF-8), or in `cat.json` as the fields of a row. Rows are sorted by
    path, and their ids are the paths inside the folder. What cannot be used is a row too, which is rejected: a caption
    without a picture, a picture of a format that is not read, and a symbolic link that leads outside the folder. What
    is in a folder to `leave_out` is none.
    """
    entries = _find_entries(folder, leave_out)
    if not any(entry.picture for entry in entries):
        return None
    return Part(to_unicode(folder.resolve().name), partial(_rows, folder, entries, source))


def table_folder(folder: Path, table: str, source: str, resolve: Resolve) -> Part:
    """The pictures that a table of a folder lists; others are left out.

    The table has a column `file_name` (or `file`, `image`, `path`) and those of a row.
    """
    read = _csv_rows if table.endswith(".csv") else _jsonl_rows
    return Part(table, lambda: reject_rest(table, read(folder / table, table, source, resolve)))


def directories(folder: Path, leave_out: Path | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """The directories in a folder, itself first, by their paths inside it, but for one to `leave_out`.

    Each comes with the names of its files, and of its links to directories, which are not followed.
    """
    left_out = None if leave_out is None else os.path.realpath(leave_out)
    for directory, subfolders, names in os.walk(folder):
        path = Path(directory)
        # Hidden files are litter of file managers, such as the "._cat.jpg" of macOS.
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and os.path.realpath(path / name) != left_out
        ]
        links = [name for name in subfolders if (path / name).is_symlink()]
        yield path.relative_to(folder), [name for name in names if not name.startswith(".")], links


def picture_stems(names: Iterable[str]) -> set[str]:
    """The names of the pictures among files, without their suffixes."""
    return {os.path.splitext(name)[0] for name in names if is_picture_name(name)}


def has_captions(names: Collection[str]) -> bool:
    """Whether a picture among these names of files has its caption in another of them."""
    return not picture_stems(names).isdisjoint(_captions(names))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A picture, or a link to a directory, with its caption, as paths inside the folder; either may be missing."""

    picture: str | None
    caption: str | None

    @property
    def path(self) -> str:
        return self.picture or self.caption or ""


def _captions(names: Iterable[str]) -> dict[str, str]:
    """For the names of the captions among files, without their suffixes, those that count."""
    split = [(*os.path.splitext(name), name) for name in names]
    return {
        stem: name for wanted in reversed(_CAPTION_SUFFIXES) for stem, suffix, name in split if suffix.lower() == wanted
    }


def _find_entries(folder: Path, leave_out: Path | None) -> list[_Entry]:
    entries = []
    root = Path(os.path.realpath(folder))
    for inside, names, links in directories(folder, leave_out):
        captions = _captions(names)
        lonely = captions.keys() - picture_stems(names)
        for name in names:
            if is_picture_name(name):
                caption = captions.get(os.path.splitext(name)[0])
                entries.append(_Entry((inside / name).as_posix(), caption and (inside / caption).as_posix()))
        entries += [_Entry(None, (inside / captions[stem]).as_posix()) for stem in lonely]
        # What a link to a directory of the same folder holds is found where it lies.
        leaving = [name for name in links if not _is_inside(root, folder / inside / name)]
        entries += [_Entry((inside / name).as_posix(), None) for name in leaving]
    return sorted(entries, key=lambda entry: entry.path.split("/"))


def _is_inside(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def _rows(folder: Path, entries: list[_Entry], source: str) -> Iterator[Load]:
    root = Path(os.path.realpath(folder))
    for entry in entries:
        yield partial(load_fields, partial(_beside, folder, root, entry), to_unicode(entry.path), source, None)


def _beside(folder: Path, root: Path, entry: _Entry) -> Mapping[str, Any]:
    """The fields of a picture's row, from the file beside it; `root` is the folder with its links followed."""
    for name in (entry.picture, entry.caption):
        if name is not None and not _is_inside(root, folder / name):
            raise DataError(f"a symbolic link that leads outside the folder is not followed: {to_unicode(name)}")
    if entry.picture is None:
        raise DataError("no picture stands beside the caption")
    picture = folder / entry.picture
    if entry.caption is None:
        raise DataError(f"the caption is missing: {picture.stem}.txt")
    caption = folder / entry.caption
    content = _read_caption(caption)
    if caption.suffix.lower() == ".json":
        return {**parse_object(content), "images": [picture]}
    text = decode_utf8(content, "caption").strip()
    check_text(text, "caption")
    return {"image": picture, "caption": text}


def _read_caption(path: Path) -> bytes:
    try:
        check_plain_file(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"the caption cannot be read: {path.name} ({error.strerror})") from None


def _jsonl_rows(path: Path, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    for number, content in read_lines(path):
        row_id = f"{part}:{number}"
        if content is None:
            yield too_long(row_id)
        else:
            yield partial(load_fields, partial(_listed, partial(parse_object, content), resolve), row_id, source, None)


def _csv_rows(path: Path, part: str, source: str, resolve: Resolve) -> Iterator[Load]:
    records = read_records(text_lines(path), ",")
    header = next(records, None)
    if header is None:
        return
    if header.fault:
        raise DataError(f"the line of columns cannot be read: {header.fault}")
    columns = [name.strip() for name in header.fields]
    for record in records:
        row_id = f"{part}:{record.line}"
        if record.fault:
            yield partial(Rejection, row_id, record.fault)
        elif record.fields:
            read = partial(_cells, columns, record.fields)
            yield partial(load_fields, partial(_listed, read, resolve), row_id, source, None)


def _cells(columns: Sequence[str], fields: Sequence[str]) -> Mapping[str, str]:
    return dict(zip(columns, fields, strict=True))


def _listed(read: Callable[[], Mapping[str, Any]], resolve: Resolve) -> Mapping[str, Any]:
    """The fields of a row of a table, its picture found."""
    fields = read()
    column = next((name for name in _FILE_COLUMNS if isinstance(fields.get(name), str) and fields[name]), None)
    if column is None:
        raise DataError(f"no file name in it (column {' or '.join(_FILE_COLUMNS)})")
    return {**fields, "images": [resolve(fields[column])]}
