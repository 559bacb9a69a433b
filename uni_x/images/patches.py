"""An autoencoder for small pictures that are made of tiles: each square patch goes through it on its own.

A picture of 128 pixels with patches of 32 becomes 4 x 4 codes. No code depends on another patch, so a picture
that repeats a tile repeats a code.
"""

from itertools import pairwise

import torch
from torch import nn

from uni_x.images.codebook import Codebook
from uni_x.recipe import PatchNetwork


class PatchAutoencoder(nn.Module):
    """An MLP from a patch to a small vector, a codebook, and an MLP back."""

    def __init__(self, config: PatchNetwork, resolution: int, codebook_size: int):
        super().__init__()
        self.patch_size = config.patch_size
        values = 3 * config.patch_size**2
        self.encoder = mlp(values, *config.encoder_sizes, config.embed_dim)
        self.decoder = mlp(config.embed_dim, *config.decoder_sizes, values)
        self.quantize = Codebook(codebook_size, config.embed_dim)
        self.floats_per_picture = 4 * 3 * resolution**2

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(n, 3, height, width)` to latents `(n, embed_dim, h, w)`, not quantised."""
        return self.encoder(self._patches(pixels)).permute(0, 3, 1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(n, embed_dim, h, w)` to pixels `(n, 3, height, width)`."""
        n, _, height, width = latents.shape
        size = self.patch_size
        patches = self.decoder(latents.permute(0, 2, 3, 1)).view(n, height, width, size, size * 3)
        rows = patches.transpose(2, 3)  # (n, h, size, w, size * 3)
        return rows.reshape(n, height * size, width * size, 3).permute(0, 3, 1, 2)

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels to patches `(n, h, w, size * size * 3)`: channels last, as pictures lie in memory, copies fast."""
        n, _, height, width = pixels.shape
        size = self.patch_size
        rows = pixels.permute(0, 2, 3, 1).reshape(n, height // size, size, width // size, size * 3)
        return rows.transpose(2, 3).flatten(3)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with GELU between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])
