from pathlib import Path

import pytest
import yaml

from uni_x.errors import RecipeError
from uni_x.recipe import TokenizerRecipe, TrainRecipe, load_recipe
from uni_x.train.run import check_before
from uni_x.workflows.quickstart import load_quickstart_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_fits_its_schema(file: Path) -> None:
    if "tokenizer" in yaml.safe_load(file.read_text()):
        load_recipe(file, TokenizerRecipe)
    else:
        check_before(load_recipe(file, TrainRecipe))


def test_the_scenes_recipe_is_the_quickstarts() -> None:
    scenes, quickstart = load_recipe(RECIPES / "scenes.yaml", TrainRecipe), load_quickstart_recipe().train
    for section in ("image_tokenizer", "text_tokenizer", "model", "optimizer", "image_sampling", "trainer"):
        assert getattr(scenes, section) == getattr(quickstart, section), section
    assert [source.weight for source in scenes.data.sources] == [s.weight for s in quickstart.data.sources]
    assert scenes.data.model_copy(update={"sources": []}) == quickstart.data.model_copy(update={"sources": []})


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {sources: [{path: a}]}")
    recipe = load_recipe(file, TrainRecipe, ["data.max_length=32", "trainer.max_steps=3", "model.z_loss=1e-4"])
    assert recipe.data.max_length == 32
    assert recipe.trainer == {"max_steps": 3}
    assert recipe.model.z_loss == 1e-4
    with pytest.raises(RecipeError, match=r"data\.max_length is not a section"):
        load_recipe(file, TrainRecipe, ["data.max_length=32", "data.max_length.x=1"])
