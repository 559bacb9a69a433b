"""Scenes: which object stands in which cell, and the picture of it.

A picture is 128 x 128 pixels on white, a lattice of 4 x 4 cells; an object fills a cell's middle and a cell
holds one object at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from uni_x.errors import InputError
from uni_x.scenes.geometry import Box
from uni_x.scenes.pictures import OBJECT, TILE, tile

CELLS = 4  # to a side
SIDE = CELLS * TILE  # pixels


@dataclass(frozen=True)
class Thing:
    """An object in a cell; `colour` is None for an object with a natural look, row 0 is the top."""

    object: str
    colour: str | None
    row: int
    column: int

    @property
    def box(self) -> Box:
        """The square in which it is drawn: left, top, right, bottom in pixels."""
        margin = (TILE - OBJECT) / 2
        left, top = self.column * TILE + margin, self.row * TILE + margin
        return left, top, left + OBJECT, top + OBJECT


@dataclass(frozen=True)
class Scene:
    """Things in distinct cells of the lattice.

    Raises:
        InputError: two things in one cell, or a cell outside the lattice.
    """

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = {(thing.row, thing.column) for thing in self.things}
        if len(cells) < len(self.things) or any(not (0 <= r < CELLS and 0 <= c < CELLS) for r, c in cells):
            raise InputError(f"a scene wants its things in distinct cells of rows and columns 0 to {CELLS - 1}: {self}")

    @property
    def objects(self) -> tuple[str, ...]:
        """The distinct objects, in the order of the things."""
        return tuple(dict.fromkeys(thing.object for thing in self.things))

    def all_of(self, name: str) -> list[Thing]:
        """The things that are that object."""
        return [thing for thing in self.things if thing.object == name]


@dataclass(frozen=True)
class Placement:
    """A cell's square drawn anywhere in a picture; `left` and `top` are its corner in pixels."""

    object: str
    colour: str | None
    left: int
    top: int


def compose(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 128 x 128 pixels."""
    return compose_placements(
        Placement(thing.object, thing.colour, thing.column * TILE, thing.row * TILE) for thing in scene.things
    )


def compose_placements(placements: Iterable[Placement]) -> Image.Image:
    """A picture with objects off the lattice: RGB, 128 x 128 pixels.

    Squares may overlap in their white margins, and what lies outside the picture is cut.
    """
    canvas = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    for placed in placements:
        left, top = max(placed.left, 0), max(placed.top, 0)
        target = canvas[top : max(placed.top + TILE, 0), left : max(placed.left + TILE, 0)]
        source = tile(placed.object, placed.colour)[top - placed.top :, left - placed.left :]
        np.minimum(target, source[: target.shape[0], : target.shape[1]], out=target)
    return Image.fromarray(canvas)
