"""The VQGAN of taming-transformers (Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis"),
which is Chameleon's image tokenizer too.

Submodules have the names of that release's checkpoints, so that its weights load as they are.
"""

import torch
import torch.nn.functional as F
from torch import nn

from uni_x.images.codebook import Codebook
from uni_x.recipe import VQGANNetwork


class VQGAN(nn.Module):
    """Convolutional encoder, codebook and decoder; a code stands for a square of patch_size 2^(levels - 1) pixels.

    With a `patch_size` above 1, which no published checkpoint has, squares of pixels are channels from first to last.
    """

    def __init__(self, config: VQGANNetwork, resolution: int, codebook_size: int):
        super().__init__()
        side = resolution // config.patch_size
        self.encoder = Encoder(config, side)
        self.decoder = Decoder(config, side)
        self.quantize = Codebook(codebook_size, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.patch_size = config.patch_size
        self.floats_per_picture = 4 * config.ch * side**2

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(n, 3, height, width)` to latents `(n, embed_dim, h, w)`, not quantised."""
        return self.quant_conv(self.encoder(F.pixel_unshuffle(pixels, self.patch_size)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(n, embed_dim, h, w)` to pixels `(n, 3, height, width)`."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(latents)), self.patch_size)


class Encoder(nn.Module):
    """Levels of residual blocks, each but the last followed by halving."""

    def __init__(self, config: VQGANNetwork, resolution: int):
        super().__init__()
        levels = len(config.ch_mult)
        widths = [config.ch, *(config.ch * multiple for multiple in config.ch_mult)]
        self.conv_in = nn.Conv2d(3 * config.patch_size**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[level],
                widths[level + 1],
                blocks=config.num_res_blocks,
                attention=resolution // 2**level in config.attn_resolutions,
                dropout=config.dropout,
                downsample=level < levels - 1,
            )
            for level in range(levels)
        )
        self.mid = Middle(widths[-1], config.dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patches `(n, 3 patch_size^2, height, width)` to `(n, z_channels, h, w)`."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """The encoder's levels from the last to the first, with one block more each, each but the first doubled."""

    def __init__(self, config: VQGANNetwork, resolution: int):
        super().__init__()
        levels = len(config.ch_mult)
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.dropout)
        self.up = nn.ModuleList(
            Level(
                widths[min(level + 1, levels - 1)],
                widths[level],
                blocks=config.num_res_blocks + 1,
                attention=resolution // 2**level in config.attn_resolutions,
                dropout=config.dropout,
                upsample=level > 0,
            )
            for level in range(levels)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch_size**2, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(n, z_channels, h, w)` to patches `(n, 3 patch_size^2, height, width)`."""
        hidden = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Level(nn.Module):
    """Residual blocks at one resolution, with attention after each where asked, then a change of resolution."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        blocks: int,
        attention: bool,
        dropout: float,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(channels_in if index == 0 else channels_out, channels_out, dropout) for index in range(blocks)
        )
        self.attn = nn.ModuleList(Attention(channels_out) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(channels_out) if downsample else None
        self.upsample = Upsample(channels_out) if upsample else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, channels_in, h, w)` to `(n, channels_out, h', w')`."""
        for index, block in enumerate(self.block):
            hidden = block(hidden)
            if self.attn:
                hidden = self.attn[index](hidden)
        if self.downsample is not None:
            hidden = self.downsample(hidden)
        if self.upsample is not None:
            hidden = self.upsample(hidden)
        return hidden


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, channels, h, w)` to the same shape."""
        return self.block_2(self.attn_1(self.block_1(hidden)))


class ResidualBlock(nn.Module):
    """Two convolutions, each after group norm and swish, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, channels_in, h, w)` to `(n, channels_out, h, w)`."""
        shortcut = hidden if self.nin_shortcut is None else self.nin_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        return shortcut + self.conv2(self.dropout(F.silu(self.norm2(hidden))))


class Attention(nn.Module):
    """Self-attention over all places, one head, beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, channels, h, w)` to the same shape."""
        normed = self.norm(hidden)
        # (n, channels, h, w) -> (n, places, channels)
        query, key, value = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return hidden + self.proj_out(mixed.transpose(1, 2).reshape(hidden.shape))


class Downsample(nn.Module):
    """Halves height and width; the one row and column of padding lie below and right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, channels, h, w)` to `(n, channels, h / 2, w / 2)`."""
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating, then smooths."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(n, channels, h, w)` to `(n, channels, 2 h, 2 w)`."""
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    """The one normalisation of this network."""
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)
