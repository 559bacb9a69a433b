"""From a recipe to a trained model folder, resumable at every step, in one process or many."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PrinterCallback, TrainingArguments, set_seed

from uni_x.data.collate import Collator
from uni_x.data.dataset import Batch, Source, TrainingStream, held_out_batches, start_positions
from uni_x.data.encode import read_fingerprint, tokenizer_fingerprint
from uni_x.data.render import Renderer, Vocabulary
from uni_x.data.text_tokenizer import check_vocab_size
from uni_x.devices import keep_freed_memory
from uni_x.errors import DataError, RunError
from uni_x.images import ImageTokenizer
from uni_x.model.plan import build_plan, plan_from_dicts
from uni_x.model.size import measure_size
from uni_x.model_folder import save_model_folder, save_tokenizers
from uni_x.recipe import TrainRecipe
from uni_x.runs import RunFolder, writing_into
from uni_x.train.arguments import training_arguments
from uni_x.train.callbacks import Drawings, Metrics, StopOnSignal, read_metrics
from uni_x.train.card import model_card
from uni_x.train.checkpoints import Standing, last_whole_checkpoint, optimizer_file, read_standing, remove_halves
from uni_x.train.failures import told_in_one_line
from uni_x.train.reporters import settle_reporters
from uni_x.train.start import check_heads, make_start, tokenizers_fingerprint
from uni_x.train.trainable import add_adapters, freeze, merged
from uni_x.train.trainer import UniXTrainer
from uni_x.train.universal import fit_to_launch

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]

CHECKPOINT_COPIES = 8  # weights, two optimizer moments and gradients, twice while a checkpoint replaces another
LOGS_BYTES = 20 * 2**20
MAY_DIFFER = {  # when a run goes on
    "device",
    "keep_checkpoint",
    "tags",
    *(
        f"trainer.{name}"
        for name in (
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "deepspeed",
            "gradient_accumulation_steps",
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
    if recipe.optimizer.state_from is not None:
        optimizer_file(recipe.optimizer.state_from)
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
    model_dir = run.path / "model"
    if model_dir.exists():
        return _finish(run, recipe, arguments, already_done=True)

    keep_freed_memory()
    set_seed(recipe.seed)
    start = make_start(recipe, arguments)
    renderer = Renderer(
        start.text_tokenizer,
        Vocabulary.from_config(start.model.config),
        recipe.data.render,
        recipe.data.stage,
    )
    check_codes_are_of(start.image_tokenizer, recipe)
    checkpoint = last_whole_checkpoint(run.path / "checkpoints")
    standing = None if checkpoint is None else read_standing(checkpoint.path)
    stream = _make_stream(recipe, arguments, renderer, standing)
    tokenizers = tokenizers_fingerprint(start)
    if checkpoint is not None and standing is not None:
        _refuse_other_ground(recipe, stream, tokenizers, standing)
        fit_to_launch(checkpoint, arguments)
    held_out = _held_out(recipe, renderer, arguments.per_device_eval_batch_size)
    if arguments.process_index == 0:
        checkpoints = run.path / "checkpoints"
        needs = CHECKPOINT_COPIES * 4 * measure_size(start.model.config).total + LOGS_BYTES
        run.begin(needs_bytes=max(0, needs - remove_halves(checkpoints)))
        save_tokenizers(start, checkpoints)
        _tell_what_is_left_out(stream)
    settle_reporters(arguments, run.path, recipe.tags)
    freeze(start.model, recipe.trainable)
    model = start.model if recipe.lora is None else add_adapters(start.model, recipe.lora)
    stop = StopOnSignal()
    metrics = Metrics(run.path / "metrics.jsonl", progress)
    trainer = UniXTrainer(
        optimizer_section=recipe.optimizer,
        stream=stream,
        tokenizers=tokenizers,
        folders=[Path(source.path).name for source in recipe.data.sources],
        held_out=held_out,
        tokens_seen=(0, 0) if standing is None else standing.tokens_seen,
        model=model,
        args=arguments,
        callbacks=[stop, metrics],
    )
    stop.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if recipe.drawings is not None:
        trainer.add_callback(Drawings(recipe.drawings, start, run.path / "drawings", recipe.seed))
    with writing_into(run.path), told_in_one_line(), stop:
        trainer.train_from(checkpoint)
        if stop.stopped:
            raise KeyboardInterrupt
        weights = trainer.whole_weights()
        if arguments.process_index == 0:
            finished = replace(start, model=merged(trainer.bare_model))
            save_model_folder(finished, model_dir, weights, model_card(recipe, finished.model.config, metrics.last()))
            if not recipe.keep_checkpoint:
                shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    return _finish(run, recipe, arguments, already_done=False)


def _finish(run: RunFolder, recipe: TrainRecipe, arguments: TrainingArguments, already_done: bool) -> Trained:
    metrics = read_metrics(run.path / "metrics.jsonl")
    if arguments.process_index == 0 and not run.results_file.exists():
        validation = read_metrics(run.path / "validation.jsonl")
        run.write_results(
            {
                "final": metrics[-1] if metrics else {},
                "validation": validation[-1] if validation else {},
                "processes": arguments.world_size,
                "seed": recipe.seed,
            }
        )
    return Trained(run.path / "model", metrics, already_done)


def _tell_what_is_left_out(stream: TrainingStream) -> None:
    forecast = stream.forecast
    if forecast.dropped or forecast.split:
        logger.warning(
            "of the first %d sequences %d are longer than max_length (%d) and left out, and %d are cut into several",
            forecast.documents + forecast.dropped,
            forecast.dropped,
            forecast.max_length,
            forecast.split,
        )


def _held_out(recipe: TrainRecipe, renderer: Renderer, batch_size: int) -> list[Batch]:
    section = recipe.validation
    if section is None:
        return []
    return held_out_batches(
        section.sources,
        renderer,
        _collator(renderer),
        recipe.data.max_length,
        batch_size,
        section.samples,
        packing=recipe.data.packing != "none",
    )


def _collator(renderer: Renderer) -> Collator:
    vocabulary = renderer.vocabulary
    return Collator(vocabulary.image_token_offset + vocabulary.image_codebook_size, vocabulary.pad_token_id)


def _make_stream(
    recipe: TrainRecipe,
    arguments: TrainingArguments,
    renderer: Renderer,
    standing: Standing | None,
) -> TrainingStream:
    """This process's batches, from where the checkpoint has left them."""
    data = recipe.data
    former = None if standing is None else standing.positions
    positions = start_positions(arguments.world_size, arguments.dataloader_num_workers, former)
    return TrainingStream(
        [Source(source.path, source.weight, source.fraction) for source in data.sources],
        renderer,
        _collator(renderer),
        data.max_length,
        arguments.per_device_train_batch_size,
        recipe.seed,
        packing=data.packing != "none",
        split_long_texts=data.long_texts == "split",
        position=positions[arguments.process_index],
    )


def _refuse_other_ground(recipe: TrainRecipe, stream: TrainingStream, tokenizers: str, standing: Standing) -> None:
    """Raises `RunError` where what a checkpoint was trained on is not what there is now."""
    for what, then, now in (
        ("data", standing.data, stream.fingerprint),
        ("tokenizers", standing.tokenizers, tokenizers),
    ):
        if then != now:
            raise RunError(
                f"{recipe.run}: the {what} of this run changed since its last checkpoint was written; put them back "
                "as they were, or begin a new run (run=…)"
            )


def check_codes_are_of(tokenizer: ImageTokenizer, recipe: TrainRecipe) -> None:
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
