"""From a pretrained LLM to a Uni-X model, and back to the plain LLM inside one.

The backbone here is that of Qwen2, Qwen3 and Llama, under their own names, so the text path of the result computes what
the LLM did, to the last bit that a larger vocabulary leaves alone.
"""

import importlib.util
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

from uni_x.convert import BACKBONE_SIZES
from uni_x.data.text_tokenizer import settle_special_tokens, special_ids
from uni_x.errors import ConfigError, DataError, MissingExtraError, one_line
from uni_x.images import ImageTokenizer
from uni_x.model import UniXConfig, UniXForCausalLM
from uni_x.model_folder import ModelFolder, refuse_incomplete

logger = logging.getLogger(__name__)

NewRows = Literal["mean", "codebook"]
BASES = ("llama", "qwen2", "qwen3")
KEPT = (*BACKBONE_SIZES, "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Base:
    """A pretrained LLM with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(source: str, dtype: torch.dtype | None = None) -> Base:
    """Reads a pretrained LLM.

    Args:
        source: a folder, a GGUF file (its weights are dequantised), or the id of a model on the hub.
        dtype: of the weights; None for that in which they are stored, and float32 for a GGUF file.

    Raises:
        DataError: for what is not there or cannot be read.
        ConfigError: for an LLM of another kind.
        MissingExtraError: for a GGUF file without the package that reads it.
    """
    path, options = source, dict[str, Any]()
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file")
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("gguf", "gguf")
        path, options = str(Path(source).parent), {"gguf_file": Path(source).name}
        dtype = dtype or torch.float32
    elif Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise DataError(f"{source}: not a model folder (it has no config.json)")
    elif not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise DataError(f"{source}: no such folder, and not the id of a model on the hub (OWNER/NAME)")
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        _refuse_unknown(source, AutoConfig.from_pretrained(path, **options))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        nowhere = "" if Path(source).exists() else "no such folder, and as a model on the hub it "
        raise DataError(f"{source}: {nowhere}cannot be loaded ({one_line(error, 300)})") from None
    model, report = loaded
    refuse_incomplete(source, report["missing_keys"], report["unexpected_keys"])
    return Base(model.eval(), tokenizer)


def extend(
    base: Base,
    image_tokenizer: ImageTokenizer,
    plan: Mapping[str, Any],
    new_rows: NewRows = "mean",
    init_vision_with_text: bool = False,
    seed: int = 0,
    separator: str | None = None,
) -> ModelFolder:
    """A Uni-X model whose text path is the pretrained LLM.

    The tokenizer gains the image markers and the separator where it lacks them; image codes follow behind its last
    token.

    Args:
        base: the LLM.
        image_tokenizer: for the number of codes, the grid and, perhaps, the code vectors.
        plan: `preset` and `preset_arguments`, or `plan`, as in `UniXConfig`.
        new_rows: of embedding and head for markers and codes. `mean` is the mean of the text rows for all of them;
            `codebook` spreads the codes around it as their code vectors lie (through a random projection), as wide as
            the text rows are spread.
        init_vision_with_text: whether layers for images start as copies of those for text; random otherwise.
        seed: of random weights.
        separator: a token that is to stand between image codes (`data.render.vis_sep` of recipes), and thus travels
            with them.

    Raises:
        ConfigError: for a plan that does not fit, or image layers of another width that cannot be copies.
    """
    known = len(base.tokenizer)
    settle_special_tokens(base.tokenizer, *([] if separator is None else [separator]))
    config = _extended_config(base, image_tokenizer, plan, separator)
    torch.manual_seed(seed)
    model = UniXForCausalLM._from_config(config, dtype=base.model.dtype)
    weights = dict(base.model.state_dict())
    codes = image_tokenizer.codebook.cpu() if new_rows == "codebook" else None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = _extended_rows(weights[name][:known], config, codes, seed)
    if init_vision_with_text:
        weights |= _copies_for_images(model.state_dict(), weights)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise ConfigError(f"the base has weights that have no place: {', '.join(unexpected[:3])}")
    left = [name for name in missing if ".image." not in name and ".shared_mlp." not in name]
    assert not left, left
    for layer in model.model.layers:
        if layer.shared_mlp is not None:
            torch.nn.init.zeros_(layer.shared_mlp.down_proj.weight)  # adds nothing until it has learned
    model.tie_weights()
    model.generation_config = base.model.generation_config
    return ModelFolder(model.eval(), base.tokenizer, image_tokenizer)


def to_base(model: UniXForCausalLM) -> PreTrainedModel:
    """The plain LLM that text tokens pass: what images have of their own, and their rows, are left out.

    Raises:
        ConfigError: where text passes something that no plain LLM has.
    """
    config = model.config
    for index, spec in enumerate(config.layer_specs):
        if spec.shared_ffn_size:
            raise ConfigError(f"layer {index}: text passes a second FFN, which a plain LLM does not have")
    text_rows = config.image_token_offset
    kind: Any = _plain_kind(config)
    plain = kind(
        **{name: getattr(config, name) for name in KEPT},
        vocab_size=text_rows,
        head_dim=config.head_dim,
        pad_token_id=config.pad_token_id,
    )
    result = AutoModelForCausalLM.from_config(plain, dtype=model.dtype)
    weights = {name: weight for name, weight in model.state_dict().items() if ".image." not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:text_rows].clone()
    result.load_state_dict(weights)
    result.generation_config = model.generation_config
    return result.eval()


def _plain_kind(config: UniXConfig) -> type[PreTrainedConfig]:
    if config.qk_norm and config.attention_bias:
        raise ConfigError("no plain LLM known here has both q/k norms and biases on q, k and v")
    if config.qk_norm:
        return Qwen3Config
    return Qwen2Config if config.attention_bias else LlamaConfig


def _refuse_unknown(source: str, config: PreTrainedConfig) -> None:
    kind = config.model_type
    if kind not in BASES:
        raise ConfigError(f"{source}: a model of the kind {kind}; known are {', '.join(BASES)}")
    odd = {
        "hidden_act": getattr(config, "hidden_act", "silu") != "silu",
        "mlp_bias": getattr(config, "mlp_bias", False),
        "attention_bias": kind != "qwen2" and getattr(config, "attention_bias", False),
        "use_sliding_window": getattr(config, "use_sliding_window", False),
    }
    for name, present in odd.items():
        if present:
            raise ConfigError(f"{source}: {name}: {getattr(config, name)} is not something that this backbone has")


def _extended_config(
    base: Base, image_tokenizer: ImageTokenizer, plan: Mapping[str, Any], separator: str | None
) -> UniXConfig:
    plain, tokenizer = base.model.config, base.tokenizer
    offset = len(tokenizer)
    kept: dict[str, Any] = {name: getattr(plain, name, None) for name in KEPT}
    kept |= special_ids(tokenizer) | {"eos_token_id": plain.eos_token_id}
    markers = {kept["vision_start_token_id"]}
    if separator is not None:
        markers.add(tokenizer.convert_tokens_to_ids(separator))
    return UniXConfig(
        **kept,
        **plan,
        head_dim=getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads,
        attention_bias=plain.model_type == "qwen2",
        qk_norm=plain.model_type == "qwen3",
        vocab_size=offset + image_tokenizer.codebook_size,
        image_token_offset=offset,
        image_codebook_size=image_tokenizer.codebook_size,
        image_grid=list(image_tokenizer.grid),
        image_marker_ids=sorted(markers),
        dtype=base.model.dtype,
    )


def _extended_rows(text: torch.Tensor, config: UniXConfig, codebook: torch.Tensor | None, seed: int) -> torch.Tensor:
    """The rows of the base's tokens as they are, then new ones for markers and codes."""
    mean = text.float().mean(dim=0)
    new = mean.expand(config.vocab_size - text.shape[0], -1)
    if codebook is not None:
        count = config.image_codebook_size
        new = torch.cat((new[:-count], mean + text.float().std(dim=0) * _spread(codebook, text.shape[1], seed)))
    return torch.cat((text, new.to(text.dtype)))


def _spread(codebook: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Code vectors `(codes, embed_dim)` projected to `(codes, width)`, with mean 0 and variance 1 in each column."""
    generator = torch.Generator().manual_seed(seed)
    projected = codebook.float() @ torch.randn(codebook.shape[1], width, generator=generator)
    return (projected - projected.mean(dim=0)) / projected.std(dim=0).clamp(min=1e-6)


def _copies_for_images(
    wanted: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    copies = {}
    for name, weight in wanted.items():
        if ".image." not in name:
            continue
        original = weights[name.replace(".image.", ".")]
        if original.shape != weight.shape:
            raise ConfigError(
                f"{name} has the shape {tuple(weight.shape)} and cannot start as a copy of the text weight, which has "
                f"{tuple(original.shape)}; leave out image_ffn_size, or init_vision_with_text"
            )
        copies[name] = original
    return copies
