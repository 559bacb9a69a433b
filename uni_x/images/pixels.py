"""Pictures to pixels and back: orientation, transparency, size, and the range [-1, 1].

A picture is a PIL image of any mode, or a uint8 array `(height, width, 3)`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from uni_x.errors import DataError
from uni_x.pictures import open_picture

Picture = Image.Image | np.ndarray

LARGEST_SIDE_RATIO = 100
_STRIP_PIXELS = 2**18  # blended at once, in floats of eight bytes


def preprocess(pictures: Sequence[Picture], resolution: int) -> torch.Tensor:
    """Makes square RGB pictures of `resolution` pixels out of any pictures: `(n, 3, resolution, resolution)`, float32.

    Turned upright by its EXIF tag, transparency laid on white, the short side resized (Lanczos) to `resolution`, the
    centre cropped, bytes mapped to [-1, 1]. Raises `DataError` for a picture that cannot be read.
    """
    if not pictures:
        return torch.empty(0, 3, resolution, resolution)
    squares = np.empty((len(pictures), resolution, resolution, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        try:
            squares[index] = square(picture, resolution)
        except DataError as error:
            raise DataError(f"picture {index + 1} of {len(pictures)}: {error}") from None
    return bytes_to_pixels(torch.from_numpy(squares))


def square(picture: Picture, resolution: int) -> np.ndarray:
    """One picture as upright RGB bytes `(resolution, resolution, 3)`, resized by its short side, centre cropped."""
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise DataError(
                f"an array of a picture is uint8 of shape (height, width, 3), this one is {picture.dtype} "
                f"of shape {picture.shape}"
            )
        if picture.shape[:2] == (resolution, resolution):
            return picture
        picture = Image.fromarray(picture)
    try:
        picture = on_white(open_picture(picture))
    except ValueError as error:  # a DataError, or of a mode that cannot be made RGB
        name = getattr(picture, "filename", "")
        raise DataError(f"{name}: {error}" if name else str(error)) from None
    if picture.size == (resolution, resolution):
        return np.asarray(picture)
    return np.asarray(_resize_and_crop(picture, resolution))


def on_white(picture: Image.Image) -> Image.Image:
    """An RGB picture in which transparency shows white.

    Blended in floats and cut to a byte, not rounded, as Chameleon's tokenizer does.
    """
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL would clip to its lowest byte
        picture = Image.fromarray((np.clip(np.asarray(picture), 0, 65535) // 257).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB") if picture.mode != "RGB" else picture
    blended = Image.new("RGB", picture.size)
    rows = max(1, _STRIP_PIXELS // max(1, picture.width))
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        blended.paste(_blend_on_white(strip.convert("RGBA")), (0, top))
    return blended


def _blend_on_white(picture: Image.Image) -> Image.Image:
    if picture.getchannel("A").getextrema() == (255, 255):
        return picture.convert("RGB")
    layers = np.asarray(picture)  # (height, width, 4)
    alpha = layers[..., 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * layers[..., :3]).astype(np.uint8))


def bytes_to_pixels(squares: torch.Tensor) -> torch.Tensor:
    """Bytes `(n, height, width, 3)` to pixels `(n, 3, height, width)`, float32 in [-1, 1]."""
    return squares.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def pixels_to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """Pixels `(n, 3, height, width)` in [-1, 1], clipped where they leave it, to bytes `(n, height, width, 3)`."""
    scaled = pixels.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def pixels_to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Pixels `(n, 3, height, width)` in [-1, 1] to RGB pictures."""
    return [Image.fromarray(picture) for picture in pixels_to_bytes(pixels)]


def comparison(originals: torch.Tensor, reconstructions: torch.Tensor, columns: int = 8) -> Image.Image:
    """One picture with originals above their reconstructions, both `(n, 3, height, width)` in [-1, 1]."""
    gap = 4
    count, _, height, width = originals.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (2 * height + 3 * gap)), (128, 128, 128))
    pairs = zip(pixels_to_pictures(originals), pixels_to_pictures(reconstructions), strict=True)
    for index, (original, reconstruction) in enumerate(pairs):
        left = gap + index % columns * (width + gap)
        top = gap + index // columns * (2 * height + 3 * gap)
        sheet.paste(original, (left, top))
        sheet.paste(reconstruction, (left, top + height + gap))
    return sheet


def _resize_and_crop(picture: Image.Image, resolution: int) -> Image.Image:
    short, long = sorted(picture.size)
    if short == 0 or long > LARGEST_SIDE_RATIO * short:
        raise DataError(f"a picture of {picture.width} x {picture.height} pixels is too narrow to be made square")
    scale = resolution / short
    picture = picture.resize(
        (round(scale * picture.width), round(scale * picture.height)), resample=Image.Resampling.LANCZOS
    )
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    return picture.crop((left, top, left + resolution, top + resolution))
