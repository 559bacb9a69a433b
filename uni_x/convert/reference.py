"""Reads checkpoints in the layout of the published research code.

Which of its architectures a checkpoint has is told by the names of its weights. What text tokens use keeps its name;
what image tokens have of their own moves below `image` of the same layer.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from uni_x.convert import BACKBONE_SIZES
from uni_x.errors import DataError, one_line
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model_folder import refuse_incomplete

logger = logging.getLogger(__name__)

KEPT = (*BACKBONE_SIZES, "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def load_reference(folder: str | Path, image_token_offset: int | None = None) -> UniXForCausalLM:
    """A model from a folder with `config.json` and safetensors in the published layout, in its dtype and in eval mode.

    Args:
        folder: the checkpoint.
        image_token_offset: id of image code 0, for dense checkpoints, whose configuration does not say it; all rows
            from there on count as codes then. Without it such a checkpoint is a model of text alone.

    A separator between codes is named in the configuration's `rendering`; its id, which a text tokenizer tells, is not
    among `image_marker_ids` yet.

    Raises:
        DataError: for a missing file, or weights that do not fit the configuration.
    """
    folder = Path(folder)
    settings, weights = _read(folder)
    try:
        _refuse_unbuilt(folder, settings)
        offset = settings.get("real_text_vocab_size", image_token_offset)
        config = _config(settings, weights, settings["vocab_size"] if offset is None else offset)
        config.rendering = _rendering(folder, settings)
        model = UniXForCausalLM(config).eval()
        missing, unexpected = model.load_state_dict(_rename_all(weights, config), strict=False)
    except KeyError as error:
        raise DataError(f"{folder / 'config.json'}: the key {error} is missing") from None
    except RuntimeError as error:
        raise DataError(f"{folder}: weights do not fit the configuration ({one_line(error, 300)})") from None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    refuse_incomplete(folder, set(missing) - tied, unexpected)
    model.tie_weights()
    dtypes = {weight.dtype for weight in weights.values()}
    return model.to(dtypes.pop()) if len(dtypes) == 1 else model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config_file, files = folder / "config.json", sorted(folder.glob("model*.safetensors"))
    if not config_file.is_file() or not files:
        raise DataError(f"{folder}: a checkpoint holds config.json and model.safetensors")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from None
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{config_file}: not valid JSON") from None
    if not isinstance(settings, dict):
        raise DataError(f"{config_file}: holds no mapping")
    return settings, weights


def _refuse_unbuilt(folder: Path, settings: Mapping[str, Any]) -> None:
    """Options of the published code that change what it computes, and that are not built here."""
    for name, off in {"skip_connection_loc": (None, -1), "all_modal_visible": (None, 0)}.items():
        if settings.get(name) not in off:
            raise DataError(f"{folder / 'config.json'}: {name}: {settings[name]} is not something that is built here")


def _rendering(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """How pictures are laid out, where it is not as by default."""
    if settings.get("add_sep_for_vis") in (None, 0):
        return None
    token, every = settings["vis_sep_tokens"], str(settings["vis_sep_lens"])
    if not every.isdecimal() or every == "0":
        raise DataError(
            f"{folder / 'config.json'}: vis_sep_lens: {every}: one number of codes is what is built here, with a token "
            "behind each so many"
        )
    return {"vis_sep": {"every": int(every), "token": token}}


def _config(settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor], offset: int) -> UniXConfig:
    kind = settings.get("model_type")
    first_layer = "model.layers.0.self_attn"
    marker = settings.get("vision_start_id")
    behind = settings["vocab_size"] - offset
    codes = min(settings.get("vision_vocab_size", behind), behind)
    return UniXConfig(
        **{name: settings[name] for name in KEPT if name in settings},
        **_plan(settings, " ".join(weights)),
        head_dim=settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        rope_parameters=_rope(settings),
        attention_bias=kind == "qwen2" or f"{first_layer}.q_proj.bias" in weights,
        qk_norm=kind == "qwen3" or f"{first_layer}.q_norm.weight" in weights,
        tie_word_embeddings=settings.get("tie_word_embeddings", "lm_head.weight" not in weights),
        image_token_offset=offset,
        image_codebook_size=codes,
        vision_start_token_id=marker if marker is not None and marker < offset else None,
    )


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_parameters" in settings:
        return dict(settings["rope_parameters"])
    return {"rope_type": "default", **(settings.get("rope_scaling") or {}), "rope_theta": settings["rope_theta"]}


def _plan(settings: Mapping[str, Any], names: str) -> dict[str, Any]:
    """The preset or the plan that has the weights' names, or that the configuration promises."""
    promised = settings.get("num_vision_encode_layers", 0) + settings.get("num_vision_decode_layers", 0) > 0
    apart = ("mlp.vis_gate_proj", "self_attn.vis_q_proj")  # architectures that leave those numbers unused
    if (
        "vision_encode_layers" in names
        or "vision_decode_layers" in names
        or (promised and not any(name in names for name in apart))
    ):
        ends = {"first": settings["num_vision_encode_layers"], "last": settings["num_vision_decode_layers"]}
        if not settings.get("add_share_ffn", "mlp.share_gate_proj" in names or "mlp.vision_gate_proj" in names):
            return {"preset": "uni-x", "preset_arguments": ends}
        sizes = {"image_ffn_size": settings["ffn_vision_size"], "shared_ffn_size": settings["ffn_share_size"]}
        return {"preset": "uni-share", "preset_arguments": ends | sizes}
    if "self_attn.vis_q_proj" in names:
        # the published MoT shares its layer norms and its output projection
        layer = {"qkv": "separate", "ffn": "separate", "image_ffn_size": settings["ffn_vision_size"]}
        return {"plan": [layer] * settings["num_hidden_layers"]}
    if "mlp.vis_gate_proj" in names:
        return {"preset": "moe", "preset_arguments": {"step": settings["decoder_sparse_step"]}}
    return {"preset": "shared"}


def rename(name: str, config: UniXConfig) -> str:
    """The name here of a weight of the published layout."""
    last = (config.preset_arguments or {}).get("last", 0)
    start = config.num_hidden_layers - last
    name = re.sub(r"^model\.vision_encode_layers\.(\d+)", r"model.layers.\1.image", name)
    name = re.sub(r"^model\.vision_decode_layers\.(\d+)", lambda m: f"model.layers.{start + int(m[1])}.image", name)
    name = re.sub(r"\.(self_attn|mlp)\.(?:vis|vision)_", r".image.\1.", name)
    return name.replace(".mlp.share_", ".shared_mlp.")


def _rename_all(weights: Mapping[str, torch.Tensor], config: UniXConfig) -> dict[str, torch.Tensor]:
    # vis_o_proj is stored, but no computation of the published code uses it
    return {rename(name, config): weight for name, weight in weights.items() if not name.endswith("vis_o_proj.weight")}
