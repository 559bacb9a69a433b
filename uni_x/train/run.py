"""From a recipe to a trained model folder, resumable at every step."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from uni_x.data.collate import Collator
from uni_x.data.dataset import TrainingData
from uni_x.data.render import UNCONDITIONAL, Renderer, Vocabulary
from uni_x.data.shards import EncodedSamples
from uni_x.data.text_tokenizer import train_text_tokenizer
from uni_x.devices import choose_device, keep_freed_memory
from uni_x.errors import DataError, RecipeError, RunError
from uni_x.images import ImageTokenizer
from uni_x.images.tokenizer import scenes_tokenizer_folder
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model_folder import ModelFolder, load_model_folder, save_model_folder
from uni_x.recipe import ModelSection, TrainRecipe
from uni_x.runs import RunFolder
from uni_x.train.callbacks import MarkWholeCheckpoints, Metrics, StopOnSignal, last_whole_checkpoint, read_metrics
from uni_x.train.trainer import UniXTrainer

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
OWN_ARGUMENTS = {"output_dir", "seed", "data_seed", "use_cpu", "resume_from_checkpoint", "remove_unused_columns"}


@dataclass(frozen=True)
class Trained:
    """A finished training: the model folder, and what was logged on the way."""

    model_dir: Path
    metrics: list[dict[str, float]]
    already_done: bool


def train(recipe: TrainRecipe, progress: Progress | None = None) -> Trained:
    """Trains what the recipe says in its run folder, or goes on where an earlier call stopped.

    Raises:
        UniXError: where recipe, data and model do not fit together.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    arguments = _training_arguments(recipe)
    run = RunFolder(recipe.run, recipe.model_dump(mode="json"))
    run.log_to_file()
    metrics_file, model_dir = run.path / "metrics.jsonl", run.path / "model"
    if model_dir.exists():
        return Trained(model_dir, read_metrics(metrics_file), already_done=True)

    keep_freed_memory()
    set_seed(recipe.seed)
    start = make_start(recipe)
    renderer = Renderer(start.text_tokenizer, Vocabulary.from_config(start.model.config), recipe.data.render)
    stop = StopOnSignal()
    trainer = UniXTrainer(
        optimizer_section=recipe.optimizer,
        model=start.model,
        args=arguments,
        train_dataset=TrainingData(
            [(source.path, source.weight) for source in recipe.data.sources],
            renderer,
            recipe.data.max_length,
            recipe.data.rows_per_epoch,
            seed=recipe.seed,
            open_rows=recipe.data.open_rows,
        ),
        data_collator=Collator(start.model.config.vocab_size, renderer.vocabulary.pad_token_id),
        callbacks=[stop, Metrics(metrics_file, progress), MarkWholeCheckpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole_checkpoint(run.path / "checkpoints")
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        raise KeyboardInterrupt
    save_model_folder(ModelFolder(start.model, start.text_tokenizer, start.image_tokenizer), model_dir)
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    return Trained(model_dir, read_metrics(metrics_file), already_done=False)


def make_start(recipe: TrainRecipe) -> ModelFolder:
    """The model that training starts from, on the CPU, with its tokenizers: a base, or a new one."""
    if recipe.model.base is not None:
        return load_model_folder(recipe.model.base, dtype=torch.float32)
    image_tokenizer = load_image_tokenizer(recipe.image_tokenizer)
    text_tokenizer = _text_tokenizer(recipe, image_tokenizer.codebook_size)
    set_seed(recipe.seed)
    model = UniXForCausalLM(_config(recipe, text_tokenizer, image_tokenizer))
    return ModelFolder(model, text_tokenizer, image_tokenizer)


def load_image_tokenizer(name: str) -> ImageTokenizer:
    """An image tokenizer from its folder, or `scenes` for the one inside the package."""
    return ImageTokenizer.from_pretrained(scenes_tokenizer_folder() if name == "scenes" else name)


def _training_arguments(recipe: TrainRecipe) -> TrainingArguments:
    if taken := OWN_ARGUMENTS & set(recipe.trainer):
        raise RecipeError(f"trainer.{min(taken)}: the recipe settles this elsewhere; take the key out")
    device = choose_device(recipe.device)
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
    }
    try:
        return TrainingArguments(**settings)
    except TypeError as error:
        name = str(error).split("'")[1] if "'" in str(error) else str(error)
        raise RecipeError(f"trainer.{name}: not an argument of transformers' TrainingArguments") from None
    except ValueError as error:
        raise RecipeError(f"trainer: {' '.join(str(error).split())}") from None


def _config(
    recipe: TrainRecipe, text_tokenizer: PreTrainedTokenizerBase, image_tokenizer: ImageTokenizer
) -> UniXConfig:
    section: ModelSection = recipe.model
    sizes = section.model_dump(exclude={"base", "rope_theta", "preset", "preset_arguments", "plan"})
    offset = len(text_tokenizer)
    if section.plan is None:
        sizes |= {"preset": section.preset, "preset_arguments": section.preset_arguments}
    else:
        sizes |= {"plan": section.plan}
    markers: Any = text_tokenizer.convert_tokens_to_ids([VISION_START, VISION_END])
    return UniXConfig(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        vocab_size=offset + image_tokenizer.codebook_size,
        image_token_offset=offset,
        image_codebook_size=image_tokenizer.codebook_size,
        image_grid=list(image_tokenizer.grid),
        vision_start_token_id=markers[0],
        vision_end_token_id=markers[1],
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        rendering=recipe.data.render.model_dump(mode="json"),
        image_sampling=recipe.image_sampling.model_dump(mode="json"),
    )


def _text_tokenizer(recipe: TrainRecipe, codebook_size: int) -> PreTrainedTokenizerBase:
    section = recipe.text_tokenizer
    if section.path is None:
        return train_text_tokenizer(_texts(recipe, codebook_size), section.vocab_size)
    if not Path(section.path).is_dir():
        raise DataError(f"text_tokenizer.path: {section.path} is not a folder")
    tokenizer = AutoTokenizer.from_pretrained(section.path, local_files_only=True)
    added = tokenizer.add_special_tokens({"additional_special_tokens": [VISION_START, VISION_END]})
    if added:
        logger.info("the text tokenizer gained %d image markers", added)
    if tokenizer.eos_token_id is None:
        raise RunError(f"text_tokenizer.path: {section.path} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _texts(recipe: TrainRecipe, codebook_size: int) -> Iterator[str]:
    """All texts of the sources, and what stands for them in unconditional drawings."""
    for source in recipe.data.sources:
        for sample in EncodedSamples(source.path, codebook_size):
            if sample.messages:
                yield from (message.content for message in sample.messages)
            else:
                yield sample.caption or sample.text or ""
                if sample.caption is not None:
                    yield UNCONDITIONAL
