"""`ImageTokenizer`: pictures to codes and codes to pictures, whatever network lies behind it."""

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from uni_x.errors import ConfigError, DataError, RecipeError
from uni_x.images.adapters import (
    KEYS,
    MODELS,
    AdapterConfig,
    ChameleonVQ,
    Emu3VQ,
    JanusVQ,
    build_adapter,
    read_adapter_config,
    read_adapter_weights,
)
from uni_x.images.patches import PatchAutoencoder
from uni_x.images.pixels import Picture, pixels_to_pictures, preprocess
from uni_x.images.release import read_release_config, read_release_weights
from uni_x.images.vqgan import VQGAN
from uni_x.recipe import PatchNetwork, TokenizerConfig, check_recipe

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "uni_x_image_tokenizer"
FLOATS_AT_ONCE = 2**24  # 64 MB a feature map; bounds the memory of encoding and decoding
MAPS_AT_ONCE = 10

Config = TokenizerConfig | AdapterConfig
Network = VQGAN | PatchAutoencoder | JanusVQ | Emu3VQ | ChameleonVQ


class ImageTokenizer:
    """Turns pictures into grids of codes and back.

    Attributes:
        config: what the tokenizer is, apart from its weights.
        resolution: side of the square pictures it works on, in pixels.
        grid: height and width of a picture in codes.
        codebook_size: codes are 0 to `codebook_size` - 1.
        codebook: the code vectors, `(codebook_size, embed_dim)`.
        name_or_path: the folder it was read from, or `scenes`; None where it was made in memory.
    """

    def __init__(self, config: Config, network: Network | None = None):
        """Wraps `network`; left out, one of `config` with fresh weights."""
        self.config = config
        self.network = (build_network(config) if network is None else network).eval()
        self.resolution = config.resolution
        self.grid = config.grid
        self.codebook_size = config.codebook_size
        self.name_or_path: str | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, resolution: int | None = None) -> "ImageTokenizer":
        """Reads a folder of ours, a published `vqgan.yaml` with `vqgan.ckpt`, or one of transformers' (see `adapters`).

        A folder of ours, or of transformers', has `config.json` and `model.safetensors`. `resolution` takes the place
        of the one that the folder states; convolutions work on any multiple of a code's pixels, if less well.

        Raises `DataError` for files that are missing, cut short or do not fit, `ConfigError` for a configuration that
        is not a tokenizer's.
        """
        folder = Path(folder)
        config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        config: Config
        if config_file.is_file():
            content = _read_content(config_file)
            model_type = content["model_type"]
            if model_type == MODEL_TYPE:
                config, weights = _our_config(config_file, content, resolution), _read_weights(weights_file)
            else:
                config = read_adapter_config(config_file, content, resolution)
                weights = read_adapter_weights(folder, whole_model=model_type in MODELS)
                weights_file = weights_file if weights_file.is_file() else folder  # of several files
        elif (folder / "vqgan.yaml").is_file():
            weights_file = folder / "vqgan.ckpt"
            published = read_release_config(folder / "vqgan.yaml").model_dump()
            config = _our_config(folder / "vqgan.yaml", published, resolution)
            weights = read_release_weights(weights_file)
        elif folder.is_dir():
            raise DataError(f"{folder}: no image tokenizer here; needed is {CONFIG_FILE} or vqgan.yaml with vqgan.ckpt")
        else:
            raise DataError(f"{folder}: no such folder")
        tokenizer = cls(config, _network_with_weights(config, weights, weights_file))
        tokenizer.name_or_path = str(folder)
        return tokenizer

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `config.json` and `model.safetensors` (numbers stored as `dtype`), each whole or not at all.

        A network of transformers becomes a folder of transformers, with the VQ model alone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: _as_dtype(tensor.cpu(), dtype).contiguous() for name, tensor in self.network.state_dict().items()
        }
        partial = folder / f"{WEIGHTS_FILE}.partial"
        partial.write_bytes(save(weights, metadata={"format": "pt"}))  # `save_file` would shut out other users
        os.replace(partial, folder / WEIGHTS_FILE)
        content = (
            self.config.to_folder()
            if isinstance(self.config, AdapterConfig)
            else {"model_type": MODEL_TYPE, **self.config.model_dump(mode="json")}
        )
        partial = folder / f"{CONFIG_FILE}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG_FILE)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors, `(codebook_size, embed_dim)`."""
        return self.network.quantize.embedding.weight.detach()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.codebook.device

    def to(self, device: torch.device | str) -> "ImageTokenizer":
        """Moves the weights, in place."""
        self.network.to(device)
        return self

    def preprocess(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Any pictures as pixels `(n, 3, resolution, resolution)` in [-1, 1]; see `pixels.preprocess`."""
        return preprocess(pictures, self.resolution)

    def encode(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Pictures of any size and mode to codes `(n, h, w)`, int64 on the CPU.

        Memory does not grow with the number of pictures. Raises `DataError` for one that cannot be read.
        """
        count = self.pictures_at_once
        parts = [
            self._encode(self.preprocess(pictures[start : start + count])) for start in range(0, len(pictures), count)
        ]
        return torch.cat(parts) if parts else torch.empty(0, *self.grid, dtype=torch.int64)

    def decode(self, codes: torch.Tensor) -> list[Image.Image]:
        """Codes `(n, h, w)` to RGB pictures. Raises `DataError` for codes out of range or of another shape."""
        self._check_codes(codes)
        return [
            picture for part in codes.split(self.pictures_at_once) for picture in pixels_to_pictures(self._decode(part))
        ]

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(n, 3, resolution, resolution)` in [-1, 1] to codes `(n, h, w)`, int64 on the CPU.

        Raises `DataError` for another shape, or for integers.
        """
        expected = (3, self.resolution, self.resolution)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not pixels.is_floating_point():
            raise DataError(
                f"pixels are floats of shape (n, 3, {self.resolution}, {self.resolution}), "
                f"these are {pixels.dtype} of shape {tuple(pixels.shape)}"
            )
        return torch.cat([self._encode(part) for part in pixels.split(self.pictures_at_once)])

    def decode_pixels(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(n, h, w)` to pixels `(n, 3, resolution, resolution)` on the CPU; made for [-1, 1], not clipped.

        Raises `DataError` for codes out of range or of another shape.
        """
        self._check_codes(codes)
        return torch.cat([self._decode(part) for part in codes.split(self.pictures_at_once)])

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.quantize.codes(self.network.encode(pixels.to(self.device, torch.float32))).cpu()

    @torch.no_grad()
    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.network.decode(self.network.quantize.latents(codes.to(self.device, torch.int64))).cpu()

    @property
    def pictures_at_once(self) -> int:
        """How many pictures fit into the memory that encoding and decoding allow themselves.

        On CUDA that is half of what is free, for some ten feature maps; elsewhere 64 MB a feature map.
        """
        floats = FLOATS_AT_ONCE
        if self.device.type == "cuda":
            floats = max(floats, torch.cuda.mem_get_info(self.device)[0] // (2 * 4 * MAPS_AT_ONCE))
        return max(1, floats // self.network.floats_per_picture)

    def _check_codes(self, codes: torch.Tensor) -> None:
        if codes.ndim != 3 or tuple(codes.shape[1:]) != self.grid:
            height, width = self.grid
            raise DataError(f"codes have the shape (n, {height}, {width}), these have {tuple(codes.shape)}")
        if codes.is_floating_point() or codes.is_complex():
            raise DataError(f"codes are integers, these are {codes.dtype}")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise DataError(
                f"codes are 0 to {self.codebook_size - 1}, these reach from {int(codes.min())} to {int(codes.max())}"
            )


def build_network(config: Config) -> Network:
    """The network of `config` with fresh weights, drawn from torch's global generator."""
    if isinstance(config, AdapterConfig):
        return build_adapter(config)
    if isinstance(config.network, PatchNetwork):
        return PatchAutoencoder(config.network, config.resolution, config.codebook_size)
    return VQGAN(config.network, config.resolution, config.codebook_size)


def scenes_tokenizer_folder() -> Path:
    """The folder of the tokenizer for the scenes that comes with the package."""
    return Path(str(files("uni_x.images") / "pretrained" / "scenes"))


def load_image_tokenizer(name: str) -> ImageTokenizer:
    """A tokenizer from its folder, or the one for the scenes by the name `scenes`."""
    tokenizer = ImageTokenizer.from_pretrained(scenes_tokenizer_folder() if name == "scenes" else name)
    tokenizer.name_or_path = name
    return tokenizer


def _read_content(path: Path) -> dict[str, Any]:
    """A `config.json` whose model type has an image tokenizer."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    known = (MODEL_TYPE, *MODELS, *KEYS)
    if model_type not in known:
        raise ConfigError(f"{path}: model_type is {model_type!r}; those with an image tokenizer are {', '.join(known)}")
    return content


def _our_config(path: Path, content: dict[str, Any], resolution: int | None) -> TokenizerConfig:
    tree = {name: value for name, value in content.items() if name != "model_type"}
    if resolution is not None:
        tree["resolution"] = resolution
    try:
        return check_recipe(tree, TokenizerConfig, str(path))
    except RecipeError as error:
        raise ConfigError(str(error)) from None


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing beside {CONFIG_FILE}") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from None


def _network_with_weights(config: Config, weights: dict[str, torch.Tensor], path: Path) -> Network:
    """Other parts of a training checkpoint (losses, averages) are left out; gaps are errors."""
    try:
        with torch.device("meta"):  # draws no fresh weights
            network = build_network(config)
    except ConfigError as error:
        raise ConfigError(f"{path.parent if path.is_file() else path}: {error}") from None
    expected = network.state_dict()
    parts = {name.partition(".")[0] for name in expected}
    weights = {name: tensor for name, tensor in weights.items() if name.partition(".")[0] in parts}
    for name, tensor in expected.items():
        if name not in weights:
            raise DataError(f"{path}: the tensor {name} is missing; the file does not fit its configuration")
        if weights[name].shape != tensor.shape:
            raise DataError(
                f"{path}: {name} has the shape {tuple(weights[name].shape)}, "
                f"its configuration asks for {tuple(tensor.shape)}"
            )
    surplus = sorted(set(weights) - set(expected))
    if surplus:
        raise DataError(f"{path}: the tensor {surplus[0]} is not part of the network that its configuration describes")
    network.load_state_dict({name: _as_dtype(tensor, torch.float32) for name, tensor in weights.items()}, assign=True)
    return network


def _as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Floats as `dtype`; counts, which batch norms keep beside them, as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
