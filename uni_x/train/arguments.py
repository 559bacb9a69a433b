"""transformers' TrainingArguments out of a recipe, with everything checked that can be wrong before a model is made."""

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from uni_x import launch
from uni_x.devices import choose_device
from uni_x.errors import RecipeError, one_line
from uni_x.recipe import TrainRecipe
from uni_x.recipe_problems import in_words

UNDIVIDED = "sequences and matrices cannot be divided over processes here; docs/scaling.md says why"

# arguments that a recipe does not set, and what does in their place
OWN_ARGUMENTS = {
    "output_dir": "run says where everything goes",
    "seed": "it is the recipe's own seed",
    "data_seed": "it is the recipe's own seed",
    "use_cpu": "device says so",
    "resume_from_checkpoint": "the same command goes on by itself",
    "remove_unused_columns": "nothing is removed",
    "ignore_data_skip": "the data goes on where it was",
    "save_only_model": "checkpoints are whole; keep_checkpoint says whether the last one stays",
    "learning_rate": "optimizer.learning_rate says it",
    "weight_decay": "optimizer.weight_decay says it",
    "adam_beta1": "optimizer.betas says it",
    "adam_beta2": "optimizer.betas says it",
    "label_smoothing_factor": "the loss is the model's own",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_token",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "the finished model is a folder, which `hf upload` takes",
    ),
    "num_train_epochs": "the data has no end; trainer.max_steps says how long",
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "`uni-x train` trains, and validates where validation says so"
    ),
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name", "dataloader_drop_last", "accelerator_config", "label_names"),
        "the data section says how batches are made",
    ),
    "auto_find_batch_size": "a run keeps the batches that it began with, which per_device_train_batch_size sizes",
    "neftune_noise_alpha": "there is no such noise here",
    "parallelism_config": UNDIVIDED,
    "optim_target_modules": "trainable and optimizer say what is trained, and how",
    "eval_steps": "validation.every says it",
}
STRATEGIES = {
    "save_strategy": ("no", "steps", "best"),
    "logging_strategy": ("no", "steps"),
    "eval_strategy": ("no", "steps"),
}
METRICS = ("eval_loss", "eval_loss_text", "eval_loss_image")
AT_LEAST = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
}


def training_arguments(recipe: TrainRecipe) -> TrainingArguments:
    """What the Trainer is told.

    Raises:
        RecipeError: with the key that is wrong, or that the engine of this launch cannot do.
    """
    if taken := OWN_ARGUMENTS.keys() & set(recipe.trainer):
        raise RecipeError(f"trainer.{min(taken)}: {OWN_ARGUMENTS[min(taken)]}; take the key out")
    if recipe.optimizer.name == "muon" and "optim" in recipe.trainer:
        raise RecipeError("trainer.optim: optimizer.name has chosen muon; take one of the two out")
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
    _check_deepspeed_file(recipe)
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
        **_checked(recipe.trainer),
        "output_dir": str(Path(recipe.run) / "checkpoints"),
        "seed": recipe.seed,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "ignore_data_skip": True,  # the stream itself goes on where it was
    }
    try:
        arguments = TrainingArguments(**settings)
        _try_schedule(arguments)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"trainer: {one_line(error)}") from None
    if arguments.max_steps <= 0:
        raise RecipeError("trainer.max_steps: the data has no end, so training needs a number of steps")
    if arguments.eval_strategy != "no" and recipe.validation is None:
        raise RecipeError("trainer.eval_strategy: there is no held-out data; name some under validation")
    _check_saving(recipe, arguments)
    missing = set(arguments.report_to or ()) - set(get_available_reporting_integrations())
    if missing:
        raise RecipeError(f"trainer.report_to: {min(missing)} is not installed, or is no reporter (extra: logging)")
    _check_engine(recipe, arguments)
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for a launcher, not for threads of one process
    return arguments


def _check_deepspeed_file(recipe: TrainRecipe) -> None:
    """Refuses a configuration of DeepSpeed, of the recipe or of accelerate's, that is not there or is none."""
    where, config = "trainer.deepspeed", recipe.trainer.get("deepspeed")
    if not config and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        where = "deepspeed_config_file, in the configuration of accelerate"
        config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if not config or config == "none":
        return
    try:
        HfDeepSpeedConfig(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(config, str) and not os.path.lexists(config):
            raise RecipeError(
                f"{where}: {config}: no such file; such a path counts from the working directory, {Path.cwd()}"
            ) from None
        raise RecipeError(f"{where}: {config}: no configuration of DeepSpeed ({one_line(error)})") from None


def _check_saving(recipe: TrainRecipe, arguments: TrainingArguments) -> None:
    """Refuses what would keep nothing, or would look for the best of nothing."""
    saves = arguments.save_strategy != "no"
    if recipe.keep_checkpoint and not saves:
        raise RecipeError("keep_checkpoint: there is none to keep, as trainer.save_strategy is no")
    if saves and arguments.save_steps <= 0:
        raise RecipeError(f"trainer.save_steps: is more than 0, not {arguments.save_steps:g}")
    metric = arguments.metric_for_best_model
    if arguments.save_strategy == "best" and metric is None:
        raise RecipeError(
            f"trainer.metric_for_best_model: is missing for the best by it to be saved; {' or '.join(METRICS)}"
        )
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in METRICS:
        raise RecipeError(f"trainer.metric_for_best_model: '{metric}' is none of {', '.join(METRICS)}")


def _validation_arguments(recipe: TrainRecipe) -> dict[str, Any]:
    section = recipe.validation
    return {} if section is None else {"eval_strategy": "steps", "eval_steps": section.every}


def _check_engine(recipe: TrainRecipe, arguments: TrainingArguments) -> None:
    """Refuses what the chosen engine cannot do, and lets ZeRO-3 save whole weights."""
    plugin = arguments.deepspeed_plugin
    if plugin is not None:
        config = plugin.hf_ds_config.config
        if "optimizer" in config:
            raise RecipeError("DeepSpeed's configuration names an optimizer, the recipe another; take that one out")
        if "scheduler" in config:
            raise RecipeError(
                "DeepSpeed's configuration names a scheduler, the recipe another (trainer.lr_scheduler_type); take "
                "that one out"
            )
        if config.get("zero_optimization", {}).get("stage") == 3:
            config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        if recipe.optimizer.name == "muon":
            raise RecipeError("optimizer.name: muon needs whole matrices, which ZeRO takes apart; use adamw, or DDP")
    if any(int(os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", 1)) > 1 for kind in ("CP", "SP", "TP")):
        raise RecipeError(UNDIVIDED)
    if _by_fsdp(arguments):
        if arguments.use_cpu:
            raise RecipeError(
                "FSDP: accelerate has it for GPUs alone; on CPUs take DDP (ddp.yaml) or ZeRO-3 (zero3.yaml)"
            )
        if recipe.optimizer.state_from is not None:
            raise RecipeError("optimizer.state_from: an optimizer that FSDP takes apart cannot have it; take it out")
    if recipe.lora is not None and shards_weights(arguments):
        engine = "FSDP" if _by_fsdp(arguments) else "ZeRO-3"
        raise RecipeError(f"lora: adapters cannot be merged under {engine}; use DDP or ZeRO-2")


def shards_weights(arguments: TrainingArguments) -> bool:
    """Whether the engine of this launch takes the weights apart among the processes."""
    plugin = arguments.deepspeed_plugin
    return _by_fsdp(arguments) or (plugin is not None and plugin.zero_stage == 3)


def _by_fsdp(arguments: TrainingArguments) -> bool:
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _checked(trainer: dict[str, Any]) -> dict[str, Any]:
    """The arguments in the types that transformers declares (YAML takes 1e-3 for a text); counts are 1 or more."""
    hints = get_type_hints(TrainingArguments)
    checked = dict(trainer)
    for name, value in trainer.items():
        if value is False and name in STRATEGIES:
            checked[name] = value = "no"  # as YAML reads that word
        if name == "report_to" and value is None:
            checked[name] = value = "none"
        if isinstance(value, dict) and name.endswith("_kwargs"):
            checked[name] = value = {key: _number(each) for key, each in value.items()}
        try:
            read = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            if isinstance(value, str) and float in getattr(hints[name], "__args__", (hints[name],)):
                checked[name] = _number(read)
        except ValidationError as error:
            raise RecipeError(f"trainer.{name}: {in_words(error.errors()[0])}") from None
        except PydanticUserError:
            continue
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise RecipeError(f"trainer.{name}: is {AT_LEAST[name]} or more, not {value!r}")
        if name in STRATEGIES and value not in STRATEGIES[name]:
            choice = ", ".join(STRATEGIES[name])
            raise RecipeError(f"trainer.{name}: is one of {choice}, not {value!r}; the data has no epochs")
    return checked


def _number(value: Any) -> Any:
    """A number that YAML takes for a text, as 1e-3; everything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


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
