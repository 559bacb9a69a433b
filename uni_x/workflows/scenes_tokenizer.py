"""The pictures that the scenes' image tokenizer learns from, and how well scenes survive it.

`uni-x tokenizer train recipes/scenes-tokenizer.yaml` makes the tokenizer that comes with the package, and
`measure_scenes_tokenizer` the figures of the `quality.json` beside it. To do both and put the result into the package:
`python -m uni_x.workflows.scenes_tokenizer recipes/scenes-tokenizer.yaml runs/scenes-tokenizer`.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from uni_x.images.tokenizer import ImageTokenizer, scenes_tokenizer_folder
from uni_x.images.training import (
    TOKENIZER_FOLDER,
    Progress,
    TokenizerResult,
    measure_quality,
    train_tokenizer,
)
from uni_x.recipe import TokenizerRecipe, load_recipe
from uni_x.scenes.catalogue import COLOURS, KINDS
from uni_x.scenes.pictures import ATTRIBUTION, TILE, named_pictures, tile
from uni_x.scenes.scorer import Detection, read_picture
from uni_x.scenes.world import CELLS, SIDE, Placement, Scene, Thing, compose, compose_placements

LOOKS: tuple[tuple[str, str | None], ...] = tuple(
    (name, colour) for name, kind in KINDS.items() for colour in (COLOURS if kind.colourable else (None,))
)
"""Every object in every colour, held-out combinations too: a tokenizer knows how things look, not which go together."""


class ScenePictures(Sequence[Image.Image]):
    """Random scenes as pictures, each made when asked for; the same seed gives the same pictures."""

    def __init__(self, size: int, seed: int, things: tuple[int, int] = (1, 6), off_lattice: bool = False):
        """`size` scenes of `things` objects (from, to), in the cells of the lattice or anywhere."""
        self.size = size
        self.seed = seed
        self.things = things
        self.off_lattice = off_lattice

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self.size))]
        if not 0 <= index < self.size:
            raise IndexError(index)
        if self.off_lattice:
            return compose_placements(self._placements(index))
        return compose(self.scene(index))

    def scene(self, index: int) -> Scene:
        """The scene behind a picture on the lattice."""
        random = self._random(index)
        count = random.integers(self.things[0], self.things[1] + 1)
        cells = random.choice(CELLS * CELLS, size=count, replace=False)
        looks = random.integers(len(LOOKS), size=count)
        things = []
        for cell, look in zip(cells.tolist(), looks.tolist(), strict=True):
            name, colour = LOOKS[look]
            things.append(Thing(name, colour, row=cell // CELLS, column=cell % CELLS))
        return Scene(tuple(things))

    def _placements(self, index: int) -> list[Placement]:
        """Objects at any place, no two of them overlapping."""
        random = self._random(index)
        corners: list[tuple[int, int]] = []
        count = random.integers(self.things[0], self.things[1] + 1)
        for _ in range(20 * count):
            left, top = (int(corner) for corner in random.integers(SIDE - TILE + 1, size=2))
            if len(corners) < count and all(max(abs(left - x), abs(top - y)) >= TILE for x, y in corners):
                corners.append((left, top))
        return [Placement(*LOOKS[random.integers(len(LOOKS))], left, top) for left, top in corners]

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, index))


def scenes_to_learn_from(recipe: TokenizerRecipe) -> tuple[ScenePictures, ScenePictures]:
    """The scenes that a recipe with `source: scenes` trains on, well filled, and those it is measured on."""
    return (
        ScenePictures(recipe.pictures or 20_000, seed=2 * recipe.seed, things=(4, 14)),
        ScenePictures(recipe.eval_pictures, seed=2 * recipe.seed + 1),
    )


def train_scenes_tokenizer(
    recipe: TokenizerRecipe, out_dir: str | Path, progress: Progress | None = None
) -> TokenizerResult:
    """Trains the tokenizer of a recipe with `source: scenes`; see `train_tokenizer`."""
    pictures, held_out = scenes_to_learn_from(recipe)
    return train_tokenizer(recipe, pictures, out_dir, held_out=held_out, progress=progress)


def measure_scenes_tokenizer(tokenizer: ImageTokenizer, count: int = 1000, seed: int = 1_000_003) -> dict[str, Any]:
    """What `measure_scenes` gives, and the likeness of pictures that the tokenizer was not made for."""
    known = {kind.code for kind in KINDS.values()}
    others = [picture.image for picture in named_pictures(SIDE) if picture.code not in known]
    others = others[:: max(1, len(others) // 200)]
    return {
        **measure_scenes(tokenizer, count, seed),
        "scenes_off_the_lattice": measure_quality(tokenizer, ScenePictures(200, seed, off_lattice=True)),
        "other_openmoji_pictures": measure_quality(tokenizer, others),
        "attribution": ATTRIBUTION,
    }


def measure_scenes(tokenizer: ImageTokenizer, count: int, seed: int) -> dict[str, Any]:
    """How well `count` fresh scenes survive the tokenizer.

    `read_back` is the share of scenes in which the scorer finds exactly the objects that are there, in their colours
    and cells, in the original and in the reconstruction; `cells` says how many of the different cells have a code of
    their own.
    """
    pictures = ScenePictures(count, seed)
    return {
        "scenes": measure_quality(tokenizer, pictures),
        "read_back": {
            "original": _read_back(pictures, pictures),
            "reconstruction": _read_back(pictures, tokenizer.decode(tokenizer.encode(pictures))),
        },
        "cells": _codes_of_cells(tokenizer),
    }


def _read_back(scenes: ScenePictures, pictures: Sequence[Image.Image]) -> float:
    right = 0
    for index, picture in enumerate(pictures):
        found = sorted(map(_cell_and_look, read_picture(picture)))
        right += found == sorted(map(_cell_and_look, scenes.scene(index).things))
    return right / len(scenes)


def _cell_and_look(thing: Thing | Detection) -> tuple[int, int, str, str]:
    left, top, right, bottom = thing.box
    return int((top + bottom) / 2 // TILE), int((left + right) / 2 // TILE), thing.object, thing.colour or ""


def _codes_of_cells(tokenizer: ImageTokenizer) -> dict[str, int]:
    """Pictures filled with one cell each: how many cells there are, and how many codes they have."""
    cells = [tile(*look) for look in LOOKS] + [np.full((TILE, TILE, 3), 255, dtype=np.uint8)]
    codes = tokenizer.encode([np.tile(cell, (CELLS, CELLS, 1)) for cell in cells])
    return {"different": len(cells), "codes": len(codes[:, 0, 0].unique())}


def _main(recipe_file: str, run_dir: str) -> None:
    """Makes the tokenizer that comes with the package, and puts it there."""
    recipe = load_recipe(recipe_file, TokenizerRecipe)
    result = train_scenes_tokenizer(recipe, run_dir, progress=lambda step, steps, _: print(f"\r{step}/{steps}", end=""))
    folder = scenes_tokenizer_folder()
    shutil.copytree(result.folder / TOKENIZER_FOLDER, folder, dirs_exist_ok=True)
    shutil.copy(result.folder / "recipe.yaml", folder)
    quality = measure_scenes_tokenizer(ImageTokenizer.from_pretrained(folder))
    text = json.dumps({**quality, "training": result.results["training"]}, indent=2)
    (folder / "quality.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
