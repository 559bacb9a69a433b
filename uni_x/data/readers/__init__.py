"""Readers: they turn sources on disk, and datasets of the hub, into parts with rows in an order that never changes.

`kinds` tells what a source is, `fields` what kind of row the fields of a foreign row make; the other modules read one
kind of file each.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from uni_x.data.readers.folders import picture_folder, table_folder
from uni_x.data.readers.hub import hub_dataset, local_repository, saved_dataset
from uni_x.data.readers.kinds import (
    DATASET,
    KNOWN,
    PICTURES,
    REPOSITORY,
    Found,
    choose_split,
    find_on_disk,
    is_file_name,
)
from uni_x.data.readers.lines import json_rows
from uni_x.data.readers.parquet import parquet_rows
from uni_x.data.readers.parts import PictureFinder, Resolve, SourceOptions, to_unicode
from uni_x.data.readers.tables import table_rows
from uni_x.data.readers.tars import tar_rows
from uni_x.data.schema import Load, Part
from uni_x.errors import DataError

__all__ = ["SourceOptions", "open_source"]

_HOLDING_PICTURES: dict[str, Callable[[Path, str, str], Iterator[Load]]] = {"tar": tar_rows, "tsv": table_rows}
_NAMING_PICTURES: dict[str, Callable[[Path, str, str, Resolve], Iterator[Load]]] = {
    "parquet": parquet_rows,
    "jsonl": json_rows,
    "json": json_rows,
}
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")


def open_source(name: str, options: SourceOptions | None = None) -> list[Part]:
    """The parts of a source: a file, a folder or a dataset of the hub, whose kind is told from what is there.

    Of a folder the files at its top are read, one part each, sorted by name; pictures are found in subfolders too.
    A row's own id is its id, also where a source uses it twice; a row without one has that of its part and number.

    Raises `DataError` where nothing is there, nothing that can be read, several kinds of files, what `uni-x encode`
    wrote, or an option that means nothing to this kind of source.
    """
    options = options or SourceOptions()
    shown = to_unicode(name)
    found = find_on_disk(name, options.kind, options.leave_out)
    if found is not None:
        return _open(found, _name_of(Path(name), found), shown, options)
    if _HUB_ID.fullmatch(name) and not name.startswith(".") and not is_file_name(name):
        _refuse_pictures(shown, options)
        return hub_dataset(name, options)
    raise DataError(f"{shown}: no such file or folder (a source is {KNOWN})")


def _name_of(path: Path, found: Found) -> str:
    """What rows have as their source where they name none."""
    if path.is_file():
        return to_unicode(Path(path.name.removesuffix(".gz")).stem)
    return to_unicode(found.folder.resolve().name)


def _open(found: Found, source: str, shown: str, options: SourceOptions) -> list[Part]:
    names_pictures = found.kind in (*_NAMING_PICTURES, REPOSITORY) or (found.kind == PICTURES and found.files)
    if not names_pictures:
        _refuse_pictures(shown, options)
    if found.kind == DATASET:
        return saved_dataset(found.folder, options, source)
    resolve = PictureFinder(*(folder for folder in (found.folder, options.pictures) if folder))
    if found.kind == REPOSITORY:
        return local_repository(found.folder, found.config, options, source, resolve)
    if options.split is not None or found.kind != PICTURES:
        found = choose_split(found, options.split)
    if found.kind == PICTURES and found.files:
        return [table_folder(found.folder, table, source, resolve) for table in found.files]
    if found.kind == PICTURES:
        pictures = picture_folder(found.folder, source, options.leave_out)
        if pictures is None:
            raise DataError(f"{shown}: nothing to read in it (a source is {KNOWN})")
        return [pictures]
    names = [(found.folder / file, to_unicode(file)) for file in found.files]
    if found.kind in _HOLDING_PICTURES:
        hold = _HOLDING_PICTURES[found.kind]
        return [Part(part, partial(hold, file, part, source)) for file, part in names]
    read = _NAMING_PICTURES[found.kind]
    return [Part(part, partial(read, file, part, source, resolve)) for file, part in names]


def _refuse_pictures(shown: str, options: SourceOptions) -> None:
    if options.pictures is not None:
        raise DataError(f"{shown}: holds its pictures itself, and names none by their paths; leave --pictures out")
