"""What an engine cannot do is said before anything is read."""

from typing import Any

import pytest

from uni_x.errors import RecipeError
from uni_x.train.arguments import training_arguments


@pytest.fixture
def alone(monkeypatch: Any) -> None:
    """Takes the variables of a launcher, which DeepSpeed without one needs, away again."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("stage", "sections", "message"),
    [
        (2, {"optimizer": {"name": "muon"}}, r"optimizer\.name: muon needs whole matrices"),
        (3, {"lora": {}}, "lora: adapters cannot be merged under ZeRO-3"),
        (3, {"drawings": {"prompts": ["a heart"]}}, "drawings: cannot be made under ZeRO-3"),
    ],
)
def test_what_zero_cannot_do(make_recipe: Any, stage: int, sections: dict[str, Any], message: str) -> None:
    pytest.importorskip("deepspeed")
    zero = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(RecipeError, match=message):
        training_arguments(make_recipe("run", sections, deepspeed=zero))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP: accelerate has it for GPUs alone"),
        ("PARALLELISM_CONFIG_CP_SIZE", "2", "sequences and matrices cannot be divided over processes"),
    ],
)
def test_what_launches_cannot_do(make_recipe: Any, monkeypatch: Any, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        training_arguments(make_recipe("run"))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_stepz": 3}, r"trainer\.max_stepz: .* the nearest one is 'max_steps'"),
        ({"output_dir": "x"}, r"trainer\.output_dir: run says where"),
        ({"eval_strategy": "steps"}, r"trainer\.eval_strategy: there is no held-out data"),
        ({"logging_steps": "many"}, r"trainer\.logging_steps: "),
        ({"learning_rate": 1.0}, r"trainer\.learning_rate: optimizer\.learning_rate says it"),
        ({"report_to": "nonsense"}, r"trainer\.report_to: nonsense is not installed, or is no reporter"),
        ({"max_steps": 0}, r"trainer\.max_steps: the data has no end"),
    ],
)
def test_arguments_that_mean_nothing(make_recipe: Any, trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        training_arguments(make_recipe("run", **trainer))
