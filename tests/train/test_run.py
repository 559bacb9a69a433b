import json
from pathlib import Path
from typing import Any

import pytest

from uni_x.errors import RecipeError
from uni_x.train.run import train


class Killed(BaseException):
    """Stands for the end of a process in the middle of a step."""


def losses(metrics: list[dict[str, float]]) -> list[tuple[float, ...]]:
    return [tuple(entry.get(name, 0.0) for name in ("step", "loss_text", "loss_image", "tokens")) for entry in metrics]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["none", "sft"])
def test_a_run_that_was_killed_goes_on_to_the_bit(make_recipe: Any, tmp_path: Path, workers: int, packing: str) -> None:
    options = {"sections": {"data": {"packing": packing}}, "dataloader_num_workers": workers}

    def killed_at(step: int, now: int) -> None:
        if now == step:
            raise Killed

    whole = train(make_recipe("whole", **options))
    assert [entry["step"] for entry in whole.metrics] == list(range(1, 10))
    with pytest.raises(Killed):
        train(make_recipe("killed", **options), lambda done, total, losses: killed_at(7, done))
    with pytest.raises(Killed):
        train(make_recipe("killed", **options), lambda done, total, losses: killed_at(8, done))
    resumed = train(make_recipe("killed", **options))
    assert losses(resumed.metrics) == losses(whole.metrics)
    weights = [tmp_path / run / "model" / "model.safetensors" for run in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_checkpoint_that_lost_its_place_in_the_data_does_not_count(
    make_recipe: Any, tmp_path: Path, caplog: Any
) -> None:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        train(make_recipe("run"), stop)
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
