"""The tokenizer that comes with the package, on scenes."""

import json

import numpy as np
import pytest

from uni_x.images import ImageTokenizer, scenes_tokenizer_folder
from uni_x.recipe import TokenizerRecipe, load_recipe
from uni_x.workflows.scenes_tokenizer import LOOKS, ScenePictures, measure_scenes


@pytest.fixture(scope="module")
def tokenizer():
    return ImageTokenizer.from_pretrained(scenes_tokenizer_folder())


def test_scenes_survive_the_shipped_tokenizer(tokenizer):
    figures = measure_scenes(tokenizer, count=50, seed=7)
    assert figures["read_back"]["reconstruction"] >= 0.97
    assert figures["scenes"]["psnr_db"] > 40
    assert figures["cells"] == {"different": len(LOOKS) + 1, "codes": len(LOOKS) + 1}


def test_its_recipe_and_its_measured_quality_come_with_it(tokenizer):
    folder = scenes_tokenizer_folder()
    assert load_recipe(folder / "recipe.yaml", TokenizerRecipe).tokenizer == tokenizer.config
    assert json.loads((folder / "quality.json").read_text())["read_back"]["reconstruction"] >= 0.97
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000


def test_the_same_seed_gives_the_same_scenes():
    first, second, other = ScenePictures(3, seed=1), ScenePictures(3, seed=1), ScenePictures(3, seed=2)
    assert np.array_equal(np.stack(first[:]), np.stack(second[:]))
    assert not np.array_equal(np.stack(first[:]), np.stack(other[:]))
    with pytest.raises(IndexError):
        first[3]
