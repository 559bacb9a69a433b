"""From a recipe to a trained model folder, resumable at every step, in one process or many."""

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar

from uni_x.data.text_tokenizer import check_vocab_size
from uni_x.devices import keep_freed_memory
from uni_x.errors import RunError
from uni_x.model.plan import build_plan, plan_from_dicts
from uni_x.model_folder import ModelFolder, save_model_folder, save_tokenizers
from uni_x.recipe import TrainRecipe
from uni_x.runs import RunFolder, writing_into
from uni_x.train.arguments import training_arguments
from uni_x.train.batches import (
    check_codes_are_of,
    make_held_out,
    make_renderer,
    make_stream,
    names_of_folders,
    tell_what_is_left_out,
    tell_what_is_not_held_out,
)
from uni_x.train.callbacks import Drawings, Metrics, StepsAsTheRecipeSays, StopOnSignal, read_metrics
from uni_x.train.card import model_card
from uni_x.train.checkpoints import kept_checkpoint, last_whole_checkpoint, read_standing, remove_halves
from uni_x.train.failures import told_in_one_line
from uni_x.train.reporters import reporters_at
from uni_x.train.start import check_heads, make_start, plan_fingerprint, tokenizers_fingerprint
from uni_x.train.takeover import TakeOver, open_optimizer
from uni_x.train.trainable import add_adapters, freeze, merged
from uni_x.train.trainer import UniXTrainer
from uni_x.train.universal import fit_to_launch

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]

LOGS_BYTES = 20 * 2**20
MAY_DIFFER = {  # when a run goes on
    "run",
    "device",
    "drawings",
    "validation",
    "keep_checkpoint",
    "tags",
    *(
        f"trainer.{name}"
        for name in (
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "deepspeed",
            "eval_strategy",
            "gradient_accumulation_steps",
            "activation_checkpointing",
            "gradient_checkpointing",
            "logging_steps",
            "report_to",
            "save_steps",
            "save_total_limit",
        )
    ),
}


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
    arguments = training_arguments(recipe)
    if recipe.optimizer.state_from is not None and last_whole_checkpoint(Path(str(arguments.output_dir))) is None:
        kept_checkpoint(recipe.optimizer.state_from)
    section = recipe.model
    if section.base is None:
        if recipe.text_tokenizer.path is None:
            check_vocab_size(recipe.text_tokenizer.vocab_size)
        if section.plan is None:
            build_plan(section.preset, section.num_hidden_layers, section.preset_arguments)
        else:
            plan_from_dicts(section.plan, section.num_hidden_layers)
        check_heads(section)
    return arguments


def train(recipe: TrainRecipe, progress: Progress | None = None) -> Trained:
    """Trains what the recipe says in its run folder, or goes on where an earlier call stopped.

    Every process that a launcher has started calls this; the first one writes what all share.

    Raises:
        UniXError: where recipe, data and model do not fit together, the loss is not a number, or the disk is full.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    arguments = check_before(recipe)
    run = RunFolder(recipe.run, recipe.model_dump(mode="json"), may_differ=MAY_DIFFER)
    if (run.path / "model").exists():
        return Trained(run.path / "model", read_metrics(run.path / "metrics.jsonl"), already_done=True)
    if arguments.process_index == 0:
        run.keep_others_away()

    keep_freed_memory()
    disable_progress_bar()  # of the files of a saved model
    set_seed(recipe.seed)
    start = make_start(recipe, arguments)
    renderer = make_renderer(recipe, start)
    check_codes_are_of(start.image_tokenizer, recipe.folders)
    checkpoint = last_whole_checkpoint(run.path / "checkpoints")
    standing = None if checkpoint is None else read_standing(checkpoint.path)
    stream = make_stream(recipe, arguments, renderer, standing)
    ground = {
        "data": stream.fingerprint,
        "tokenizers": tokenizers_fingerprint(start),
        "plan": plan_fingerprint(start.model),
    }
    if checkpoint is not None and standing is not None:
        _refuse_other_ground(recipe, ground, standing.ground)
        fit_to_launch(checkpoint, arguments)
    callbacks: list[TrainerCallback] = []
    if checkpoint is None and recipe.optimizer.state_from is not None:
        callbacks += [TakeOver(open_optimizer(kept_checkpoint(recipe.optimizer.state_from), arguments))]
    freeze(start.model, recipe.trainable)
    model = start.model if recipe.lora is None else add_adapters(start.model, recipe.lora)
    held_out = make_held_out(recipe, renderer, arguments.per_device_eval_batch_size)
    if arguments.process_index == 0:
        checkpoints = run.path / "checkpoints"
        run.begin()
        run.require(max(0, _checkpoint_bytes(model) + LOGS_BYTES - remove_halves(checkpoints)))
        save_tokenizers(start, checkpoints)
        tell_what_is_left_out(stream)
        tell_what_is_not_held_out(recipe)
    stop = StopOnSignal()
    metrics = Metrics(run.path / "metrics.jsonl", progress)
    reporters = reporters_at(run.path, arguments, recipe.tags) if arguments.process_index == 0 else nullcontext()
    with writing_into(run.path), told_in_one_line(), reporters:
        trainer = UniXTrainer(
            optimizer_section=recipe.optimizer,
            stream=stream,
            ground=ground,
            folders=names_of_folders([source.path for source in recipe.data.sources]),
            held_out=held_out,
            tokens_seen=(0, 0) if standing is None else standing.tokens_seen,
            model=model,
            args=arguments,
            callbacks=[StepsAsTheRecipeSays(), stop, metrics, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if recipe.drawings is not None:
            trainer.add_callback(Drawings(recipe.drawings, start, trainer, run.path / "drawings", recipe.seed))
        stop.trainer = trainer
        with stop:
            trainer.train_from(checkpoint)
            if stop.stopped:
                raise KeyboardInterrupt
            _save_finished(trainer, start, run, recipe)
            trainer.accelerator.wait_for_everyone()
    return Trained(run.path / "model", read_metrics(run.path / "metrics.jsonl"), already_done=False)


def _save_finished(trainer: UniXTrainer, start: ModelFolder, run: RunFolder, recipe: TrainRecipe) -> None:
    """The model folder, of which every process may have a part, and the figures of the step that it is of."""
    weights = trainer.whole_weights()
    if trainer.args.process_index == 0:
        finished = replace(start, model=merged(trainer.bare_model))
        figures = _figures(run, trainer.model_step)
        run.write_results({**figures, "processes": trainer.args.world_size, "seed": recipe.seed})
        card = model_card(recipe, finished.model.config, figures["final"])
        save_model_folder(finished, run.path / "model", weights, card)
        if not recipe.keep_checkpoint:
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)


def _figures(run: RunFolder, step: int) -> dict[str, dict[str, float]]:
    """What was logged last up to a step, of training and of validation."""
    found = {}
    for name, file in (("final", "metrics.jsonl"), ("validation", "validation.jsonl")):
        entries = [entry for entry in read_metrics(run.path / file) if entry["step"] <= step]
        found[name] = entries[-1] if entries else {}
    return found


def _refuse_other_ground(recipe: TrainRecipe, now: dict[str, str], then: dict[str, str]) -> None:
    """Raises `RunError` where what a checkpoint was trained on is not what there is now."""
    if changed := [what for what in now if now[what] != then.get(what)]:
        raise RunError(
            f"{recipe.run}: the {changed[0]} of this run changed since its last checkpoint was written; put back what "
            "was there, or begin a new run (run=…)"
        )


def _checkpoint_bytes(model: nn.Module) -> int:
    """What two checkpoints take, of which one replaces the other, and the finished model."""
    sizes = [
        (parameter.requires_grad, getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()
    ]
    whole = sum(size for _, size in sizes)
    trained = sum(size for is_trained, size in sizes if is_trained)
    return 4 * (3 * whole + 2 * 2 * trained)
