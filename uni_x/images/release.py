"""Reads the folder of a published VQGAN: `vqgan.yaml` beside `vqgan.ckpt`, as in the Chameleon release."""

import pickle
from pathlib import Path
from typing import Any

import torch
import yaml

from uni_x.errors import ConfigError, DataError, RecipeError, one_line
from uni_x.images.inert_pickle import read_inert
from uni_x.recipe import TokenizerConfig, check_recipe

# keys of `ddconfig` that say nothing new, with the one value that this network has
FIXED = {
    "in_channels": 3,
    "out_ch": 3,
    "double_z": False,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}
SIZES = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels", "dropout")


def read_release_config(path: Path) -> TokenizerConfig:
    """`vqgan.yaml` as our configuration. Raises `ConfigError` where it is another kind of network."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({one_line(error)})") from None
    params = _mapping(path, _mapping(path, tree, "model"), "params")
    ddconfig = dict(_mapping(path, params, "ddconfig"))
    for key, value in FIXED.items():
        if ddconfig.pop(key, value) != value:
            raise ConfigError(f"{path}: only {key}: {str(value).lower()} is known (a VQGAN that makes pictures in RGB)")
    resolution = ddconfig.pop("resolution", None)
    unknown = sorted(set(ddconfig) - set(SIZES))
    if unknown:
        raise ConfigError(f"{path}: unknown key '{unknown[0]}' in ddconfig")
    network = {"kind": "vqgan", "embed_dim": params.get("embed_dim"), **ddconfig}
    config = {"resolution": resolution, "codebook_size": params.get("n_embed"), "network": network}
    try:
        return check_recipe(config, TokenizerConfig, str(path))
    except RecipeError as error:
        raise ConfigError(str(error)) from None


def read_release_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of `vqgan.ckpt` by name. Raises `DataError` for a file that is missing, cut short or no checkpoint.

    The file is a pickle. No code that it names ever runs.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing beside vqgan.yaml")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError):
        content = read_inert(path)
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no state_dict")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _mapping(path: Path, tree: Any, key: str) -> dict[str, Any]:
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the section '{key}' is missing")
    return value
