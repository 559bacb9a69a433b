"""`uni-x info` and `uni-x env`: what a model is made of, and what this machine has."""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from uni_x.devices import bfloat16_is_fast, choose_device, choose_dtype
from uni_x.errors import DataError
from uni_x.model import UniXConfig
from uni_x.model.plan import LayerSpec
from uni_x.model.size import LayerSize, measure_size
from uni_x.recipe import TrainRecipe, load_recipe
from uni_x.runs import installed_versions

COLUMNS = "{:<7} {:<9} {:<9} {:<9} {:<22} {:<5} {:>10} {:>10} {:>10}"


def describe(path: Path) -> Iterator[str]:
    """Lines that show the plan and the parameters of a model folder or of a training recipe.

    Raises:
        UniXError: for a path that is neither.
    """
    config = _config_of(path)
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
    yield COLUMNS.format("layer", "norms", "q/k/v", "output", "ffn", "sees", "shared", "text", "image")
    for index, (spec, layer) in enumerate(zip(config.layer_specs, size.layers, strict=True)):
        yield _row(index, spec, layer)
    yield ""
    yield f"parameters          {size.total:>14,}"
    yield f"  a text token      {size.active_text:>14,}"
    yield f"  an image token    {size.active_image:>14,}"
    yield f"  embedding, head   {size.embedding:>14,} {size.head:>14,}"


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
        file = path / "config.json"
        if not file.is_file():
            raise DataError(f"{path}: not a model folder (it has no config.json)")
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{file}: not valid JSON") from None
        if tree.get("model_type") != UniXConfig.model_type:
            raise DataError(f"{file}: not a Uni-X model (its model_type is {tree.get('model_type')!r})")
        return UniXConfig(**tree)
    if path.suffix not in (".yaml", ".yml"):
        raise DataError(f"{path}: neither a model folder nor a recipe (.yaml)")
    from uni_x.train.run import make_start

    return make_start(load_recipe(path, TrainRecipe)).model.config


def _row(index: int, spec: LayerSpec, size: LayerSize) -> str:
    ffn: str = spec.ffn
    if spec.image_ffn_size is not None:
        ffn += f", image {spec.image_ffn_size}"
    if spec.shared_ffn_size:
        ffn += f", shared {spec.shared_ffn_size}"
    return COLUMNS.format(
        index,
        spec.norms,
        spec.qkv,
        spec.output,
        ffn,
        spec.sees,
        f"{size.shared:,}",
        f"{size.text:,}",
        f"{size.image:,}",
    )
