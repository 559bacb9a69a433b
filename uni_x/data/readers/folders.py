"""Folders of pictures, each with its caption in a file beside it, or all of them in one table."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from uni_x.data.readers.fields import load_fields
from uni_x.data.readers.lines import parse_object, read_lines, too_long
from uni_x.data.readers.parts import file_inside, reject_rest, to_unicode
from uni_x.data.schema import Load, Part, Rejection, is_unicode
from uni_x.errors import DataError
from uni_x.pictures import PICTURE_SUFFIXES

TABLES = ("captions.csv", "metadata.csv", "metadata.jsonl")
"""Names of tables; where a folder has several, the first of these counts."""

_FILE_COLUMNS = ("file_name", "file", "image", "path")


def picture_folder(folder: Path, source: str) -> Part | None:
    """The pictures of a folder, subfolders included, or those that its table lists; None where there are none.

    The caption of `cat.jpg` stands in `cat.txt` (UTF-8), or in `cat.json` as the fields of a row. Without a table
    rows are sorted by path, and their ids are the paths inside the folder. A table has a column `file_name` (or
    `file`, `image`, `path`) and those of a row; pictures that it does not list are left out.
    """
    for name in TABLES:
        if (folder / name).is_file():
            read = _csv_rows if name.endswith(".csv") else _jsonl_rows
            return Part(name, partial(_table_rows, read, folder, name, source))
    pictures = _find_pictures(folder)
    return Part(to_unicode(folder.resolve().name), partial(_rows, folder, pictures, source)) if pictures else None


def is_captioned(names: set[str]) -> bool:
    """Whether a picture among these names of files has its caption in another of them."""
    return any(
        f"{stem}.txt" in names or f"{stem}.json" in names
        for stem, suffix in map(os.path.splitext, names)
        if suffix.lower() in PICTURE_SUFFIXES
    )


def _find_pictures(folder: Path) -> list[str]:
    """Paths inside the folder."""
    found = []
    for directory, subfolders, names in os.walk(folder):
        # Hidden files are litter of file managers, such as the "._cat.jpg" of macOS.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(directory).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES
        ]
    return sorted(found, key=lambda path: path.split("/"))


def _rows(folder: Path, pictures: list[str], source: str) -> Iterator[Load]:
    for picture in pictures:
        yield partial(load_fields, partial(_beside, folder / picture), to_unicode(picture), source, None)


def _beside(picture: Path) -> Mapping[str, Any]:
    """The fields of a picture's row, from the file beside it."""
    as_json = picture.with_suffix(".json")
    if as_json.is_file() and not picture.with_suffix(".txt").exists():
        fields = parse_object(as_json.read_bytes())
        return {**_without(fields, "images"), "image": picture}
    return {"image": picture, "caption": _read_caption(picture.with_suffix(".txt"))}


def _read_caption(path: Path) -> str:
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError(f"the caption is missing: {path.name}") from None
    except UnicodeDecodeError:
        raise DataError(f"the caption is not valid UTF-8: {path.name}") from None
    except OSError as error:
        raise DataError(f"the caption cannot be read: {path.name} ({error.strerror})") from None
    if not caption:
        raise DataError(f"the caption is empty: {path.name}")
    return caption


def _table_rows(
    read: Callable[[Path, str, str], Iterator[Load]], folder: Path, name: str, source: str
) -> Iterator[Load]:
    return reject_rest(name, read(folder, name, source))


def _jsonl_rows(folder: Path, name: str, source: str) -> Iterator[Load]:
    for number, content in read_lines(folder / name):
        row_id = f"{name}:{number}"
        if content is None:
            yield too_long(row_id)
        else:
            yield partial(load_fields, partial(_listed, folder, partial(parse_object, content)), row_id, source, None)


def _csv_rows(folder: Path, name: str, source: str) -> Iterator[Load]:
    # Bytes that are not UTF-8 cost their own row alone; a quote that is never closed is an error, not a long caption.
    with (folder / name).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            first = reader.line_num + 1
            row_id = f"{name}:{first}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if header is None:
                    raise DataError(f"the line of columns is not valid CSV ({error})") from None
                yield partial(Rejection, row_id, f"lines {first} to {reader.line_num} are not valid CSV ({error})")
                continue
            if cells is None:
                return
            if header is None:
                header = cells
            elif cells:
                yield partial(
                    load_fields, partial(_listed, folder, partial(_cells, header, cells)), row_id, source, None
                )


def _cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(f"{len(cells)} cells under {len(header)} columns")
    if not is_unicode("".join(cells)):
        raise DataError("not valid UTF-8")
    return {column.strip(): cell for column, cell in zip(header, cells, strict=True)}


def _listed(folder: Path, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """The fields of a row of a table, its picture found."""
    fields = read()
    column = next((name for name in _FILE_COLUMNS if isinstance(fields.get(name), str) and fields[name]), None)
    if column is None:
        raise DataError(f"no file name in it (column {' or '.join(_FILE_COLUMNS)})")
    picture = file_inside(folder, fields[column])
    return {**_without(fields, column, "images"), "image": picture}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
