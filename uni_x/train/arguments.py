"""transformers' TrainingArguments out of a recipe, with everything checked that can be wrong before a model is made."""

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from transformers import TrainingArguments, get_scheduler

from uni_x import launch
from uni_x.devices import choose_device
from uni_x.errors import RecipeError
from uni_x.recipe import TrainRecipe

OWN_ARGUMENTS = {
    "output_dir",
    "seed",
    "data_seed",
    "use_cpu",
    "resume_from_checkpoint",
    "remove_unused_columns",
    "ignore_data_skip",
    "save_only_model",
}


def training_arguments(recipe: TrainRecipe) -> TrainingArguments:
    """What the Trainer is told.

    Raises:
        RecipeError: with the key that is wrong, or that the engine of this launch cannot do.
    """
    if taken := OWN_ARGUMENTS & set(recipe.trainer):
        raise RecipeError(f"trainer.{min(taken)}: the recipe settles this elsewhere; take the key out")
    known = {field.name for field in fields(TrainingArguments)}
    for name in recipe.trainer:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(
                f"trainer.{name}: not an argument of transformers' TrainingArguments; the nearest one is '{nearest}'"
            )
    device = choose_device(recipe.device)
    if device.index:
        raise RecipeError(f"device: {device} cannot be chosen in training; set CUDA_VISIBLE_DEVICES and device=cuda")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, need not look for one
    if recipe.trainer.get("deepspeed"):
        launch.settle_for_one()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "logging_steps": 50,
        "save_strategy": "steps",
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "lr_scheduler_type": "linear",
        "learning_rate": recipe.optimizer.learning_rate,
        "weight_decay": recipe.optimizer.weight_decay,
        "adam_beta1": recipe.optimizer.betas[0],
        "adam_beta2": recipe.optimizer.betas[1],
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,  # every parameter takes part in every step
        "logging_nan_inf_filter": False,  # such losses end the run
        "run_name": Path(recipe.run).name,
        **_validation_arguments(recipe),
        **recipe.trainer,
        "output_dir": str(Path(recipe.run) / "checkpoints"),
        "seed": recipe.seed,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the stream itself goes on where it was
    }
    _check_types(recipe.trainer)
    try:
        arguments = TrainingArguments(**settings)
        _try_schedule(arguments)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"trainer: {' '.join(str(error).split())}") from None
    if arguments.max_steps <= 0:
        raise RecipeError("trainer.max_steps: the data has no end, so training needs a number of steps")
    if arguments.eval_strategy != "no" and recipe.validation is None:
        raise RecipeError("trainer.eval_strategy: there is no held-out data; name some under validation")
    _check_engine(recipe, arguments)
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for a launcher, not for threads of one process
    return arguments


def _validation_arguments(recipe: TrainRecipe) -> dict[str, Any]:
    section = recipe.validation
    return {} if section is None else {"eval_strategy": "steps", "eval_steps": section.every}


def _check_engine(recipe: TrainRecipe, arguments: TrainingArguments) -> None:
    """Refuses what the chosen engine cannot do, and lets ZeRO-3 save whole weights."""
    plugin = arguments.deepspeed_plugin
    sharded = "FSDP" if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else None
    if plugin is not None:
        sharded = "ZeRO"
        config = plugin.hf_ds_config.config
        if "optimizer" in config:
            raise RecipeError("DeepSpeed's configuration names an optimizer, the recipe another; take that one out")
        if config.get("zero_optimization", {}).get("stage") == 3:
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if recipe.optimizer.name == "muon":
            raise RecipeError("optimizer.name: muon needs whole matrices, which ZeRO takes apart; use adamw, or DDP")
    if any(int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", 1)) > 1 for kind in ("CP", "SP", "TP")):
        raise RecipeError("sequences and matrices cannot be divided over processes here; docs/scaling.md says why")
    if sharded == "FSDP" and arguments.use_cpu:
        raise RecipeError("FSDP: accelerate has it for GPUs alone; on CPUs take DDP (ddp.yaml) or ZeRO-3 (zero3.yaml)")
    if sharded == "FSDP" and recipe.drawings is not None:
        raise RecipeError("drawings: cannot be made under FSDP, where no process has the whole model; take them out")
    if recipe.lora is not None and (sharded == "FSDP" or (plugin is not None and plugin.zero_stage == 3)):
        raise RecipeError(
            f"lora: adapters cannot be merged under {sharded}, which takes weights apart; use DDP or ZeRO-2"
        )
    if sharded is not None and recipe.optimizer.state_from is not None:
        raise RecipeError(f"optimizer.state_from: is for whole optimizers, {sharded} takes them apart; take it out")


def _check_types(trainer: dict[str, Any]) -> None:
    """Holds each argument against the type that transformers declares; counts are 1 or more."""
    hints = get_type_hints(TrainingArguments)
    for name, value in trainer.items():
        try:
            TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"trainer.{name}: {error.errors()[0]['msg']} (got {value!r})") from None
        except PydanticUserError:
            continue
        if name in ("gradient_accumulation_steps", "per_device_train_batch_size") and value < 1:
            raise RecipeError(f"trainer.{name}: is 1 or more, not {value!r}")


def _try_schedule(arguments: TrainingArguments) -> None:
    """Makes the learning-rate schedule once, because its arguments are checked nowhere else before training."""
    steps = max(1, int(arguments.max_steps))
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        num_warmup_steps=int(arguments.get_warmup_steps(steps)),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs or {},  # type: ignore[arg-type]
    )
