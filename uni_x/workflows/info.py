"""`uni-x info` and `uni-x env`: what a model is made of, and what this machine has."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from uni_x.analysis.plots import plan_picture
from uni_x.devices import bfloat16_is_fast, choose_device, choose_dtype
from uni_x.errors import DataError
from uni_x.images import load_image_tokenizer
from uni_x.model import UniXConfig
from uni_x.model.plan import LayerSpec
from uni_x.model.size import (
    LayerSize,
    ModelSize,
    TrainingMemory,
    count_operations,
    measure_size,
    serving_memory,
    training_memory,
)
from uni_x.model_folder import read_model_config
from uni_x.recipe import TrainRecipe, load_recipe
from uni_x.runs import installed_versions, write_atomically

COLUMNS = "{:<8} {:<9} {:<9} {:<9} {:<{ffn}} {:<5} {:>12} {:>12} {:>12}"
SHARED_BAR, SEPARATE_BARS = "█████", "██ ██"


@dataclass(frozen=True)
class Load:
    """What memory and operations are counted for.

    Attributes:
        length: tokens of a document, and of a served sequence.
        tokens: in a training step on one device.
        rows: served at the same time; a guided drawing takes two.
        devices: that training is divided over.
        image_share: share of the tokens that are image tokens.
    """

    length: int = 2048
    tokens: int = 16384
    rows: int = 16
    devices: int = 8
    image_share: float = 0.75


def describe(path: Path, memory: bool = False, load: Load | None = None, picture: Path | None = None) -> Iterator[str]:
    """Lines that show the plan and the parameters of a model folder or of a training recipe.

    Args:
        path: of a model folder or a recipe.
        memory: whether to show what training and serving take.
        load: what operations and memory are counted for.
        picture: an SVG file to draw the plan into.

    Raises:
        UniXError: for a path that is neither.
    """
    config, load = _config_of(path), load or Load()
    size = measure_size(config)
    name = config.preset or "plan of its own"
    arguments = ", ".join(f"{key}={value}" for key, value in (config.preset_arguments or {}).items())
    yield f"{name}({arguments}): {config.num_hidden_layers} layers, hidden size {config.hidden_size}"
    yield (
        f"vocabulary {config.vocab_size:,}: text below {config.image_token_offset:,}, "
        f"{config.image_codebook_size:,} image codes"
        + (f", pictures of {config.image_grid}" if config.image_grid else "")
    )
    yield ""
    yield from _table(config, size)
    yield ""
    yield from _sketch(config)
    yield ""
    yield from _totals(config, size, load)
    if memory:
        yield ""
        yield from _memory(config, load)
    if picture is not None:
        write_atomically(picture, plan_picture(config.layer_specs))
        yield f"picture: {picture}"


def environment() -> dict[str, str]:
    """Versions, devices and dtypes."""
    device = choose_device()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        **installed_versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else "not available",
        "mps": "available" if torch.backends.mps.is_available() else "not available",
        "device": device,
        "dtype": choose_dtype(device),
        "fast bfloat16 on the cpu": bfloat16_is_fast(),
    }
    return {name: str(value) for name, value in facts.items()}


def _config_of(path: Path) -> UniXConfig:
    if path.is_dir():
        return read_model_config(path)
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(f"{path}: neither a model folder nor a recipe (.yaml)")
    from uni_x.train.start import make_config

    recipe = load_recipe(path, TrainRecipe)
    if recipe.model.base is not None:
        return read_model_config(recipe.model.base)
    return make_config(recipe, load_image_tokenizer(recipe.image_tokenizer))


def _table(config: UniXConfig, size: ModelSize) -> Iterator[str]:
    """A row for each run of equal layers, with the parameters of one of them."""
    runs = _runs(config)
    width = max(len("ffn"), *(len(_ffn(spec)) for _, _, spec in runs))
    yield COLUMNS.format("layers", "norms", "q/k/v", "output", "ffn", "sees", "shared", "text", "image", ffn=width)
    for first, last, spec in runs:
        yield _row(_layers(first, last), spec, size.layers[first], width)


def _runs(config: UniXConfig) -> list[tuple[int, int, LayerSpec]]:
    """Runs of equal layers: first and last index, and what the layers are made of."""
    runs = [list(run) for _, run in groupby(enumerate(config.layer_specs), key=lambda item: item[1])]
    return [(run[0][0], run[-1][0], run[0][1]) for run in runs]


def _row(layers: str, spec: LayerSpec, size: LayerSize, width: int) -> str:
    counts = (f"{count:,}" for count in (size.shared, size.text, size.image))
    return COLUMNS.format(layers, spec.norms, spec.qkv, spec.output, _ffn(spec), spec.sees, *counts, ffn=width)


def _ffn(spec: LayerSpec) -> str:
    ffn: str = spec.ffn
    if spec.image_ffn_size is not None:
        ffn += f", image {spec.image_ffn_size}"
    if spec.shared_ffn_size:
        ffn += f", shared {spec.shared_ffn_size}"
    return ffn


def _layers(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _sketch(config: UniXConfig) -> Iterator[str]:
    """The plan from the head down to the embedding: one bar for a part in common, two for one that each has."""
    yield "          norms  q/k/v  output ffn    sees     (left: text, right: images)"
    for first, last, spec in reversed(_runs(config)):
        bars = [SHARED_BAR if part == "shared" else SEPARATE_BARS for part in spec.parts]
        if spec.ffn == "separate" and spec.shared_ffn_size:
            bars[3] = "█████+" if spec.image_ffn_size == 0 else "██ ██+"
        sight = "● ●" if spec.sees == "own" else "●━●"
        yield f"{_layers(first, last):>8}  " + "  ".join(f"{bar:<5}" for bar in bars) + f"  {sight}"


def _totals(config: UniXConfig, size: ModelSize, load: Load) -> Iterator[str]:
    operations = count_operations(config, load.length, load.image_share)
    yield f"{'':<20}{'parameters':>18}{'FLOPs a token':>18}"
    yield f"{'all':<20}{size.total:>18,}{operations.mean:>18,.0f}"
    yield f"{'a text token':<20}{size.active_text:>18,}{operations.text:>18,.0f}"
    yield f"{'an image token':<20}{size.active_image:>18,}{operations.image:>18,.0f}"
    yield f"{'embedding':<20}{size.embedding:>18,}"
    yield f"{'head':<20}{f'{size.head:,}' if size.head else 'the embedding':>18}"
    yield (
        f"FLOPs are those of a forward pass in a document of {load.length:,} tokens, {load.image_share:.0%} of them "
        "image tokens; training takes three times as many."
    )


def _memory(config: UniXConfig, load: Load) -> Iterator[str]:
    yield f"training with AdamW, {load.tokens:,} tokens a step on each device, in MB"
    yield f"{'':<41}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'layers':>10}{'head':>10}{'sum':>10}"
    for words, stage in (
        ("1 device", 0),
        (f"{load.devices} devices, ZeRO-2", 2),
        (f"{load.devices} devices, ZeRO-3", 3),
    ):
        for dtype, weight_bytes in (("float32", 4), ("bfloat16", 2)):
            for suffix, checkpointing in (("", False), (", checkpointed", True)):
                taken = training_memory(
                    config, load.tokens, weight_bytes, stage, load.devices, checkpointing, load.image_share
                )
                yield f"{f'{words}, {dtype}{suffix}':<41}" + _in_megabytes(taken)
    yield ""
    yield f"serving {load.rows} rows of {load.length:,} tokens, in MB (a guided drawing takes two rows)"
    for dtype, weight_bytes in (("float32", 4), ("bfloat16", 2)):
        served = serving_memory(config, load.length, load.rows, weight_bytes)
        sizes = f"weights {served.weights / 1e6:,.0f}, cache {served.cache / 1e6:,.0f}, sum {served.total / 1e6:,.0f}"
        yield f"{dtype:<10}{sizes}"


def _in_megabytes(taken: TrainingMemory) -> str:
    parts = (taken.weights, taken.gradients, taken.optimizer, taken.activations, taken.head, taken.total)
    widths = (10, 11, 11, 10, 10, 10)
    return "".join(f"{part / 1e6:>{width},.0f}" for part, width in zip(parts, widths, strict=True))
