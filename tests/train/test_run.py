import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from uni_x.errors import RecipeError, RunError
from uni_x.train.callbacks import read_metrics
from uni_x.train.run import train


class Killed(BaseException):
    """Stands for the end of a process in the middle of a step."""


def stop_at(step: int) -> Any:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == step:
            raise Killed

    return stop


def losses(metrics: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(entry.get(name, 0.0) for name in ("step", "loss_text", "loss_image", "tokens")) for entry in metrics]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["none", "sft"])
def test_a_run_that_was_killed_goes_on_to_the_bit(make_recipe: Any, tmp_path: Path, workers: int, packing: str) -> None:
    options = {"sections": {"data": {"packing": packing}}, "dataloader_num_workers": workers}
    whole = train(make_recipe("whole", **options))
    assert [entry["step"] for entry in whole.metrics] == list(range(1, 10))
    with pytest.raises(Killed):
        train(make_recipe("killed", **options), stop_at(7))
    with pytest.raises(Killed):
        train(make_recipe("killed", **options), stop_at(8))
    resumed = train(make_recipe("killed", **options))
    assert losses(resumed.metrics) == losses(whole.metrics)
    weights = [tmp_path / run / "model" / "model.safetensors" for run in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_checkpoint_that_lost_its_place_in_the_data_does_not_count(
    make_recipe: Any, tmp_path: Path, caplog: Any
) -> None:
    with pytest.raises(Killed):
        train(make_recipe("run"), stop_at(6))
    (position,) = (tmp_path / "run").glob("checkpoints/checkpoint-4/data_position_0.json")
    assert json.loads(position.read_text())["batches"] == 4
    position.write_text("{}")
    assert len(train(make_recipe("run")).metrics) == 9
    assert "checkpoint-4 is not whole, and is removed" in caplog.text


def test_a_start_that_failed_leaves_the_folder_free(make_recipe: Any) -> None:
    wrong = {"optimizer": {"vision_learning_rate": 1e-3}}
    with pytest.raises(RecipeError, match="nothing in this plan is for image tokens alone"):
        train(make_recipe("run", wrong))
    assert train(make_recipe("run", max_grad_norm="1e-1", max_steps=2)).metrics


def test_a_run_goes_on_saving_logging_and_validating_as_its_recipe_says_now(
    make_recipe: Any, encoded_folder: Any, samples: Any, tmp_path: Path
) -> None:
    def settings(every: int) -> dict[str, Any]:
        sections = {"validation": {"sources": [str(tmp_path / "encoded")], "every": every}, "keep_checkpoint": True}
        return {"sections": sections, "save_steps": every, "logging_steps": every, "save_total_limit": 9}

    with pytest.raises(Killed):
        train(make_recipe("run", **settings(2)), stop_at(5))
    metrics = train(make_recipe("run", **settings(3))).metrics
    run = tmp_path / "run"
    assert [entry["step"] for entry in metrics] == [2, 4, 6, 9]
    assert [entry["step"] for entry in read_metrics(run / "validation.jsonl")] == [2, 4, 6, 9]
    assert {path.name for path in run.glob("checkpoints/checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6, 9)}


def test_the_best_weights_are_kept_and_told_of(make_recipe: Any, tmp_path: Path) -> None:
    def best(run: str) -> Any:
        validation = {"sources": [str(tmp_path / "encoded")], "samples": 12, "every": 1}
        sections = {"validation": validation, "keep_checkpoint": True, "optimizer": {"learning_rate": 3.0}}
        return make_recipe(
            run, sections, save_steps=1, save_total_limit=9, load_best_model_at_end=True, lr_scheduler_type="constant"
        )

    model = train(best("run")).model_dir
    validations = read_metrics(tmp_path / "run" / "validation.jsonl")
    lowest = min(validations, key=lambda entry: entry["eval_loss"])
    assert lowest["step"] < 9
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation"] == lowest
    assert results["final"]["step"] == lowest["step"]
    weights = (model / "model.safetensors").read_bytes()
    checkpoint = tmp_path / "run" / "checkpoints" / f"checkpoint-{lowest['step']:.0f}"
    assert weights == (checkpoint / "model.safetensors").read_bytes()
    shutil.rmtree(model)  # as if the run had ended before it was written
    train(best("run"))
    assert (model / "model.safetensors").read_bytes() == weights
    assert f"- steps: {lowest['step']:.0f}\n" in (model / "README.md").read_text()


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "config.json", "model.safetensors"])
def test_a_checkpoint_with_other_bytes_is_told_of(make_recipe: Any, tmp_path: Path, file: str) -> None:
    with pytest.raises(Killed):
        train(make_recipe("run"), stop_at(6))
    damaged = tmp_path / "run" / "checkpoints" / "checkpoint-4" / file
    damaged.write_bytes(bytes(100) + damaged.read_bytes()[100:])
    with pytest.raises(RunError, match=r"checkpoint-4: is damaged \(.*\); delete it, and run the same command again"):
        train(make_recipe("run"))


def test_two_processes_cannot_train_in_one_folder(make_recipe: Any, tmp_path: Path) -> None:
    """Not even one that could not go on, as it runs under another engine."""
    recipe = make_recipe("run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    said = []

    def start_another(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 5:
            engine = ["trainer.deepspeed={zero_optimization: {stage: 2}}"] if find_spec("deepspeed") else []
            command = [sys.executable, "-m", "uni_x", "train", str(tmp_path / "recipe.yaml"), *engine]
            said.append(subprocess.run(command, capture_output=True, text=True, timeout=120))

    assert len(train(recipe, start_another).metrics) == 9
    assert said[0].returncode == 1
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    message = f"{holder} is at work here; let it end, end it, or choose another folder"
    assert said[0].stderr.splitlines()[-1] == f"error: {tmp_path / 'run'}: {message}"
