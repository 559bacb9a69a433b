"""What all readers share: what a user says of a source, how a broken part ends, and which files a row may name."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from uni_x.data.schema import Load, Rejection
from uni_x.errors import DataError, one_line

Resolve: TypeAlias = Callable[[str], Path]
"""Finds the file that a row names; raises `DataError` where it is missing or must not be read."""


@dataclass(frozen=True)
class SourceOptions:
    """What may be said of a source beside its name.

    Attributes:
        split: of a data set with several; None for `train`, and for a data set without splits.
        streaming: read a data set of the hub without downloading it first.
        kind: which files of a folder that holds several kinds of them.
        pictures: a folder for the pictures that rows name, beside that of the file which names them.
        leave_out: a folder inside the source that is none of it, as that of its codes.
    """

    split: str | None = None
    streaming: bool = False
    kind: str | None = None
    pictures: Path | None = None
    leave_out: Path | None = None


class PictureFinder:
    """Finds the pictures that rows name, which must lie in one of a few folders, symbolic links followed."""

    def __init__(self, *folders: Path):
        self._folders = folders
        self._real_folders = [os.path.realpath(folder) for folder in folders]

    def __call__(self, name: str) -> Path:
        """Names that are not absolute are looked for in each folder in turn.

        Raises `DataError` for what is missing or lies elsewhere.
        """
        shown = to_unicode(name if len(name) <= 200 else f"{name[:200]}…")
        inside = [path for folder in self._folders if self._is_inside(path := folder / name)]
        if not inside:
            raise DataError(
                f"the picture is outside the folder of the file that names it (--pictures allows another): {shown}"
            )
        there = [path for path in inside if _exists(path)]
        if not there:
            raise DataError(f"the picture is missing: {shown}")
        return next((path for path in there if path.is_file()), there[0])

    def _is_inside(self, path: Path) -> bool:
        try:
            real = Path(os.path.realpath(path))
        except ValueError:  # a zero byte, with which no file has a name
            return True
        return any(real.is_relative_to(folder) for folder in self._real_folders)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def reject_rest(part: str, loads: Iterator[Load]) -> Iterator[Load]:
    """Gives `loads`, and where reading them fails, one `Rejection` for all that could not be read."""
    count = 0
    try:
        for load in loads:
            yield load
            count += 1
    except (DataError, OSError) as error:
        reason = f"the rest of {part} is lost, from row {count + 1} on: {describe(error)}"
        yield partial(Rejection, f"{part}:rest", reason)


def describe(error: DataError | OSError) -> str:
    """The error in a line, without the paths that the system puts into it."""
    return str(getattr(error, "strerror", None) or one_line(error))


def to_unicode(name: str) -> str:
    """A name that need not be valid Unicode, as file names and JSON strings, as an id or a reason that is."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
