"""`uni-x init` and `uni-x convert`: models of others to ours, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from uni_x.convert.pretrained import NewRows, extend, load_base, to_base
from uni_x.convert.reference import load_reference
from uni_x.data.render import separator_of
from uni_x.data.text_tokenizer import VISION_START, settle_special_tokens, special_ids
from uni_x.errors import ConfigError, DataError, RecipeError, UsageError, one_line
from uni_x.images import ImageTokenizer, load_image_tokenizer
from uni_x.model import UniXConfig
from uni_x.model.plan import read_preset
from uni_x.model_folder import (
    IMAGE_TOKENIZER,
    load_model,
    save_model_folder,
    saving_whole,
)
from uni_x.recipe import RenderOptions
from uni_x.runs import refuse_to_overwrite

REFERENCE, BASE = "reference", "base"

Tell = Callable[[str], None]


def init(
    base: str,
    image_tokenizer: str,
    plan: str,
    out: Path,
    new_rows: NewRows = "mean",
    init_vision_with_text: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    separator: str | None = None,
) -> int:
    """Makes a Uni-X model out of a pretrained LLM, as a complete model folder.

    Args:
        base: a folder, a GGUF file, or the id of a model on the hub.
        image_tokenizer: a folder, or `scenes`.
        plan: a preset as `uni-x(12, 6)`, or a YAML file with a plan by layer or by range.
        out: the model folder to write.
        new_rows, init_vision_with_text, seed, separator: see `uni_x.convert.pretrained.extend`.
        dtype: float32, bfloat16 or float16; None for that of the base.

    Returns:
        The number of parameters.

    Raises:
        UniXError: for what is not there or does not fit, and a folder that holds something already.
    """
    chosen = _read_plan(plan)
    refuse_to_overwrite(out)
    tokenizer = load_image_tokenizer(image_tokenizer)
    source = load_base(base, None if dtype is None else getattr(torch, dtype))
    folder = extend(source, tokenizer, chosen, new_rows, init_vision_with_text, seed, separator)
    save_model_folder(folder, out)
    return folder.model.num_parameters()


def convert(
    source: Path,
    destination: Path,
    read_from: str | None,
    write_to: str | None,
    tell: Tell = print,
    image_tokenizer: str | None = None,
    text_tokenizer: Path | None = None,
    image_token_offset: int | None = None,
) -> None:
    """Reads a checkpoint in the layout of the published research code, or writes the plain LLM inside a model.

    Args:
        source, destination: folders.
        read_from: `reference` where the source has the published layout, None where it is ours.
        write_to: `base` for a plain LLM, None for ours.
        tell: hears of what the destination lacks.
        image_tokenizer, text_tokenizer: to complete a published checkpoint with.
        image_token_offset: id of image code 0, for dense published checkpoints, which do not say it.

    Raises:
        UniXError: for what is not there or does not fit, and a destination that holds something already.
    """
    if (read_from is None) == (write_to is None):
        raise UsageError(f"say either --from {REFERENCE} or --to {BASE}")
    refuse_to_overwrite(destination)
    if write_to is not None:
        model = load_model(source)
        with saving_whole(destination) as partial:
            to_base(model).save_pretrained(partial)
            if _has_text_tokenizer(source):
                AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(partial)
        return
    if text_tokenizer is not None and not _has_text_tokenizer(text_tokenizer):
        raise DataError(f"{text_tokenizer}: no text tokenizer here")
    model = load_reference(source, image_token_offset)
    images = None if image_tokenizer is None else load_image_tokenizer(image_tokenizer)
    words, lacking = None, []
    if images is None:
        lacking.append("an image tokenizer (--image-tokenizer)")
    else:
        _take_image_tokenizer(model.config, images)
    if _has_text_tokenizer(text_tokenizer or source):
        words = AutoTokenizer.from_pretrained(text_tokenizer or source, local_files_only=True)
        _take_text_tokenizer(model.config, words)
    elif model.config.rendering is not None:
        raise UsageError(f"--text-tokenizer is missing: {source} has separators between codes, whose id it tells")
    else:
        lacking.append("a text tokenizer (--text-tokenizer)")
    with saving_whole(destination) as partial:
        model.save_pretrained(partial)
        if images is not None:
            images.save_pretrained(partial / IMAGE_TOKENIZER)
        if words is not None:
            words.save_pretrained(partial)
    if lacking:
        tell(f"warning: {destination} lacks {' and '.join(lacking)}; it loads as a model, but cannot draw or write")


def _take_image_tokenizer(config: UniXConfig, tokenizer: ImageTokenizer) -> None:
    if tokenizer.codebook_size != config.image_codebook_size:
        raise ConfigError(
            f"the image tokenizer has {tokenizer.codebook_size} codes, the checkpoint {config.image_codebook_size}"
        )
    config.image_grid = list(tokenizer.grid)


def _take_text_tokenizer(config: UniXConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    settle_special_tokens(tokenizer)
    if len(tokenizer) > config.image_token_offset:
        raise ConfigError(
            f"the text tokenizer has {len(tokenizer)} tokens, but image codes begin at {config.image_token_offset}"
        )
    ids, start = special_ids(tokenizer), config.vision_start_token_id
    marker = ids["vision_start_token_id"]
    if start is not None and start != marker:
        raise ConfigError(f"the text tokenizer's {VISION_START} is {marker}, the checkpoint's {start}")
    for name, value in ids.items():
        setattr(config, name, value)
    separator = separator_of(tokenizer, RenderOptions(**config.rendering or {}))
    config.image_marker_ids = sorted({marker, *([] if separator is None else separator[:1]), *config.image_marker_ids})


def _read_plan(plan: str) -> dict[str, Any]:
    if not plan.endswith((".yaml", ".yml")):
        preset, arguments = read_preset(plan)
        return {"preset": preset, "preset_arguments": arguments}
    try:
        tree = yaml.safe_load(Path(plan).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{plan}: cannot be read ({one_line(error)})") from None
    entries = tree.get("plan") if isinstance(tree, dict) else tree
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{plan}: a plan is a list of mappings, by itself or under the key 'plan'")
    return {"plan": entries}


def _has_text_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
