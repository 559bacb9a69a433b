"""What an engine cannot do is said before anything is read."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from uni_x.errors import RecipeError
from uni_x.train.arguments import training_arguments
from uni_x.train.batches import names_of_folders


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
    ],
)
def test_what_zero_cannot_do(make_recipe: Any, stage: int, sections: dict[str, Any], message: str) -> None:
    pytest.importorskip("deepspeed")
    zero = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(RecipeError, match=message):
        training_arguments(make_recipe("run", sections, deepspeed=zero))
    with pytest.raises(RecipeError, match="DeepSpeed's configuration names a scheduler"):
        training_arguments(make_recipe("run", deepspeed=zero | {"scheduler": {"type": "WarmupLR"}}))


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


def test_a_configuration_of_deepspeed_that_is_none(make_recipe: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    for config, message in (
        ("zero.json", f"zero.json: no such file; such a path counts from the working directory, {tmp_path}"),
        (".", r"\.: no configuration of DeepSpeed \(.*Is a directory"),
        ("list.json", "list.json: no configuration of DeepSpeed"),
        ({"zero_optimization": 3}, "{'zero_optimization': 3}: no configuration of DeepSpeed"),
    ):
        with pytest.raises(RecipeError, match=rf"^trainer\.deepspeed: {message}"):
            training_arguments(make_recipe("run", deepspeed=config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero.json")
    with pytest.raises(RecipeError, match=r"deepspeed_config_file, in the configuration of accelerate: zero\.json: no"):
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
        ({"num_train_epochs": 2}, r"trainer\.num_train_epochs: the data has no end"),
        ({"save_strategy": "epoch"}, r"trainer\.save_strategy: is one of no, steps, best, .* the data has no epochs"),
        ({"save_strategy": "best"}, r"trainer\.metric_for_best_model: is missing"),
        ({"metric_for_best_model": "accuracy"}, r"trainer\.metric_for_best_model: 'accuracy' is none of eval_loss, "),
        ({"save_steps": 0}, r"trainer\.save_steps: is more than 0, not 0"),
        ({"dataloader_num_workers": -1}, r"trainer\.dataloader_num_workers: is 0 or more, not -1"),
        ({"neftune_noise_alpha": 5}, r"trainer\.neftune_noise_alpha: there is no such noise"),
    ],
)
def test_arguments_that_mean_nothing(make_recipe: Any, trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        training_arguments(make_recipe("run", **trainer))


def test_words_that_yaml_reads_otherwise(make_recipe: Any) -> None:
    """`no` is False there, 1e-4 a text, and null no reporter."""
    trainer = yaml.safe_load(
        "{save_strategy: no, logging_strategy: no, report_to: null, lr_scheduler_type: cosine_with_min_lr, "
        "lr_scheduler_kwargs: {min_lr: 1e-4}}"
    )
    arguments = training_arguments(make_recipe("run", **trainer))
    assert arguments.save_strategy == "no"
    assert arguments.logging_strategy == "no"
    assert arguments.report_to == []
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-4}
    with pytest.raises(RecipeError, match="keep_checkpoint: there is none to keep"):
        training_arguments(make_recipe("run", {"keep_checkpoint": True}, save_strategy="no"))


def test_names_of_folders_tell_them_apart(tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / name) for name in ("a/train", "b/train", "c"))
    assert names_of_folders([c]) == ["c"]
    assert names_of_folders([a, b, c, a]) == ["a/train", "b/train", "c", "a/train#2"]
