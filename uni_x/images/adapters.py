"""The VQ networks that transformers carries, behind the interface of ours: those of Janus, Emu3 and Chameleon.

A folder is one of Hugging Face's: `config.json` beside safetensors of the VQ model alone, as its `save_pretrained`
writes it, or of the whole model, of which nothing but the VQ part is read. Modules and configurations are those of
transformers, so that weights keep their names; no pickle is opened and no code of a folder runs.

All three networks were made for pixels in [-1, 1], which is what they get here, and give their codes row by row. In
the releases of Janus and Emu3 the image processors say so too (mean and standard deviation 0.5). Chameleon's
processor in transformers multiplies by 0.0078 instead of 1 / 127.5, so that its white is 0.989; here it is 1, as in
Chameleon's own code.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from uni_x.errors import ConfigError, DataError, RecipeError, one_line
from uni_x.images.codebook import Codebook
from uni_x.recipe import SquarePictures, check_recipe

MODELS = {"janus": "janus_vqgan", "emu3": "emu3_vqgan", "chameleon": "chameleon_vqgan"}
"""The model types of whole models, each with that of its VQ part."""

EMU3_RESOLUTION = 512  # Emu3's configuration names none; its image processor makes no picture smaller than 512 x 512

# what describes a network, by the names of transformers; other keys say nothing of codes and pixels
SIZES = ("embed_dim", "latent_channels", "base_channels", "channel_multiplier", "num_res_blocks")
KEYS = {
    "janus_vqgan": (*SIZES, "num_embeddings"),
    "emu3_vqgan": (
        *SIZES,
        "codebook_size",
        "temporal_downsample_factor",
        "attn_resolutions",
        "hidden_size",
        "num_attention_heads",
    ),
    "chameleon_vqgan": (*SIZES, "num_embeddings", "resolution", "attn_resolutions", "attn_type"),
}
WHOLE_PREFIX = re.compile(r"(model\.)?vqmodel\.")  # what the names of the VQ part's weights begin with
ALONE_PREFIX = re.compile("")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class AdapterConfig(SquarePictures):
    """A VQ network of transformers: its model type, the side of its pictures, and its sizes by transformers' names."""

    model_type: Literal["janus_vqgan", "emu3_vqgan", "chameleon_vqgan"]
    network: dict[str, Any]

    @property
    def pixels_per_code(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return _pixels_per_code(self.network)

    @property
    def codebook_size(self) -> int:
        """Codes are 0 to this, less one."""
        return self.network["codebook_size" if self.model_type == "emu3_vqgan" else "num_embeddings"]

    def to_folder(self) -> dict[str, Any]:
        """The `config.json` of a folder with the VQ model alone, which transformers reads too."""
        content = {"model_type": self.model_type, **self.network, "image_size": self.resolution}
        if self.model_type == "janus_vqgan":
            content["num_patches"] = self.grid[0]
        return content


def read_adapter_config(path: Path, content: dict[str, Any], resolution: int | None = None) -> AdapterConfig:
    """The `config.json` at `path` as our configuration; its `content` has one of the model types known here.

    `resolution` takes the place of what the file says, which is `image_size` in a folder of ours, otherwise
    the grid (Janus), `resolution` (Chameleon), or nothing (Emu3: 512). Raises `ConfigError` where it
    describes no such network.
    """
    from huggingface_hub.errors import StrictDataclassError

    model_type = content["model_type"]
    kind = MODELS.get(model_type, model_type)
    part = content.get("vq_config") if model_type in MODELS else content
    if not isinstance(part, dict):
        raise ConfigError(f"{path}: the section 'vq_config' is missing, which describes the image tokenizer")
    try:
        known = _config_class(kind)(**{name: part[name] for name in KEYS[kind] if name in part})
        # tuples become the lists that a file would hold
        network = json.loads(json.dumps({name: getattr(known, name) for name in KEYS[kind]}))
        if resolution is None:
            resolution = part["image_size"] if "image_size" in part else _stated_resolution(kind, network, content)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
    tree = {"model_type": kind, "resolution": resolution, "network": network}
    try:
        return check_recipe(tree, AdapterConfig, str(path))
    except RecipeError as error:
        raise ConfigError(str(error)) from None


def read_adapter_weights(folder: Path, whole_model: bool) -> dict[str, torch.Tensor]:
    """The tensors of the VQ model by their names in it, from one safetensors file or the shards of an index.

    Of a `whole_model` only those are read whose names say that they are of its VQ part.

    Raises `DataError` for a folder without safetensors, and for files that are missing or cut short.
    """
    weights: dict[str, torch.Tensor] = {}
    prefix = WHOLE_PREFIX if whole_model else ALONE_PREFIX
    for file in _weight_files(folder, prefix):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                    if begin := prefix.match(name):
                        weights[name[begin.end() :]] = tensors.get_tensor(name)
        except FileNotFoundError:
            raise DataError(f"{file}: missing beside {INDEX_FILE}") from None
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: not a whole safetensors file ({error})") from None
    return weights


def build_adapter(config: AdapterConfig) -> "JanusVQ | Emu3VQ | ChameleonVQ":
    """The network of `config` with fresh weights. Raises `ConfigError` for sizes that do not go together."""
    try:
        if config.model_type == "janus_vqgan":
            return JanusVQ(config)
        return Emu3VQ(config) if config.model_type == "emu3_vqgan" else ChameleonVQ(config)
    except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"no {config.model_type} has these sizes: {one_line(error)}") from None


class _Adapter(nn.Module):
    """What the networks have in common: transformers' modules around a codebook of ours.

    Args:
        config: what the network is.
        model: transformers' VQ model, whose own codebook gives way to one of `codebook`.
    """

    def __init__(self, config: AdapterConfig, model: Any, codebook: type[Codebook] = Codebook):
        super().__init__()
        self.encoder = model.encoder
        self.quant_conv, self.post_quant_conv = model.quant_conv, model.post_quant_conv
        self.quantize = codebook(config.codebook_size, config.network["embed_dim"])
        # transformers' encoders keep what every block gives until they are done: about twice the memory of ours
        self.floats_per_picture = 8 * config.network["base_channels"] * config.resolution**2

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(n, 3, height, width)` to latents `(n, embed_dim, h, w)`, not quantised."""
        return self.quant_conv(self.encoder(pixels))


class JanusVQ(_Adapter):
    """Janus' VQ network. A code is the row of the codebook nearest to the latent vector, as `JanusVQVAE.encode` finds
    it; `JanusVQVAE.decode`, and thus `decode_image_tokens`, begins with that row at length 1.
    """

    def __init__(self, config: AdapterConfig):
        from transformers.models.janus.modeling_janus import JanusVQVAE

        model = JanusVQVAE(_config_class("janus_vqgan")(**config.network))
        super().__init__(config, model, DirectionCodebook)
        self.decoder = model.decoder

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(n, embed_dim, h, w)` to pixels `(n, 3, height, width)`."""
        return self.decoder(self.post_quant_conv(latents))


class DirectionCodebook(Codebook):
    """A codebook whose vectors lose their length on the way back."""

    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(n, h, w)` to their vectors `(n, dim, h, w)`, of length 1."""
        return F.normalize(super().latents(codes), dim=1)


class Emu3VQ(_Adapter):
    """Emu3's VQ network, which works on short films: a still picture is `temporal_downsample_factor` equal frames to
    its encoder, and the first frame of what its decoder makes.

    All that looks at frames one by one is done here for one frame, which gives what `Emu3VQVAE` gives for a fraction
    of its time and memory.
    """

    def __init__(self, config: AdapterConfig):
        from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

        model = Emu3VQVAE(_config_class("emu3_vqgan")(**config.network))
        super().__init__(config, model)
        self.decoder = model.decoder
        self.frames = config.network["temporal_downsample_factor"]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(n, 3, height, width)` to latents `(n, embed_dim, h, w)`, not quantised."""
        encoder = self.encoder
        hidden = encoder.middle_block(encoder.down_block(encoder.conv_in(pixels)))
        hidden = encoder.conv_out(F.silu(encoder.norm_out(hidden)))
        hidden = hidden[:, :, None].repeat(1, 1, self.frames, 1, 1)  # (n, latent_channels, frames, h, w)
        for layer in encoder.time_conv:
            hidden = F.silu(layer(hidden))
        for layer in encoder.time_res_stack:
            hidden = layer(hidden)
        return self.quant_conv(hidden)[:, :, 0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(n, embed_dim, h, w)` to pixels `(n, 3, height, width)`."""
        decoder = self.decoder
        film = latents[:, :, None]  # (n, embed_dim, 1, h, w)
        hidden = torch.cat((self.post_quant_conv(film), film))
        for layer in decoder.time_res_stack:
            hidden = layer(hidden)
        for layer in decoder.time_conv:
            hidden = F.silu(layer(hidden))
        hidden, guide = hidden[:, :, 0].chunk(2)  # of the first frame
        hidden = decoder.up_block(decoder.middle_block(decoder.conv_in(hidden), guide), guide)
        return decoder.conv_out(F.silu(decoder.norm_out(hidden, guide)))


class ChameleonVQ(_Adapter):
    """The half of Chameleon's VQ network that transformers has: pictures to codes."""

    def __init__(self, config: AdapterConfig):
        from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

        super().__init__(config, ChameleonVQVAE(_config_class("chameleon_vqgan")(**config.network)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raises `DataError`: there is no decoder."""
        raise DataError(
            "transformers' Chameleon has no decoder, so its codes cannot become pictures; the folder of the release "
            "with vqgan.yaml and vqgan.ckpt can decode them"
        )


def _config_class(kind: str) -> Any:
    """The configuration class of a VQ model; importing transformers takes seconds and waits for its first use."""
    if kind == "janus_vqgan":
        from transformers.models.janus.configuration_janus import JanusVQVAEConfig

        return JanusVQVAEConfig
    if kind == "emu3_vqgan":
        from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig

        return Emu3VQVAEConfig
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

    return ChameleonVQVAEConfig


def _stated_resolution(kind: str, network: dict[str, Any], content: dict[str, Any]) -> int:
    """The side of pictures by a `config.json` of transformers' own."""
    if kind == "emu3_vqgan":
        return EMU3_RESOLUTION
    if kind == "chameleon_vqgan":
        return network["resolution"]
    from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

    if content["model_type"] == kind:
        patches = JanusVQVAEConfig(**{name: content[name] for name in ("num_patches",) if name in content}).num_patches
    else:  # the whole model takes it from its vision tower
        tower = content.get("vision_config") or {}
        sides: Any = JanusVisionConfig(**{name: tower[name] for name in ("image_size", "patch_size") if name in tower})
        patches = sides.image_size // sides.patch_size
    return patches * _pixels_per_code(network)


def _pixels_per_code(network: dict[str, Any]) -> int:
    return 2 ** max(0, len(network["channel_multiplier"]) - 1)


def _weight_files(folder: Path, prefix: re.Pattern[str]) -> list[Path]:
    """The one file of weights, or those shards of an index in which names begin with `prefix`."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    path = folder / INDEX_FILE
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({shard for name, shard in shards.items() if prefix.match(name)})
        inside = all(Path(name).name == name for name in names)
    except FileNotFoundError:
        raise DataError(
            f"{folder / WEIGHTS_FILE}: missing beside config.json; weights are read from safetensors alone, "
            "which `save_pretrained` of transformers writes"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not an index of safetensors") from None
    if not inside:
        raise DataError(f"{path}: names a file outside its folder")
    return [folder / name for name in names]
