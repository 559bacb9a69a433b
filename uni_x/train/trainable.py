"""Which parameters are trained: by patterns of their names, or as low-rank adapters."""

import importlib.util
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from uni_x.errors import MissingExtraError, RecipeError, one_line
from uni_x.model import UniXForCausalLM
from uni_x.recipe import LoraSection


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Lets alone train what the patterns name.

    Args:
        model: whose parameters they are.
        patterns: shell-style patterns of whole names, later ones count more; `!` in front takes out what it names.

    Raises:
        RecipeError: for a pattern that names no parameter, and where nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    chosen = dict.fromkeys(parameters, False)
    for pattern in patterns:
        named = [name for name in parameters if fnmatchcase(name, pattern.removeprefix("!"))]
        if not named:
            raise RecipeError(
                f"trainable: '{pattern}' names no parameter; they have names like {', '.join(list(parameters)[1:3])}"
            )
        chosen |= dict.fromkeys(named, not pattern.startswith("!"))
    if not any(chosen.values()):
        raise RecipeError(f"trainable: nothing is left to train by {', '.join(patterns)}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(chosen[name])


def add_adapters(model: UniXForCausalLM, section: LoraSection) -> Any:
    """A PEFT model around `model`, of which the adapters alone are trained, and the image rows where wanted.

    Raises:
        MissingExtraError: without PEFT.
        RecipeError: for target modules that are not there.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    from peft import LoraConfig, get_peft_model

    config = model.config
    targets = section.target_modules
    rows = None
    if section.image_rows:
        first = config.image_token_offset
        ids = sorted({*range(first, first + config.image_codebook_size), *config.image_marker_ids})
        rows = {"embed_tokens": ids} if config.tie_word_embeddings else {"embed_tokens": ids, "lm_head": ids}
    settings = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise RecipeError(f"lora: {one_line(error, 200)}") from None


def merged(model: Any) -> UniXForCausalLM:
    """The model itself, with its adapters, where it has some, worked into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
