"""`ImageTokenizer`: pictures to codes and codes to pictures, whatever network lies behind it."""

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from uni_x.errors import ConfigError, DataError, RecipeError
from uni_x.images.patches import PatchAutoencoder
from uni_x.images.pixels import Picture, pixels_to_pictures, preprocess
from uni_x.images.release import read_release_config, read_release_weights
from uni_x.images.vqgan import VQGAN
from uni_x.recipe import PatchNetwork, TokenizerConfig, check_recipe

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "uni_x_image_tokenizer"
FLOATS_AT_ONCE = 2**24  # 64 MB a feature map; bounds the memory of encoding and decoding

Network = VQGAN | PatchAutoencoder


class ImageTokenizer:
    """Turns pictures into grids of codes and back.

    Attributes:
        config: what the tokenizer is, apart from its weights.
        resolution: side of the square pictures it works on, in pixels.
        grid: height and width of a picture in codes.
        codebook_size: codes are 0 to `codebook_size` - 1.
        codebook: the code vectors, `(codebook_size, embed_dim)`.
    """

    def __init__(self, config: TokenizerConfig, network: Network | None = None):
        """Wraps `network`; left out, one of `config` with fresh weights."""
        self.config = config
        self.network = (build_network(config) if network is None else network).eval()
        self.resolution = config.resolution
        self.grid = config.grid
        self.codebook_size = config.codebook_size

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageTokenizer":
        """Reads a folder of ours (`config.json`, `model.safetensors`) or a published `vqgan.yaml` with `vqgan.ckpt`.

        Raises `DataError` for files that are missing, cut short or do not fit, `ConfigError` for a configuration that
        is not a tokenizer's.
        """
        folder = Path(folder)
        if (folder / CONFIG_FILE).is_file():
            weights_file = folder / WEIGHTS_FILE
            config, weights = _read_config(folder / CONFIG_FILE), _read_weights(weights_file)
        elif (folder / "vqgan.yaml").is_file():
            weights_file = folder / "vqgan.ckpt"
            config, weights = read_release_config(folder / "vqgan.yaml"), read_release_weights(weights_file)
        elif folder.is_dir():
            raise DataError(f"{folder}: no image tokenizer here; needed is {CONFIG_FILE} or vqgan.yaml with vqgan.ckpt")
        else:
            raise DataError(f"{folder}: no such folder")
        return cls(config, _network_with_weights(config, weights, weights_file))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `config.json` and `model.safetensors` (numbers stored as `dtype`), each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.network.state_dict().items()}
        partial = folder / f"{WEIGHTS_FILE}.partial"
        partial.write_bytes(save(weights, metadata={"format": "pt"}))  # `save_file` would shut out other users
        os.replace(partial, folder / WEIGHTS_FILE)
        content = {"model_type": MODEL_TYPE, **self.config.model_dump(mode="json")}
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
        count = self._pictures_at_once()
        parts = [
            self._encode(self.preprocess(pictures[start : start + count])) for start in range(0, len(pictures), count)
        ]
        return torch.cat(parts) if parts else torch.empty(0, *self.grid, dtype=torch.int64)

    def decode(self, codes: torch.Tensor) -> list[Image.Image]:
        """Codes `(n, h, w)` to RGB pictures. Raises `DataError` for codes out of range or of another shape."""
        self._check_codes(codes)
        return [
            picture
            for part in codes.split(self._pictures_at_once())
            for picture in pixels_to_pictures(self._decode(part))
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
        return torch.cat([self._encode(part) for part in pixels.split(self._pictures_at_once())])

    def decode_pixels(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(n, h, w)` to pixels `(n, 3, resolution, resolution)` on the CPU; made for [-1, 1], not clipped.

        Raises `DataError` for codes out of range or of another shape.
        """
        self._check_codes(codes)
        return torch.cat([self._decode(part) for part in codes.split(self._pictures_at_once())])

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.quantize.codes(self.network.encode(pixels.to(self.device, torch.float32))).cpu()

    @torch.no_grad()
    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.network.decode(self.network.quantize.latents(codes.to(self.device, torch.int64))).cpu()

    def _pictures_at_once(self) -> int:
        return max(1, FLOATS_AT_ONCE // self.network.floats_per_picture)

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


def build_network(config: TokenizerConfig) -> Network:
    """The network of `config` with fresh weights, drawn from torch's global generator."""
    if isinstance(config.network, PatchNetwork):
        return PatchAutoencoder(config.network, config.resolution, config.codebook_size)
    return VQGAN(config.network, config.resolution, config.codebook_size)


def scenes_tokenizer_folder() -> Path:
    """The folder of the tokenizer for the scenes that comes with the package."""
    return Path(str(files("uni_x.images") / "pretrained" / "scenes"))


def load_image_tokenizer(name: str) -> ImageTokenizer:
    """A tokenizer from its folder, or the one for the scenes by the name `scenes`."""
    return ImageTokenizer.from_pretrained(scenes_tokenizer_folder() if name == "scenes" else name)


def _read_config(path: Path) -> TokenizerConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    model_type = content.pop("model_type", None) if isinstance(content, dict) else None
    if model_type != MODEL_TYPE:
        raise ConfigError(f"{path}: model_type is {model_type!r}; an image tokenizer of ours has {MODEL_TYPE!r}")
    try:
        return check_recipe(content, TokenizerConfig, str(path))
    except RecipeError as error:
        raise ConfigError(str(error)) from None


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing beside {CONFIG_FILE}") from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from None


def _network_with_weights(config: TokenizerConfig, weights: dict[str, torch.Tensor], path: Path) -> Network:
    """Other parts of a training checkpoint (losses, averages) are left out; gaps are errors."""
    with torch.device("meta"):  # draws no fresh weights
        network = build_network(config)
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
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return network
