"""What files a source has, by their names, sizes and times, so that one that has changed since is noticed.

No file is opened. Pictures that the rows of a file name elsewhere are not counted.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uni_x.data.readers.folders import TABLES, directories
from uni_x.data.readers.kinds import DATASET, PICTURES, REPOSITORY, Found
from uni_x.pictures import is_picture_name
from uni_x.words import count_of

_CAPTION_SUFFIXES = (".txt", ".json")


@dataclass(frozen=True)
class Inventory:
    """How many files a source has, their bytes, and a digest of their names, sizes and times of change."""

    files: int
    bytes: int
    digest: str

    def changed_since(self, earlier: Inventory) -> str | None:
        """What has changed, in words; None where nothing has."""
        if self == earlier:
            return None
        if (self.files, self.bytes) == (earlier.files, earlier.bytes):
            return "files were renamed or written again"
        return f"{earlier} then, {self} now"

    def __str__(self) -> str:
        return f"{count_of(self.files, 'file')} of {count_of(self.bytes, 'byte')}"


def take_inventory(found: Found, leave_out: Path | None = None) -> Inventory:
    """Counts the files that a source on disk is read from, subfolders included where they are pictures.

    A folder to `leave_out` inside the source does not count.
    """
    files = total = 0
    digest = hashlib.sha256()
    for path, name in sorted(_files(found, leave_out), key=lambda file: file[1]):
        try:
            state = path.stat()
            if stat.S_ISDIR(state.st_mode):  # a link, which is a row that is rejected
                state = path.lstat()
        except OSError:  # a link to nowhere, whose row is rejected
            continue
        files += 1
        total += state.st_size
        digest.update(os.fsencode(f"{name}\0{state.st_size} {state.st_mtime_ns}\n"))
    return Inventory(files, total, digest.hexdigest())


def _files(found: Found, leave_out: Path | None) -> Iterator[tuple[Path, str]]:
    """The files, each with its path inside the source."""
    if found.kind not in (PICTURES, DATASET, REPOSITORY):
        yield from ((found.folder / file, file) for file in found.files)
        return
    for inside, names, links in directories(found.folder, leave_out):
        folder = found.folder / inside
        for name in [*names, *links]:
            if found.kind != PICTURES or name in found.files or name in links or _belongs_to_pictures(name):
                yield folder / name, (inside / name).as_posix()


def _belongs_to_pictures(name: str) -> bool:
    return is_picture_name(name) or (name not in TABLES and name.lower().endswith(_CAPTION_SUFFIXES))
