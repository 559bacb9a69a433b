"""Reads the objects of a picture back from its pixels: masks, colours and templates, nothing learned.

Everything is measured in *ink*, which is white minus the pixel, from 0 to 1. Ink is cut into connected blobs;
a blob as large as one object is compared with every object in every colour at the few places where it can
stand, a larger one is searched for objects that touch. The likeness of a picture x and a template t is
2<x, t> / (<x, x> + <t, t>), which is 1 for the same ink and falls with missing, added and wrongly coloured ink.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
from PIL import Image, ImageOps

from uni_x.errors import MissingExtraError
from uni_x.scenes.catalogue import COLOURS, KINDS
from uni_x.scenes.geometry import Box
from uni_x.scenes.pictures import TILE, tile
from uni_x.scenes.world import SIDE

LIKENESS = 0.9  # from here on it is an object; measured: objects blurred by a pixel 0.95, halves of objects 0.87
RELIEF = 0.75  # of an object's outline and inside; measured: objects blurred by a pixel 0.92, even surfaces 0.61
_PATIENCE = 3  # places of a large blob that may disappoint before it is given up
_COARSE_LIKENESS = 0.8  # from here on a place is looked at closely, as the template may be a pixel off
_SLACK = 0.1  # of an object's energy, see `_worst_half`
_INK = 0.25  # from here on a pixel is drawn on
_SPECK = 12  # pixels; a blob below is noise or a loose end
_BORDER = 20  # pixels of white around the picture, so that templates may hang over its edge
_OVERHANG = 12  # pixels that a template's margin may reach out of a blob
_REACH = 2  # pixels around a likely place that are searched
_FINE, _COARSE = 2, 4  # pixels pooled to one for comparing and for a first look
_SLAB = 2**18  # multiplications; OpenBLAS starts threads for more
_HALVES = (np.s_[:8], np.s_[8:], np.s_[:, :8], np.s_[:, 8:])  # of a window: upper, lower, left, right

Corner = tuple[int, int]  # row and column of a window's upper left pixel


@dataclass(frozen=True)
class Detection:
    """An object that was found; `score` is its likeness from 0 to 1, `box` is in pixels of a 128 x 128 picture."""

    object: str
    colour: str | None
    box: Box
    score: float


@dataclass(frozen=True)
class _Templates:
    """Every object in every colour as ink, `step` x `step` pixels pooled to one: `side` values a side."""

    kinds: list[tuple[str, str | None]]
    boxes: list[tuple[int, int, int, int]]  # of the ink, from the cell's corner, in pixels
    ink: np.ndarray  # (templates, side, side, 3)
    columns: np.ndarray  # (side * side * 3, templates), the same
    energy: np.ndarray  # (templates,)
    silhouettes: np.ndarray  # (templates, side, side), 1 on the object and next to it
    silhouette_columns: np.ndarray  # (side * side, templates), the same


def read_picture(image: Image.Image) -> list[Detection]:
    """The objects in a picture, the most certain first.

    Objects are found anywhere where they do not overlap, at the size in which scenes draw them; a picture of
    another size is padded to a square and resized to 128 x 128 first. What is like no object is left out.

    Raises:
        MissingExtraError: scipy, or what renders the templates, is not installed.
    """
    ndimage = _ndimage()
    ink = _pool(_ink(image), _FINE)
    drawn = np.maximum(np.maximum(ink[..., 0], ink[..., 1]), ink[..., 2]) > _INK
    drawn[:, 1:] |= drawn[:, :-1].copy()  # bridges a pixel, so that thin lines do not break
    drawn[1:] |= drawn[:-1].copy()
    labels, _ = ndimage.label(drawn, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    labels[sizes[labels] < _SPECK] = 0
    found: list[Detection] = []
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is None:
            continue
        if max(part.stop - part.start for part in place) <= TILE + 1:
            found += _read_blob(ink, labels, label, place)
        else:
            found += _search(np.where((labels == label)[..., None], ink, 0), place)
    return sorted(found, key=lambda detection: -detection.score)


def _read_blob(ink: np.ndarray, labels: np.ndarray, label: int, place: tuple[slice, slice]) -> list[Detection]:
    """The object that a blob is, if any; ink of other blobs does not count."""
    side = TILE + 2 * _REACH
    top, left = ((part.start + part.stop - 2 - side) // 2 for part in place)
    near = labels[top : top + side, left : left + side]
    crop = np.where(((near == 0) | (near == label))[..., None], ink[top : top + side, left : left + side], 0)
    corners = [(y, x) for y in range(2 * _REACH + 1) for x in range(2 * _REACH + 1)]
    windows = _windows(crop, corners, _FINE)
    flat = windows.reshape(len(windows), -1)
    energy = (flat * flat).sum(axis=1)
    best, template, likeness = _best(_likeness(flat, energy[:, None], _templates(_FINE)))
    y, x = corners[best]
    return _detections(windows[best], template, likeness, (top + y, left + x))


def _search(ink: np.ndarray, place: tuple[slice, slice]) -> list[Detection]:
    """Takes objects out of a blob that is larger than one, the likest first, until what is left is like none."""
    rows, columns = (np.arange(part.start - _OVERHANG, part.stop - TILE + _OVERHANG + 1, 2) for part in place)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)  # (places, row and column)
    peaks = np.zeros(len(grid))
    changed = np.ones(len(grid), dtype=bool)
    found: list[Detection] = []
    failures = 0
    while failures < _PATIENCE and changed.any():
        pooled = _pool(ink, _COARSE // _FINE, _FINE)
        peaks[changed] = _likeness_inside(pooled, grid[changed].tolist(), _COARSE).max(axis=1)
        if peaks.max() < _COARSE_LIKENESS:
            break
        y, x = grid[peaks.argmax()].tolist()
        corners = [(y + dy, x + dx) for dy in range(-_REACH, _REACH + 1) for dx in range(-_REACH, _REACH + 1)]
        best, template, likeness = _best(_likeness_inside(ink, corners, _FINE))
        y, x = corners[best]
        silhouette = _templates(_FINE).silhouettes[template][..., None]
        window = ink[y : y + TILE : _FINE, x : x + TILE : _FINE] * silhouette
        detections = _detections(window, template, likeness, (y, x))
        found += detections
        failures += not detections
        ink[y : y + TILE, x : x + TILE] *= 1 - silhouette.repeat(_FINE, axis=0).repeat(_FINE, axis=1)
        changed = (np.abs(grid - (y, x)) < TILE + _REACH).all(axis=1)
    return found


def _detections(window: np.ndarray, template: int, likeness: float, corner: Corner) -> list[Detection]:
    score = min(likeness, _worst_half(window, template))
    if score < LIKENESS or _relief(window, template) < RELIEF:
        return []
    templates = _templates(_FINE)
    top, left = (part - _BORDER for part in corner)
    x0, y0, x1, y1 = templates.boxes[template]
    return [Detection(*templates.kinds[template], (left + x0, top + y0, left + x1, top + y1), score)]


def _relief(window: np.ndarray, template: int) -> float:
    """The correlation on and next to the object: an even surface is like many a template, but has no outline."""
    templates = _templates(_FINE)
    inside = templates.silhouettes[template] > 0
    x, t = window[inside], templates.ink[template][inside]  # (values, 3)
    x, t = (x - x.mean(axis=0)).ravel(), (t - t.mean(axis=0)).ravel()
    return float(x @ t / np.sqrt((x @ x) * (t @ t) + 1e-9))


def _windows(ink: np.ndarray, corners: list[Corner], step: int) -> np.ndarray:
    """(corners, side, side, 3), of ink pooled by `step`: every `step`-th value, which covers each pixel once."""
    return np.stack([ink[y : y + TILE : step, x : x + TILE : step] for y, x in corners])


def _likeness_inside(ink: np.ndarray, corners: list[Corner], step: int) -> np.ndarray:
    """(corners, templates), where only the ink inside a template's silhouette counts."""
    templates = _templates(step)
    windows = _windows(ink, corners, step)
    energy = (windows * windows).sum(axis=3).reshape(len(windows), -1)
    return _likeness(windows.reshape(len(windows), -1), _product(energy, templates.silhouette_columns), templates)


def _likeness(windows: np.ndarray, energy: np.ndarray, templates: _Templates) -> np.ndarray:
    """(windows, templates), from flat windows and their energy for all or for each template."""
    return 2 * _product(windows, templates.columns) / (energy + templates.energy)


def _best(likeness: np.ndarray) -> tuple[int, int, float]:
    """The window and the template that are likest, and how like they are."""
    window, template = divmod(int(likeness.argmax()), likeness.shape[1])
    return window, template, float(likeness[window, template])


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ right` in slabs for which BLAS starts no threads: on a busy machine they cost ten times the product."""
    rows = max(1, _SLAB // right.size)
    return np.concatenate([left[start : start + rows] @ right for start in range(0, len(left), rows)])


def _worst_half(window: np.ndarray, template: int) -> float:
    """The lowest likeness of the upper, lower, left and right half, which half an object does not pass.

    A half with little ink (the string of a balloon) is let off lightly, as blur takes most of it.
    """
    wanted, energy = _templates(_FINE).ink[template], float(_templates(_FINE).energy[template])
    scores = []
    for half in _HALVES:
        x, t = window[half].ravel(), wanted[half].ravel()
        scores.append((2 * (x @ t) + _SLACK * energy) / (x @ x + t @ t + _SLACK * energy))
    return float(min(scores))


def _ink(image: Image.Image) -> np.ndarray:
    """(168, 168, 3) with a white border."""
    if image.mode != "RGB":
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.size != (SIDE, SIDE):
        image = ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.BICUBIC, color="white")
    ink = np.zeros((SIDE + 2 * _BORDER, SIDE + 2 * _BORDER, 3), dtype=np.float32)
    ink[_BORDER:-_BORDER, _BORDER:-_BORDER] = (255 - np.asarray(image, dtype=np.float32)) / 255
    return ink


def _pool(ink: np.ndarray, times: int, apart: int = 1) -> np.ndarray:
    """Each value the mean of `times` x `times` values from there on, which lie `apart`; `times` is a power of two."""
    if times == 1:
        return ink
    rows = ink[:-apart] + ink[apart:]
    return _pool((rows[:, :-apart] + rows[:, apart:]) / 4, times // 2, 2 * apart)


@lru_cache(maxsize=2)
def _templates(step: int) -> _Templates:
    ndimage = _ndimage()
    kinds = [(name, colour) for name, kind in KINDS.items() for colour in (COLOURS if kind.colourable else (None,))]
    tiles = np.stack([(255 - tile(*kind).astype(np.float32)) / 255 for kind in kinds])
    extents = [ndimage.find_objects((ink.max(axis=2) > 0.02).astype(int))[0] for ink in tiles]
    side = TILE // step
    ink = tiles.reshape(len(kinds), side, step, side, step, 3).mean(axis=(2, 4))
    masks = ink.max(axis=3) > _INK
    silhouettes = np.stack([ndimage.binary_dilation(ndimage.binary_fill_holes(mask)) for mask in masks])
    flat, flat_silhouettes = (part.reshape(len(kinds), -1).astype(np.float32) for part in (ink, silhouettes))
    return _Templates(
        kinds=kinds,
        boxes=[(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in extents],
        ink=ink,
        columns=np.ascontiguousarray(flat.T),
        energy=(flat * flat).sum(axis=1),
        silhouettes=silhouettes.astype(np.float32),
        silhouette_columns=np.ascontiguousarray(flat_silhouettes.T),
    )


def _ndimage() -> ModuleType:
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtraError("scipy", "quickstart") from None
    return ndimage
