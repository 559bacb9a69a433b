"""A folder of pictures as a sequence, in the order of their names."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from PIL import Image

from uni_x.errors import DataError
from uni_x.pictures import PICTURE_SUFFIXES, is_picture_name, open_picture


class PictureFolder(Sequence[Image.Image]):
    """The readable pictures below a folder; each is opened anew when asked for.

    Every file is decoded once at the start, so that a broken one turns up here and not in the middle of a run.

    Attributes:
        paths: the readable pictures, sorted.
        unreadable: the others, each with the reason; those of formats that are not read (.heic, .svg) are among them.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        """Looks through `folder` and its subfolders for at most `limit` readable pictures.

        Raises `DataError` where there is no such folder or no readable picture in it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of pictures")
        self.paths: list[Path] = []
        self.unreadable: list[tuple[Path, str]] = []
        for path in sorted(path for path in folder.rglob("*") if _is_picture(path)):
            if limit is not None and len(self.paths) >= limit:
                break
            try:
                open_picture(path)
            except DataError as error:
                self.unreadable.append((path, str(error)))
            else:
                self.paths.append(path)
        if not self.paths:
            if self.unreadable:
                raise DataError(f"{folder}: no readable picture in it; {': '.join(map(str, self.unreadable[0]))}")
            raise DataError(f"{folder}: no pictures in it (looked for {', '.join(sorted(PICTURE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [_open(path) for path in self.paths[index]]
        return _open(self.paths[index])


def _is_picture(path: Path) -> bool:
    return is_picture_name(path.name) and not path.name.startswith(".")


def _open(path: Path) -> Image.Image:
    try:
        return open_picture(path)
    except DataError as error:
        raise DataError(f"{path}: was readable before, and is not now: {error}") from None
