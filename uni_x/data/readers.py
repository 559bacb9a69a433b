"""Readers: functions that turn a source on disk into source rows, in an order that never changes."""

import os
from collections.abc import Iterator
from pathlib import Path

from uni_x.data.schema import Rejection, SourceRow
from uni_x.errors import DataError
from uni_x.pictures import PICTURE_SUFFIXES


def read_picture_folder(folder: str | Path, source: str | None = None) -> Iterator[SourceRow | Rejection]:
    """Reads pictures with their captions: `cat.jpg` beside `cat.txt` (UTF-8), subfolders included, sorted by path.

    A row's id is the picture's path inside the folder. `source` names the rows' origin, by default the folder's name.
    A picture without a caption is given as a `Rejection`. Raises `DataError` where the folder is missing or has no
    pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    pictures = _find_pictures(folder)
    if not pictures:
        raise DataError(f"{folder}: no pictures in it (known suffixes: {' '.join(sorted(PICTURE_SUFFIXES))})")
    return _caption_rows(folder, pictures, source or folder.resolve().name)


def _find_pictures(folder: Path) -> list[Path]:
    found = []
    for directory, subfolders, names in os.walk(folder):
        # Hidden files are litter of file managers, such as the "._cat.jpg" of macOS.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(directory, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _caption_rows(folder: Path, pictures: list[Path], source: str) -> Iterator[SourceRow | Rejection]:
    for picture in pictures:
        # File names need not be valid Unicode, ids must be.
        row_id = picture.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
        try:
            caption = _read_caption(picture.with_suffix(".txt"))
        except DataError as error:
            yield Rejection(row_id, str(error))
        else:
            yield SourceRow(row_id, images=(picture,), caption=caption, source=source)


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
