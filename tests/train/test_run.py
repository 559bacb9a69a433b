import json
from pathlib import Path
from typing import Any

import pytest

from uni_x.errors import RunError
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


def test_a_checkpoint_that_lost_its_place_in_the_data_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int, losses: dict[str, float]) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        train(make_recipe("run"), stop)
    (position,) = (tmp_path / "run").glob("checkpoints/checkpoint-4/data_position_0.json")
    assert json.loads(position.read_text())["batches"] == 4
    position.write_text("{}")
    with pytest.raises(RunError, match="does not say where every process stood in the data"):
        train(make_recipe("run"))
