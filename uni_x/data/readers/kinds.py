"""Which kind of source a file or a folder is, told by the names of the files; what is not clear is asked for."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from uni_x.data.readers.folders import TABLES, directories, has_captions, picture_stems
from uni_x.data.readers.parts import to_unicode
from uni_x.data.shards import MANIFEST, read_manifest
from uni_x.errors import DataError

PICTURES, DATASET, REPOSITORY = "pictures", "dataset", "repository"
KNOWN = (
    "a folder of pictures with captions; a file, or a folder of files, of .jsonl, .json, .parquet, .tar or .tsv; "
    "a folder saved by the library datasets; or a dataset of the Hugging Face hub, by its id or cloned"
)

_FILES = {
    "tar": re.compile(r".+\.tar", re.IGNORECASE),
    "parquet": re.compile(r".+\.parquet", re.IGNORECASE),
    "tsv": re.compile(r"(.+\.tsv|part-[\w-]+)(\.gz)?", re.IGNORECASE),
    "jsonl": re.compile(r".+\.jsonl(\.gz)?", re.IGNORECASE),
    "json": re.compile(r".+\.json(\.gz)?", re.IGNORECASE),
}
_PACKED_TAR = re.compile(r".+\.(?:tar\.|t)(gz|bz2|xz|zst)", re.IGNORECASE)
_UNPACKERS = {"gz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}
_DATASET_NOTES = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_CARD, _CARD_LIMIT = "README.md", 2**20
_CARD_WITH_CONFIGS = re.compile(r"---\s*\n(?:(?!---\s*\n).*\n)*?configs:")
_SPLIT_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-\w+)?\.\w+(\.gz)?")
_SPLIT_WORD = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![^\W_\d])")


@dataclass(frozen=True)
class Found:
    """Files of one kind.

    `folder` holds them; `files` are those to read, by their names: none for a data set or a repository of one, a table
    of captions or none for pictures. `config` is the chosen configuration of a repository.
    """

    kind: str
    folder: Path
    files: tuple[str, ...] = ()
    config: str = ""

    def __str__(self) -> str:
        if self.kind == PICTURES:
            return "pictures with captions"
        return "a saved data set" if self.kind == DATASET else f"{self.kind} files such as {to_unicode(self.files[0])}"


def find_on_disk(name: str, kind: str | None = None, leave_out: Path | None = None) -> Found | None:
    """What a file, a folder or `DIR:config` is, as `kind_of_file` and `kind_of_folder` tell; None where none is there.

    Raises `DataError` as they do, for what `uni-x encode` wrote, and for a `kind` that is wanted of another thing than
    a folder.
    """
    path = Path(name)
    _refuse_encoded(path.parent if path.suffix == ".parquet" and path.is_file() else path)
    if path.is_dir():
        return kind_of_folder(path, kind, leave_out)
    if kind is not None:
        raise DataError(f"{to_unicode(name)}: no folder, and --kind chooses among the files of one; leave it out")
    if path.exists():
        return kind_of_file(path)
    folder, _, config = name.rpartition(":")
    return Found(REPOSITORY, Path(folder), config=config) if folder and Path(folder).is_dir() else None


def _refuse_encoded(folder: Path) -> None:
    manifest = read_manifest(folder / MANIFEST)
    if manifest is not None and {"tokenizer", "codebook_size", "shard_size"} <= manifest.keys():
        raise DataError(f"{to_unicode(str(folder))}: encoded already, `uni-x encode` wrote it; train on it as it is")


def kind_of_file(path: Path) -> Found:
    """The kind of a file by its name. Raises `DataError` where it is none."""
    if path.name in TABLES:
        return Found(PICTURES, path.parent, (path.name,))
    _refuse_packed_tars(path.parent, [path.name])
    for kind, pattern in _FILES.items():
        if pattern.fullmatch(path.name):
            return Found(kind, path.parent, (path.name,))
    raise DataError(f"{to_unicode(str(path))}: no known kind of file (a source is {KNOWN})")


def is_file_name(name: str) -> bool:
    """Whether a name is that of a kind of file, there or not."""
    return any(pattern.fullmatch(Path(name).name) for pattern in (*_FILES.values(), _PACKED_TAR))


def choose_split(found: Found, split: str | None) -> Found:
    """The files of one split, where their names tell splits apart, as `train-00000-of-00002.parquet` or `test.jsonl`.

    Raises `DataError` where there are several and none is chosen, or not the one that is.
    """
    splits = {name: _split_of(name) for name in found.files}
    known = sorted({each for each in splits.values() if each})
    shown = to_unicode(str(found.folder))
    if split is None:
        if len(known) > 1 and any(map(_SPLIT_WORD.match, known)):
            raise DataError(f"{shown}: holds several splits; choose one with --split {' or '.join(known)}")
        return found
    if not known:
        raise DataError(f"{shown}: has no splits, by the names of its files; leave --split out")
    if split not in known:
        raise DataError(f"{shown}: no split {split!r} in it; it has {', '.join(known)}")
    return Found(found.kind, found.folder, tuple(name for name, each in splits.items() if each == split))


def _split_of(name: str) -> str | None:
    name = to_unicode(name)
    found = _SPLIT_SHARD.fullmatch(name) or _SPLIT_WORD.match(name)
    return found[1] if found else None


def kind_of_folder(folder: Path, wanted: str | None, leave_out: Path | None = None) -> Found:
    """The kind of source that a folder is, or the one that is `wanted` of several.

    A repository of a dataset has a card that tells its configurations, and no tars, or nothing but splits in `data`.
    Otherwise files count at the folder's top. Pictures count in subfolders too, but beside other files only where one
    has a caption, as those of rows have none; one folder may be left out. Notes are no source: those of the library
    datasets, and what is named after a tar.

    Raises `DataError` where nothing is there, more than one kind, nothing that is wanted, or a packed tar.
    """
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file()}
    found = [Found(kind, folder, files) for kind, files in _files_by_kind(names).items() if files]
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        found.append(Found(DATASET, folder))
    if wanted is None and _is_repository(folder, names, found):
        return Found(REPOSITORY, folder)
    if wanted in (None, "tar"):
        _refuse_packed_tars(folder, sorted(names))
    if wanted is not None:
        found = [Found(PICTURES, folder)] if wanted == PICTURES else [each for each in found if each.kind == wanted]
    elif not found or _is_captioned(folder, names, leave_out):
        found.append(Found(PICTURES, folder))
    shown = to_unicode(str(folder))
    if not found:
        raise DataError(f"{shown}: no source of the kind {wanted} in it")
    if len(found) > 1:
        kinds = " or ".join(each.kind for each in found)
        raise DataError(
            f"{shown}: holds several kinds of source: {', '.join(map(str, found))}; choose one with --kind {kinds}, "
            "or name a single file"
        )
    return _with_table(found[0], names) if found[0].kind == PICTURES else found[0]


def _refuse_packed_tars(folder: Path, names: Iterable[str]) -> None:
    """Raises `DataError` with the mend: to pass over rows, as processes that share them do, all would be unpacked."""
    for name in names:
        if packed := _PACKED_TAR.fullmatch(name):
            path = to_unicode(str(folder / name))
            raise DataError(f"{path}: only plain tars are read; unpack it first ({_UNPACKERS[packed[1].lower()]})")


def _is_repository(folder: Path, names: set[str], found: Iterable[Found]) -> bool:
    if not found:
        return _has_configs(folder, names) or _has_splits(folder / "data")
    # Tars are read as they are, also the fields of their JSON, which the library gives as one column.
    return _has_configs(folder, names) and all(each.kind != "tar" for each in found)


def _has_configs(folder: Path, names: set[str]) -> bool:
    if _CARD not in names:
        return False
    with (folder / _CARD).open(encoding="utf-8", errors="replace") as card:
        return _CARD_WITH_CONFIGS.match(card.read(_CARD_LIMIT)) is not None


def _has_splits(data: Path) -> bool:
    return data.is_dir() and any(path.suffix == ".parquet" and _split_of(path.name) for path in data.iterdir())


def _files_by_kind(names: set[str]) -> dict[str, tuple[str, ...]]:
    rest = names - set(TABLES) - _DATASET_NOTES
    files: dict[str, list[str]] = {}
    for kind, pattern in _FILES.items():
        files[kind] = sorted(name for name in rest if pattern.fullmatch(name))
        rest -= set(files[kind])
    about_tars = tuple(f"{name[:-4]}{mark}" for name in files["tar"] for mark in "._")
    if not picture_stems(names).isdisjoint(os.path.splitext(name)[0] for name in files["json"]):
        files["json"] = []  # they are captions
    return {
        kind: tuple(name for name in found if kind == "tar" or not name.startswith(about_tars))
        for kind, found in files.items()
    }


def _is_captioned(folder: Path, names: Iterable[str], leave_out: Path | None) -> bool:
    return not set(TABLES).isdisjoint(names) or any(
        has_captions(files) for _, files, _ in directories(folder, leave_out)
    )


def _with_table(found: Found, names: Iterable[str]) -> Found:
    tables = tuple(name for name in TABLES if name in set(names))
    if len(tables) > 1:
        raise DataError(
            f"{to_unicode(str(found.folder))}: holds several tables of captions: {', '.join(tables)}; "
            "name the one that counts"
        )
    return Found(PICTURES, found.folder, tables)
