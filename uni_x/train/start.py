"""What training starts from: a model folder, or a new model with its tokenizers."""

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from uni_x.data.encode import tokenizer_fingerprint
from uni_x.data.render import UNCONDITIONAL, separator_of
from uni_x.data.shards import iterate_samples
from uni_x.data.templates import load_template
from uni_x.data.text_tokenizer import (
    load_text_tokenizer,
    settle_special_tokens,
    special_ids,
    train_text_tokenizer,
)
from uni_x.errors import ConfigError, RecipeError, RunError
from uni_x.images import ImageTokenizer, load_image_tokenizer
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model.plan import plan_to_dicts
from uni_x.model_folder import ModelFolder, load_model_folder
from uni_x.recipe import LOSS_KEYS, ModelSection, TrainRecipe
from uni_x.train.arguments import shards_weights

logger = logging.getLogger(__name__)


def make_start(recipe: TrainRecipe, arguments: TrainingArguments | None = None) -> ModelFolder:
    """The model that training starts from, with its tokenizers: a base, or a new one.

    Of a base the sizes count; how it is trained, and how its prompts will look, is the recipe's. It is read straight
    to the GPU of `arguments`, so that no process holds a copy in the machine's memory; under ZeRO-3 and FSDP one
    process reads it, and each gets its part.
    """
    if recipe.model.base is not None:
        folder = load_model_folder(recipe.model.base, _device_to_read_to(arguments), torch.float32)
        for name, value in _training_settings(recipe, folder.text_tokenizer).items():
            setattr(folder.model.config, name, value)
        _mark_separator(folder.model.config, recipe, folder.text_tokenizer)
        return folder
    image_tokenizer = load_image_tokenizer(recipe.image_tokenizer)
    text_tokenizer = make_text_tokenizer(recipe, image_tokenizer.codebook_size)
    set_seed(recipe.seed)
    model = UniXForCausalLM(make_config(recipe, image_tokenizer, text_tokenizer))
    return ModelFolder(model, text_tokenizer, image_tokenizer)


def _device_to_read_to(arguments: TrainingArguments | None) -> torch.device:
    """The process's GPU, unless an engine takes the weights apart while they are read."""
    if arguments is None or shards_weights(arguments):
        return torch.device("cpu")
    return arguments.device


def _training_settings(recipe: TrainRecipe, text_tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The part of a model's configuration that says how it is trained and prompted; a template is kept in full."""
    rendering = recipe.data.render.model_dump(mode="json")
    if recipe.data.render.template is not None and text_tokenizer is not None:
        rendering["template"] = load_template(recipe.data.render.template, text_tokenizer)
    return {
        **{name: getattr(recipe.model, name) for name in LOSS_KEYS},
        "rendering": rendering,
        "image_sampling": recipe.image_sampling.model_dump(mode="json"),
    }


def tokenizers_fingerprint(folder: ModelFolder) -> str:
    """A digest of what ids mean: the entries of the text tokenizer, and the image tokenizer."""
    entries = sorted(folder.text_tokenizer.get_vocab().items())
    of_images = tokenizer_fingerprint(folder.image_tokenizer)
    return hashlib.sha256(json.dumps([entries, of_images]).encode()).hexdigest()


def plan_fingerprint(model: UniXForCausalLM) -> str:
    """A digest of the plan and of the sizes of the parameters."""
    shapes = [(name, list(getattr(weight, "ds_shape", weight.shape))) for name, weight in model.named_parameters()]
    return hashlib.sha256(json.dumps([plan_to_dicts(model.config.layer_specs), shapes]).encode()).hexdigest()


def check_heads(section: ModelSection) -> None:
    """Raises `RecipeError` for sizes that heads cannot share, or whose heads cannot be rotated."""
    if section.head_dim is None and section.hidden_size % section.num_attention_heads:
        raise RecipeError(
            f"model.hidden_size: {section.hidden_size} cannot be shared by {section.num_attention_heads} heads; take a "
            "multiple of model.num_attention_heads, or say model.head_dim"
        )
    head_dim = section.head_dim or section.hidden_size // section.num_attention_heads
    if head_dim < 2 or head_dim % 2:
        raise RecipeError(
            f"model.hidden_size: {section.hidden_size} over {section.num_attention_heads} heads gives a head_dim of "
            f"{head_dim}, which must be even"
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
    tokenizer = load_text_tokenizer(section.path, "text_tokenizer.path")
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
