"""What all readers share: how a broken part ends, what an id looks like, and which files a row may name."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PureWindowsPath

from uni_x.data.schema import Load, Rejection
from uni_x.errors import DataError


def reject_rest(part: str, loads: Iterator[Load]) -> Iterator[Load]:
    """Gives `loads`, and where reading them fails, one `Rejection` for all that could not be read."""
    try:
        yield from loads
    except (DataError, OSError) as error:
        yield partial(Rejection, f"{part}:rest", f"the rest of {part} is lost: {describe(error)}")


def describe(error: DataError | OSError) -> str:
    """The error in a line, without the paths that the system puts into it."""
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()))


def to_unicode(name: str) -> str:
    """A name that need not be valid Unicode, as file names and JSON strings, as an id or a reason that is."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def file_inside(folder: Path, name: str) -> Path:
    """The file that a row calls `name`, which must be there and, by its name, inside `folder`.

    Raises `DataError` for what is missing, absolute or leads out of the folder.
    """
    shown = to_unicode(name if len(name) <= 200 else f"{name[:200]}…")
    windows = PureWindowsPath(name)  # takes both kinds of slash
    if windows.drive or windows.root or ".." in windows.parts:
        raise DataError(f"the file name leads out of the folder: {shown}")
    path = folder / name
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        found = False
    if not found:
        raise DataError(f"the picture is missing: {shown}")
    return path
