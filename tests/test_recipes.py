import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.data.conftest import encoded_folder, image_tokenizer, make_image, samples
from uni_x.data.schema import Sample
from uni_x.data.text_tokenizer import train_text_tokenizer
from uni_x.errors import RecipeError
from uni_x.images import ImageTokenizer
from uni_x.model_folder import load_model_folder
from uni_x.recipe import TokenizerRecipe, TrainRecipe, load_recipe
from uni_x.strict_yaml import load_yaml
from uni_x.train.run import check_before, train
from uni_x.workflows.convert import init
from uni_x.workflows.quickstart import load_quickstart_recipe

__all__ = ["encoded_folder", "image_tokenizer", "make_image", "samples"]

RECIPES = Path(__file__).parents[1] / "recipes"
TRAINING_RECIPES = [
    file for file in sorted(RECIPES.glob("*.yaml")) if "tokenizer" not in yaml.safe_load(file.read_text())
]


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_fits_its_schema(file: Path) -> None:
    if "tokenizer" in yaml.safe_load(file.read_text()):
        load_recipe(file, TokenizerRecipe)
    else:
        check_before(load_recipe(file, TrainRecipe))


def plans_of(recipe: Path) -> list[str]:
    """The plans that the commands at a recipe's head make models with."""
    found = re.findall(r'"((?:uni-x|uni-share)\([^)]*\)|shared|moe|mot)"', recipe.read_text())
    return found or plans_of(RECIPES / "qwen2.5-3b-uni-x-pretrain.yaml")


@pytest.fixture
def make_base(image_tokenizer: ImageTokenizer, tmp_path: Path) -> Callable[[str], str]:
    """A model folder that `uni-x init` makes of a tiny LLM of 20 layers."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 20, "eos_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "initializer_range": 0.2}
    AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).save_pretrained(tmp_path / "llm")
    train_text_tokenizer(["a red heart left of a blue car"] * 5, 300).save_pretrained(tmp_path / "llm")
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def make(plan: str) -> str:
        out = tmp_path / f"made-{plan}"
        init(str(tmp_path / "llm"), str(tmp_path / "tokenizer"), plan, out)
        return str(out)

    return make


@pytest.mark.parametrize("file", TRAINING_RECIPES, ids=lambda file: file.stem)
def test_every_recipe_trains_at_toy_size(
    file: Path, make_base: Any, encoded_folder: Any, samples: list[Sample], tmp_path: Path
) -> None:
    """A few steps with all of its settings but sizes, folders, workers and reporters."""
    recipe = load_recipe(file, TrainRecipe)
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    for number, source in enumerate(tree["data"]["sources"]):
        source["path"] = str(encoded_folder(samples, f"source-{number}"))
    if "validation" in tree:
        tree["validation"] |= {"sources": [tree["data"]["sources"][0]["path"]], "every": 2}
    tree["data"]["max_length"] = 256
    tree["trainer"] |= {"max_steps": 3, "dataloader_num_workers": 0, "report_to": "none", "logging_steps": 1}
    tree["device"] = "cpu"
    if recipe.model.base is None:
        tree["model"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        tree["model"] |= {"max_position_embeddings": 256, "num_key_value_heads": None, "head_dim": None}
        tree |= {"text_tokenizer": {"vocab_size": 400}, "image_tokenizer": str(tmp_path / "tokenizer")}
    if recipe.lora is not None:
        pytest.importorskip("peft")
    for plan in plans_of(file) if recipe.model.base is not None else [None]:
        tree["run"] = str(tmp_path / f"run-{plan}")
        if plan is not None:
            tree["model"]["base"] = make_base(plan)
        trained = train(TrainRecipe.model_validate(tree))
        assert [entry["step"] for entry in trained.metrics] == [1, 2, 3]
        assert load_model_folder(trained.model_dir).model.num_parameters() > 0


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


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {sources: [{path: a}, {path: b}]}\noptimizer: {betas: [0.9, 0.95]}")
    changes = ["data.sources.1.weight=2", "data.sources.0={path: c}", "optimizer.betas.1=0.99"]
    recipe = load_recipe(file, TrainRecipe, changes)
    assert [(source.path, source.weight) for source in recipe.data.sources] == [("c", 1), ("b", 2)]
    assert recipe.optimizer.betas == (0.9, 0.99)
    for change, message in (
        ("data.sources.2.weight=2", "data.sources has no entry 2; it has 2 places, counted from 0"),
        ("data.sources.-1.weight=2", "data.sources has no entry -1; it has 2 places, counted from 0"),
        ("data.sources.first.weight=2", "data.sources has no entry first; it has 2 places, counted from 0"),
        ("optimizer.betas.2=0.99", "optimizer.betas has no entry 2; it has 2 places, counted from 0"),
        (
            "drawings.prompts.0=a heart",
            "the recipe has no list drawings.prompts to change; give all of it (drawings.pr",
        ),
        ("data.sources.0.path.x=2", "data.sources.0.path is not a section"),
        (
            "data.sources.0.wieght=2",
            "unknown key 'data.sources.0.wieght'; the nearest known key is 'data.sources.0.wei",
        ),
    ):
        with pytest.raises(RecipeError, match=re.escape(f"'{change}': {message}")):
            load_recipe(file, TrainRecipe, [change])


MERGED = """
sizes: &sizes {hidden_size: 8, num_hidden_layers: 2}
named: {own: &own {<<: *sizes, hidden_size: 16}}
more: {<<: *own, num_hidden_layers: 3}
both: {<<: *sizes, <<: {layers: 4}}
"""


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data:\n  sources: [{path: a}]\n  max_length: 8\nseed: 1\ndata:\n  sources: [{path: b}]\n")
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml: not valid YAML \(the key 'data' stands twice, in lines 1 and 5"
    ):
        load_recipe(file, TrainRecipe)
    file.write_text("data: {sources: [{path: a, path: b}]}")
    with pytest.raises(RecipeError, match=r"the key 'path' stands twice, in line 1; keep one of them"):
        load_recipe(file, TrainRecipe)
    file.write_text("data: {sources: [{path: a}]}")
    with pytest.raises(RecipeError, match=r"'seed=\[': the value is not valid YAML \(expected the node content"):
        load_recipe(file, TrainRecipe, ["seed=["])
    with pytest.raises(RecipeError, match=r"'model={z_loss: 1, z_loss: 2}': .* \(the key 'z_loss' stands twice"):
        load_recipe(file, TrainRecipe, ["model={z_loss: 1, z_loss: 2}"])
    file.write_text("- {layers: 0,\n   ffn: separate,\n   ffn: shared}")
    with pytest.raises(RecipeError, match=r"the key 'ffn' stands twice, in lines 2 and 3"):
        init("absent", "scenes", str(file), tmp_path / "out")


def test_merged_keys_may_be_given_anew() -> None:
    assert load_yaml(MERGED) == yaml.safe_load(MERGED)


def test_a_base_on_the_command_line_takes_the_place_of_the_recipes_model(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "scenes.yaml", TrainRecipe, ["model.z_loss=1e-4", "model.base=a/model"])
    assert recipe.model.model_fields_set == {"base", "z_loss"}
    assert not recipe.model_fields_set & {"image_tokenizer", "text_tokenizer"}
    words = ["model={z_loss: 0.1}", "model.base=a/model"]
    assert load_recipe(RECIPES / "scenes.yaml", TrainRecipe, words).model.base == "a/model"
    file = tmp_path / "recipe.yaml"
    file.write_text("{image_tokenizer: scenes, model: {base: a/model}, data: {sources: [{path: a}]}}")
    for words, message in (
        (["model.hidden_size=8", "model.base=a/model"], "model: base brings its own hidden_size; take it out"),
        ([], r"image_tokenizer: model\.base brings its own; take it out \(.* gives way to model\.base=DIR"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(RECIPES / "scenes.yaml" if words else file, TrainRecipe, words)
