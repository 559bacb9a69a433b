"""Readers: they turn sources on disk, and datasets of the hub, into parts with rows in an order that never changes.

`fields` tells what kind of row the fields of a foreign row make; the other modules read one kind of file each.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from uni_x.data.readers.folders import TABLES, is_captioned, picture_folder
from uni_x.data.readers.hub import hub_dataset, saved_dataset
from uni_x.data.readers.lines import json_rows
from uni_x.data.readers.parquet import parquet_rows
from uni_x.data.readers.parts import to_unicode
from uni_x.data.readers.tables import table_rows
from uni_x.data.readers.tars import tar_rows
from uni_x.data.schema import Load, Part
from uni_x.data.shards import MANIFEST, read_manifest
from uni_x.errors import DataError

__all__ = ["KINDS", "open_source"]

KINDS = (
    "a folder of pictures with captions; a file, or a folder of files, of .jsonl, .json, .parquet, .tar or .tsv; "
    "a folder saved by the library datasets; or owner/name on the Hugging Face hub"
)

_Rows = Callable[[Path, str, str], Iterator[Load]]
# The first kind that a folder holds counts: tars may stand beside tables about them, any of them beside notes in JSON.
_FILES: tuple[tuple[re.Pattern[str], _Rows], ...] = (
    (re.compile(r".+\.tar", re.IGNORECASE), tar_rows),
    (re.compile(r".+\.parquet", re.IGNORECASE), parquet_rows),
    (re.compile(r"(.+\.tsv|part-[\w-]+)(\.gz)?", re.IGNORECASE), table_rows),
    (re.compile(r".+\.jsonl(\.gz)?", re.IGNORECASE), json_rows),
    (re.compile(r".+\.json(\.gz)?", re.IGNORECASE), json_rows),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def open_source(name: str, *, split: str = "train", streaming: bool = False) -> list[Part]:
    """The parts of a source: a file, a folder or a dataset of the hub, whose kind is told from what is there.

    Of a folder the files at its top are read, one part each, sorted by name; pictures are found in subfolders too.
    A row's own id is its id, also where a source uses it twice; a row without one has that of its part and number.
    `split` and `streaming` matter to Hugging Face's datasets alone.

    Raises `DataError` where nothing is there, nothing that can be read, or what `uni-x encode` wrote.
    """
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, split, streaming)
    if path.exists():
        return [_open_file(path)]
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return hub_dataset(name, split, streaming)
    raise DataError(f"{to_unicode(name)}: no such file or folder (a source is {KINDS})")


def _open_folder(folder: Path, split: str, streaming: bool) -> list[Part]:
    shown = to_unicode(str(folder))
    source = to_unicode(folder.resolve().name)
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file()}
    _refuse_encoded(folder)
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return saved_dataset(folder, split, streaming, source)
    has_captions = not names.isdisjoint(TABLES) or is_captioned(names)
    for pattern, rows in _FILES:
        found = sorted(name for name in names if pattern.fullmatch(name))
        if found and not (has_captions and rows is json_rows):
            return [_file_part(folder / file, rows, source) for file in found]
    pictures = picture_folder(folder, source)
    if pictures is None:
        raise DataError(f"{shown}: nothing to read in it (a source is {KINDS})")
    return [pictures]


def _open_file(path: Path) -> Part:
    if path.suffix == ".parquet":
        _refuse_encoded(path.parent)
    for pattern, rows in _FILES:
        if pattern.fullmatch(path.name):
            return _file_part(path, rows, to_unicode(Path(path.name.removesuffix(".gz")).stem))
    raise DataError(f"{to_unicode(str(path))}: no known kind of file (a source is {KINDS})")


def _file_part(path: Path, rows: _Rows, source: str) -> Part:
    part = to_unicode(path.name)
    return Part(part, partial(rows, path, part, source))


def _refuse_encoded(folder: Path) -> None:
    manifest = read_manifest(folder / MANIFEST)
    if manifest is not None and {"tokenizer", "codebook_size", "shard_size"} <= manifest.keys():
        raise DataError(f"{to_unicode(str(folder))}: encoded already, `uni-x encode` wrote it; train on it as it is")
