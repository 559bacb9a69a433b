"""From a recipe to a trained model folder, resumable at every step."""

import difflib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from uni_x.data.collate import Collator
from uni_x.data.dataset import Source, TrainingStream, start_positions
from uni_x.data.encode import read_fingerprint, tokenizer_fingerprint
from uni_x.data.render import UNCONDITIONAL, Renderer, Vocabulary, separator_of
from uni_x.data.shards import iterate_samples
from uni_x.data.templates import load_template
from uni_x.data.text_tokenizer import (
    check_vocab_size,
    settle_special_tokens,
    special_ids,
    train_text_tokenizer,
)
from uni_x.devices import choose_device, keep_freed_memory
from uni_x.errors import ConfigError, DataError, RecipeError, RunError
from uni_x.images import ImageTokenizer, load_image_tokenizer
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model.plan import build_plan, plan_from_dicts
from uni_x.model_folder import ModelFolder, load_model_folder, save_model_folder
from uni_x.recipe import ModelSection, TrainRecipe
from uni_x.runs import RunFolder, writing_into
from uni_x.train.callbacks import Checkpoint, Metrics, StopOnSignal, last_whole_checkpoint, read_metrics
from uni_x.train.trainer import UniXTrainer, read_positions

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]

CHECKPOINT_COPIES = 8  # weights, two optimizer moments and gradients, twice while a checkpoint replaces another
LOGS_BYTES = 20 * 2**20
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
MAY_DIFFER = {"device", "trainer.dataloader_num_workers", "trainer.dataloader_prefetch_factor"}  # when a run goes on


@dataclass(frozen=True)
class Trained:
    """A finished training: the model folder, and what was logged on the way."""

    model_dir: Path
    metrics: list[dict[str, float]]
    already_done: bool


def check_before(recipe: TrainRecipe) -> TrainingArguments:
    """Everything about a recipe that can be wrong without looking at its data, checked in a second.

    Raises:
        UniXError: with the key that is wrong.
    """
    arguments = _training_arguments(recipe)
    section = recipe.model
    if section.base is None:
        if recipe.text_tokenizer.path is None:
            check_vocab_size(recipe.text_tokenizer.vocab_size)
        if section.plan is None:
            build_plan(section.preset, section.num_hidden_layers, section.preset_arguments)
        else:
            plan_from_dicts(section.plan, section.num_hidden_layers)
        _check_heads(section)
    return arguments


def train(recipe: TrainRecipe, progress: Progress | None = None) -> Trained:
    """Trains what the recipe says in its run folder, or goes on where an earlier call stopped.

    Raises:
        UniXError: where recipe, data and model do not fit together, or the disk is full.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    arguments = check_before(recipe)
    run = RunFolder(recipe.run, recipe.model_dump(mode="json"), may_differ=MAY_DIFFER)
    metrics_file, model_dir = run.path / "metrics.jsonl", run.path / "model"
    if model_dir.exists():
        return _finish(run, recipe, read_metrics(metrics_file), already_done=True)

    keep_freed_memory()
    set_seed(recipe.seed)
    start = make_start(recipe)
    renderer = Renderer(
        start.text_tokenizer,
        Vocabulary.from_config(start.model.config),
        recipe.data.render,
        recipe.data.stage,
    )
    _check_codes_are_of(start.image_tokenizer, recipe)
    checkpoint = last_whole_checkpoint(run.path / "checkpoints")
    stream = _make_stream(recipe, arguments, renderer, checkpoint)
    weight_bytes = 4 * start.model.num_parameters()
    run.begin(needs_bytes=CHECKPOINT_COPIES * weight_bytes + LOGS_BYTES)
    forecast = stream.forecast
    if forecast.dropped or forecast.split:
        logger.warning(
            "of the first %d sequences %d are longer than max_length (%d) and left out, and %d are cut into several",
            forecast.documents + forecast.dropped,
            forecast.dropped,
            forecast.max_length,
            forecast.split,
        )
    with writing_into(run.path):
        if checkpoint is not None and checkpoint.step >= checkpoint.max_steps:
            start = replace(start, model=UniXForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32))
        else:
            _run_trainer(recipe, arguments, start, stream, checkpoint, Metrics(metrics_file, progress))
        save_model_folder(start, model_dir)
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    return _finish(run, recipe, read_metrics(metrics_file), already_done=False)


def _finish(run: RunFolder, recipe: TrainRecipe, metrics: list[dict[str, float]], already_done: bool) -> Trained:
    if not run.results_file.exists():
        run.write_results({"final": metrics[-1] if metrics else {}, "seed": recipe.seed})
    return Trained(run.path / "model", metrics, already_done)


def _make_stream(
    recipe: TrainRecipe, arguments: TrainingArguments, renderer: Renderer, checkpoint: Checkpoint | None
) -> TrainingStream:
    """This process's batches, from where the checkpoint has left them."""
    data = recipe.data
    former, fingerprint = (None, None) if checkpoint is None else read_positions(checkpoint.path)
    positions = start_positions(arguments.world_size, arguments.dataloader_num_workers, former)
    vocabulary = renderer.vocabulary
    stream = TrainingStream(
        [Source(source.path, source.weight, source.fraction) for source in data.sources],
        renderer,
        Collator(vocabulary.image_token_offset + vocabulary.image_codebook_size, vocabulary.pad_token_id),
        data.max_length,
        arguments.per_device_train_batch_size,
        recipe.seed,
        packing=data.packing != "none",
        split_long_texts=data.long_texts == "split",
        position=positions[arguments.process_index],
    )
    if checkpoint is not None and fingerprint != stream.fingerprint:
        raise RunError(
            f"{checkpoint.path}: the data has changed since this checkpoint was written; give the sources back as they "
            "were, or begin a new run (run=…) from this one's model"
        )
    return stream


def _run_trainer(
    recipe: TrainRecipe,
    arguments: TrainingArguments,
    start: ModelFolder,
    stream: TrainingStream,
    checkpoint: Checkpoint | None,
    metrics: Metrics,
) -> None:
    stop = StopOnSignal()
    trainer = UniXTrainer(
        optimizer_section=recipe.optimizer,
        stream=stream,
        model=start.model,
        args=arguments,
        callbacks=[stop, metrics],
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint.path.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
    if stop.stopped:
        raise KeyboardInterrupt


def _check_codes_are_of(tokenizer: ImageTokenizer, recipe: TrainRecipe) -> None:
    """Codes of another image tokenizer look like any others, and would be learned without an error."""
    ours = tokenizer_fingerprint(tokenizer)
    for source in recipe.data.sources:
        theirs = read_fingerprint(source.path)
        if theirs is not None and theirs != ours:
            raise DataError(
                f"{source.path}: was encoded with another image tokenizer than that of "
                f"{recipe.model.base or recipe.image_tokenizer}; encode it with this one (uni-x encode "
                "--image-tokenizer), or name that one in the recipe"
            )


def make_start(recipe: TrainRecipe) -> ModelFolder:
    """The model that training starts from, on the CPU, with its tokenizers: a base, or a new one.

    Of a base the sizes count; how it is trained, and how its prompts will look, is the recipe's.
    """
    if recipe.model.base is not None:
        folder = load_model_folder(recipe.model.base, dtype=torch.float32)
        for name, value in _training_settings(recipe, folder.text_tokenizer).items():
            setattr(folder.model.config, name, value)
        _mark_separator(folder.model.config, recipe, folder.text_tokenizer)
        return folder
    image_tokenizer = load_image_tokenizer(recipe.image_tokenizer)
    text_tokenizer = make_text_tokenizer(recipe, image_tokenizer.codebook_size)
    set_seed(recipe.seed)
    model = UniXForCausalLM(make_config(recipe, image_tokenizer, text_tokenizer))
    return ModelFolder(model, text_tokenizer, image_tokenizer)


def _training_settings(recipe: TrainRecipe, text_tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The part of a model's configuration that says how it is trained and prompted; a template is kept in full."""
    losses = ("head", "text_loss_weight", "image_loss_weight", "z_loss")
    rendering = recipe.data.render.model_dump(mode="json")
    if recipe.data.render.template is not None and text_tokenizer is not None:
        rendering["template"] = load_template(recipe.data.render.template, text_tokenizer)
    return {
        **{name: getattr(recipe.model, name) for name in losses},
        "rendering": rendering,
        "image_sampling": recipe.image_sampling.model_dump(mode="json"),
    }


def _check_heads(section: ModelSection) -> None:
    head_dim = section.head_dim or section.hidden_size // section.num_attention_heads
    if head_dim < 2 or head_dim % 2:
        raise RecipeError(
            f"model.hidden_size: {section.hidden_size} over {section.num_attention_heads} heads gives a head_dim of "
            f"{head_dim}, which must be even"
        )


def _training_arguments(recipe: TrainRecipe) -> TrainingArguments:
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
    if arguments.eval_strategy != "no":
        raise RecipeError("trainer.eval_strategy: there is no held-out data to evaluate on; take the key out")
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for a launcher, not for threads of one process
    return arguments


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


def make_config(
    recipe: TrainRecipe, image_tokenizer: ImageTokenizer, text_tokenizer: PreTrainedTokenizerBase | None = None
) -> UniXConfig:
    """The configuration of the model that a recipe makes.

    Without `text_tokenizer` it is that of a tokenizer yet to be trained, with as many tokens as the recipe says.
    """
    section: ModelSection = recipe.model
    sizes = section.model_dump(exclude={"base", "rope_theta", "preset", "preset_arguments", "plan"})
    sizes |= _training_settings(recipe, text_tokenizer)
    offset = recipe.text_tokenizer.vocab_size
    if text_tokenizer is not None:
        offset = len(text_tokenizer)
        sizes |= special_ids(text_tokenizer)
    if section.plan is None:
        sizes |= {"preset": section.preset, "preset_arguments": section.preset_arguments}
    else:
        sizes |= {"plan": section.plan}
    config = UniXConfig(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        vocab_size=offset + image_tokenizer.codebook_size,
        image_token_offset=offset,
        image_codebook_size=image_tokenizer.codebook_size,
        image_grid=list(image_tokenizer.grid),
    )
    if text_tokenizer is not None:
        _mark_separator(config, recipe, text_tokenizer)
    return config


def _mark_separator(config: UniXConfig, recipe: TrainRecipe, text_tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets the separator between codes, where there is one, travel with the image tokens."""
    separator = separator_of(text_tokenizer, recipe.data.render)
    if separator is not None:
        config.image_marker_ids = sorted({*config.image_marker_ids, separator[0]})


def make_text_tokenizer(recipe: TrainRecipe, codebook_size: int) -> PreTrainedTokenizerBase:
    """The text tokenizer of a recipe, with the markers that its sequences hold: one to load, or one that is trained.

    Raises:
        UniXError: for a folder that is none, or texts that cannot be read.
    """
    section, vis_sep = recipe.text_tokenizer, recipe.data.render.vis_sep
    others = () if vis_sep is None else (vis_sep.token,)
    if section.path is None:
        trained = train_text_tokenizer(_texts(recipe, codebook_size), section.vocab_size)
        settle_special_tokens(trained, *others)
        return trained
    if not Path(section.path).is_dir():
        raise DataError(f"text_tokenizer.path: {section.path} is not a folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(section.path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"text_tokenizer.path: {section.path}: {' '.join(str(error).split())[:200]}") from None
    try:
        added = settle_special_tokens(tokenizer, *others)
    except ConfigError as error:
        raise RunError(f"text_tokenizer.path: {section.path}: {error}") from None
    if added:
        logger.info("the text tokenizer gained %d image markers", added)
    return tokenizer


def _texts(recipe: TrainRecipe, codebook_size: int) -> Iterator[str]:
    """All texts of the sources, and what stands for them in unconditional drawings."""
    for source in recipe.data.sources:
        for sample in iterate_samples(source.path, codebook_size):
            if sample.messages:
                yield from (message.content for message in sample.messages)
            else:
                yield sample.caption or sample.text or ""
                if sample.caption is not None:
                    yield UNCONDITIONAL
