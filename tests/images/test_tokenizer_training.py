"""Training learns, starts again where it stopped, and says what is wrong."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from uni_x.errors import DataError, RecipeError, RunError
from uni_x.images import ImageTokenizer, PictureFolder, train_tokenizer
from uni_x.images.training import measure_quality
from uni_x.recipe import TokenizerRecipe, check_recipe

RECIPE = {
    "source": "tiles",
    "eval_pictures": 8,
    "tokenizer": {
        "resolution": 32,
        "codebook_size": 16,
        "network": {"kind": "patch", "patch_size": 16, "embed_dim": 8, "encoder_sizes": [32], "decoder_sizes": [32]},
    },
    "training": {
        "steps": 100,
        "batch_size": 16,
        "learning_rate": 0.01,
        "continuous_steps": 40,
        "restart_every": 10,
        "checkpoint_every": 30,
    },
}
VQGAN = {
    "kind": "vqgan",
    "ch": 32,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "embed_dim": 4,
    "dropout": 0.1,
}


def recipe(**changes):
    return check_recipe({**RECIPE, **changes}, TokenizerRecipe, "test")


@pytest.fixture(scope="module")
def pictures():
    """Each a square of 2 x 2 tiles, out of ten tiles of smooth colour."""
    random = np.random.default_rng(0)
    tiles = random.integers(0, 256, (10, 1, 1, 3)) + random.integers(-40, 40, (10, 1, 16, 1))
    tiles = np.broadcast_to(np.clip(tiles, 0, 255), (10, 16, 16, 3)).astype(np.uint8)
    return [
        np.concatenate([np.concatenate(list(tiles[row]), axis=1) for row in random.integers(10, size=(2, 2))])
        for _ in range(60)
    ]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train_tokenizer(recipe(), pictures, out)


def test_a_tokenizer_learns_its_tiles(finished, pictures):
    quality = finished.results["quality"]
    assert quality["pictures"] == 8
    assert quality["psnr_db"] > 25
    assert quality["codebook"]["used"] == 10
    untrained = measure_quality(ImageTokenizer(recipe().tokenizer), pictures)
    assert quality["psnr_db"] > untrained["psnr_db"] + 10
    assert quality["ssim"] > untrained["ssim"] + 0.5


def test_a_run_leaves_its_recipe_tokenizer_figures_and_a_picture(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {".lock", "log.txt", "recipe.yaml", "tokenizer", "results.json", "reconstructions.png"}
    assert check_recipe(yaml.safe_load((finished.folder / "recipe.yaml").read_text()), TokenizerRecipe, "") == recipe()
    assert json.loads((finished.folder / "results.json").read_text()) == finished.results
    log = (finished.folder / "log.txt").read_text()
    assert re.findall(r"step (\d+) of 100: loss 0\.\d{4}\n", log) == [str(step) for step in range(5, 101, 5)]
    quality = finished.results["quality"]
    assert f"PSNR {quality['psnr_db']} dB, SSIM {quality['ssim']}, codes used 10\n" in log
    with Image.open(finished.folder / "reconstructions.png") as sheet:
        assert sheet.width == 8 * 36 + 4


def test_a_finished_run_is_not_run_again(finished, pictures):
    again = train_tokenizer(recipe(), pictures, finished.folder, progress=lambda *_: pytest.fail("it trained"))
    assert again.already_done
    assert again.results == finished.results


@pytest.mark.parametrize(
    ("number", "stop_at", "saved"), [(None, 57, 30), (None, 95, 90), (signal.SIGINT, 57, 58), (signal.SIGTERM, 95, 96)]
)
def test_a_stopped_run_ends_as_one_that_was_not(finished, pictures, tmp_path, number, stop_at, saved):
    def stop(step, steps, figures):
        if step == stop_at and number is None:
            raise KeyboardInterrupt
        if step == stop_at:
            os.kill(os.getpid(), number)  # ends it after the next step

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(recipe(), pictures, tmp_path, progress=stop)
    steps = []
    train_tokenizer(recipe(), pictures, tmp_path, progress=lambda step, *_: steps.append(step))
    assert steps[0] == saved + 1
    whole, resumed = (load_file(folder / "tokenizer" / "model.safetensors") for folder in (finished.folder, tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_vqgan_trains_and_resumes_too(pictures, tmp_path):
    changes = {
        "tokenizer": {"resolution": 32, "codebook_size": 16, "network": VQGAN},
        "training": {"steps": 6, "batch_size": 4, "continuous_steps": 2, "checkpoint_every": 3, "loss": "l1"},
    }

    def stop(step, steps, figures):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(recipe(**changes), pictures, tmp_path / "stopped", progress=stop)
    resumed = train_tokenizer(recipe(**changes), pictures, tmp_path / "stopped").tokenizer
    whole = train_tokenizer(recipe(**changes), pictures, tmp_path / "whole").tokenizer
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


def test_training_leaves_the_callers_random_numbers_alone(pictures, tmp_path):
    short = {**RECIPE["training"], "steps": 3, "continuous_steps": 1}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_tokenizer(recipe(training=short), pictures, tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_another_recipe_does_not_take_over_a_run(finished, pictures):
    with pytest.raises(RunError, match=r"made by another recipe \(other seed"):
        train_tokenizer(recipe(seed=1), pictures, finished.folder)


def test_a_broken_checkpoint_is_one_error(finished, pictures, tmp_path):
    shutil.copy(finished.folder / "recipe.yaml", tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(RunError, match=r"checkpoint\.pt: not a readable checkpoint"):
        train_tokenizer(recipe(), pictures, tmp_path)


def test_too_few_pictures_are_one_error(pictures, tmp_path):
    with pytest.raises(DataError, match="8 pictures, of which eval_pictures would hold out 8"):
        train_tokenizer(recipe(), pictures[:8], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "nearest known key is 'seed'"),
        ({"training": {"steps": 10, "continuous_steps": 10}}, "must be below steps"),
        ({"tokenizer": {**RECIPE["tokenizer"], "network": {"kind": "gan"}}}, "'vqgan', 'patch'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**change)


def test_a_folder_of_pictures_is_read_in_order_and_broken_ones_are_counted(pictures, tmp_path):
    for index, picture in enumerate(pictures[:12]):
        Image.fromarray(picture).save(tmp_path / f"{index:02}.png")
    (tmp_path / "04.png").write_bytes((tmp_path / "04.png").read_bytes()[:80])
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "12.heic").write_bytes(b"\0\0\0\x18ftypheic")
    folder = PictureFolder(tmp_path)
    assert len(folder) == 11
    assert [(path.name) for path, _ in folder.unreadable] == ["04.png", "12.heic"]
    assert np.array_equal(np.asarray(folder[4]), pictures[5])
    assert len(PictureFolder(tmp_path, limit=3)) == 3
    training = {**RECIPE["training"], "steps": 2, "continuous_steps": 1}
    result = train_tokenizer(recipe(training=training, eval_pictures=3), folder, tmp_path / "run")
    assert result.results["training"]["pictures"] == 8


def test_a_folder_without_pictures_is_one_error(tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        PictureFolder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        PictureFolder(tmp_path / "nowhere")
    (tmp_path / "a.heic").touch()
    with pytest.raises(DataError, match=r"no readable picture in it; .*a\.heic: the picture is empty"):
        PictureFolder(tmp_path)
