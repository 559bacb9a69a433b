"""Opens a picture of a known format, or says in one line why it cannot be used."""

import io
import os
import stat
from pathlib import Path
from typing import TypeAlias

from PIL import ExifTags, Image, ImageOps

from uni_x.errors import DataError, one_line

Picture: TypeAlias = Image.Image | bytes | Path
"""A picture before encoding: decoded, the bytes of an image file, or the path of one."""

EMPTY_PICTURE = "the picture is empty"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is read, in Pillow's names. Others of its plugins run outside programs, or are little used."""

PICTURE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
UNREAD_SUFFIXES = frozenset({".eps", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".psd", ".svg", ".tga"})
"""Names of pictures whose formats are not read: they are refused where they turn up, not passed over."""


def is_picture_name(name: str) -> bool:
    """Whether a file is named like a picture, of a format that is read or not."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES | UNREAD_SUFFIXES


def open_picture(picture: Picture) -> Image.Image:
    """Decodes a picture and turns it upright by its EXIF orientation; its mode is left as it is.

    Of an animation the first frame is taken. The format is told from the content, not from the file's name; it is one
    of `FORMATS`. Raises `DataError` with the reason for what is empty, truncated, corrupt, no picture, of
    floating-point pixels (whose range is unknown), no plain file, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        image = _upright(picture if isinstance(picture, Image.Image) else _decode(picture))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise _too_large() from None
    except Image.UnidentifiedImageError:
        if _is_empty(picture):
            raise DataError(EMPTY_PICTURE) from None
        raise DataError(f"the file is no picture of a format that is read ({', '.join(FORMATS)})") from None
    # Pillow's plugins raise nearly anything on corrupt data: struct.error, zlib.error, SyntaxError, IndexError ...
    except Exception as error:
        detail = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"the picture cannot be read ({detail})") from None
    if image.mode == "F":
        raise DataError("the picture has floating-point pixels, whose range is unknown")
    return image


def _is_empty(picture: Picture) -> bool:
    return picture.stat().st_size == 0 if isinstance(picture, Path) else picture == b""


def _decode(picture: bytes | Path) -> Image.Image:
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without AVIF
    if isinstance(picture, Path):
        check_plain_file(picture)
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=formats) as image:
        # Up to twice its limit Pillow only warns.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise _too_large()
        image.load()
        return image


def _too_large() -> DataError:
    return DataError(f"the picture has more than {Image.MAX_IMAGE_PIXELS:,} pixels")


def check_plain_file(path: Path) -> None:
    """Raises `DataError` for a directory and for what would be waited for without end, such as a named pipe."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"no plain file: {path.name}")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image
