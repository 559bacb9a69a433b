"""The parts of a decoder layer, and the one decoder layer that every plan is built from.

Module names are those of transformers' Qwen and Llama: what text tokens use, alone or together with image tokens, sits
where a plain LLM has it (`layers.0.self_attn.q_proj`), and what image tokens have of their own sits beside it under
`image` (`layers.0.image.self_attn.q_proj`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from uni_x.model.attention import attend
from uni_x.model.cache import Store
from uni_x.model.config import UniXConfig
from uni_x.model.layout import Stream, TokenLayout
from uni_x.model.plan import LayerSpec

Rotary = tuple[torch.Tensor, torch.Tensor]
MODALITIES = ("text", "image")
Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys, values


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019) over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., size)` to the same shape."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled():
            return _CPURMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class _CPURMSNorm(torch.autograd.Function):
    """torch has no fused RMS norm for CPUs; with the backward written out this takes a third of its time.

    The forward is that of `F.rms_norm` and of transformers' models, to the last bit.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed = torch.mul(x, x)
        scale = normed.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, scale, out=normed)
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        product = gradient * normed
        mean = (product @ weight).unsqueeze(-1).div_(-normed.shape[-1])
        return (
            torch.addcmul(gradient * weight, normed, mean).mul_(scale),
            product.flatten(0, -2).sum(0),
            None,
        )


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., 2021), with the scalings that transformers knows."""

    def __init__(self, config: UniXConfig):
        super().__init__()
        self.config = config
        self._frequencies: torch.Tensor | None = None
        self._scale = 1.0

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """`(tokens,)` positions to cosine and signed sine, `(tokens, 1, head_dim)` each."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies, self._scale = self._compute(positions.device)
        angles = positions[:, None].float() * self._frequencies
        cosine, sine = angles.cos() * self._scale, angles.sin() * self._scale
        return (
            torch.cat((cosine, cosine), dim=-1).unsqueeze(1).to(dtype),
            torch.cat((-sine, sine), dim=-1).unsqueeze(1).to(dtype),
        )

    def _compute(self, device: torch.device) -> tuple[torch.Tensor, float]:
        parameters = self.config.rope_parameters or {}
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            return ROPE_INIT_FUNCTIONS[kind](self.config, device)
        exponents = torch.arange(0, self.config.head_dim, 2, device=device).float() / self.config.head_dim
        return 1.0 / parameters.get("rope_theta", 10000.0) ** exponents, 1.0  # to the bit what transformers computes


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Applies the rotary embedding to `(tokens, heads, head_dim)`; the two halves of a head are its pairs."""
    cosine, signed_sine = rotary
    return (x * cosine).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(signed_sine))


class SelfAttention(nn.Module):
    """Projections of an attention layer; `qkv` and `output` say which of them this module owns."""

    def __init__(self, config: UniXConfig, qkv: bool = True, output: bool = True):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        if qkv:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        if output:
            self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def project(self, x: torch.Tensor, rotary: Rotary) -> Projected:
        """`(tokens, hidden_size)` to rotated queries, rotated keys and values, `(tokens, heads, head_dim)` each."""
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.rotated(queries, keys, values, rotary)

    def rotated(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotary: Rotary) -> Projected:
        """Norms and rotates queries and keys, `(tokens, heads, head_dim)` each."""
        return rotate(self.q_norm(queries), rotary), rotate(self.k_norm(keys), rotary), values

    def forward(self, x: torch.Tensor, rotary: Rotary, stream: Stream, store: Store | None) -> torch.Tensor:
        """Attention within one stream, `(tokens, hidden_size)` to the same shape."""
        return self.o_proj(attend(*self.project(x, rotary), stream, store))


class FeedForward(nn.Module):
    """Gated feed-forward network (SwiGLU, Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(tokens, hidden_size)` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Parts(nn.Module):
    """Norms, attention and FFN of a layer, or those of them that image tokens have of their own."""

    def __init__(self, config: UniXConfig, norms: bool, qkv: bool, output: bool, ffn_size: int | None):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        if norms:
            self.input_layernorm = RMSNorm(size, eps)
            self.post_attention_layernorm = RMSNorm(size, eps)
        if qkv or output:
            self.self_attn = SelfAttention(config, qkv, output)
        if ffn_size:
            self.mlp = FeedForward(size, ffn_size)


@dataclass(frozen=True)
class Path:
    """The parts of a decoder layer that tokens of one modality go through.

    Attributes:
        norms: before the attention and before the FFN.
        attention: owns the query, key and value projections.
        o_proj: the attention's output projection.
        ffns: whose outputs are added up.
    """

    norms: tuple[RMSNorm, RMSNorm]
    attention: SelfAttention
    o_proj: nn.Linear
    ffns: tuple[FeedForward, ...]


class DecoderLayer(GradientCheckpointingLayer, Parts):
    """One decoder layer, put together as its spec says."""

    def __init__(self, config: UniXConfig, spec: LayerSpec):
        Parts.__init__(self, config, norms=True, qkv=True, output=True, ffn_size=config.intermediate_size)
        self.spec = spec
        own_norms, own_qkv, own_output, own_ffn = (part == "separate" for part in spec.parts)
        image_ffn_size = config.intermediate_size if spec.image_ffn_size is None else spec.image_ffn_size
        self.image: Parts | None = None
        if own_norms or own_qkv or own_output or (own_ffn and image_ffn_size):
            self.image = Parts(config, own_norms, own_qkv, own_output, image_ffn_size if own_ffn else None)
        self.shared_mlp: FeedForward | None = None
        if spec.shared_ffn_size:
            self.shared_mlp = FeedForward(config.hidden_size, spec.shared_ffn_size)

    def forward(
        self, x: torch.Tensor, layout: TokenLayout, rotary: Rotary, stores: dict[str, Store] | None = None
    ) -> torch.Tensor:
        """`(tokens, hidden_size)` in the order of the layout, to the same shape.

        `stores` is this layer's part of the cache.
        """
        if self.spec.splits_completely:
            return self._two_streams(x, layout, rotary, stores)
        x = x + self._attention(self._by_modality("input_layernorm", x, layout), layout, rotary, stores)
        return x + self._feed_forward(self._by_modality("post_attention_layernorm", x, layout), layout)

    def path(self, modality: str) -> Path:
        """What tokens of a modality, `text` or `image`, go through."""
        own, spec = (self.image if modality == "image" else None), self.spec
        norms = own if own is not None and spec.norms == "separate" else self
        qkv = own if own is not None and spec.qkv == "separate" else self
        output = own if own is not None and spec.output == "separate" else self
        ffns = (self.mlp if modality == "text" or spec.ffn == "shared" else getattr(own, "mlp", None), self.shared_mlp)
        return Path(
            (norms.input_layernorm, norms.post_attention_layernorm),
            qkv.self_attn,
            output.self_attn.o_proj,
            tuple(ffn for ffn in ffns if ffn is not None),
        )

    def _two_streams(
        self, x: torch.Tensor, layout: TokenLayout, rotary: Rotary, stores: dict[str, Store] | None
    ) -> torch.Tensor:
        """Each modality goes through a whole layer of its own; no token is computed twice."""
        assert self.image is not None
        outputs = []
        for parts, tokens, own_rotary, name in zip(
            (self, self.image), x.split(layout.sizes), _split_rotary(rotary, layout.sizes), MODALITIES, strict=True
        ):
            if not tokens.shape[0] and not _empty_branches_run():
                continue
            store = stores[name] if stores is not None else None
            normed = parts.input_layernorm(tokens)
            tokens = tokens + parts.self_attn(normed, own_rotary, getattr(layout, name), store)
            outputs.append(tokens + parts.mlp(parts.post_attention_layernorm(tokens)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _by_modality(self, part: str, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Runs a part of the layer, on each modality apart where image tokens have one of their own."""
        own = getattr(self.image, part, None)
        if own is None:
            return getattr(self, part)(x)
        text, image = x.split(layout.sizes)
        return torch.cat((getattr(self, part)(text), own(image)))

    def _attention(
        self, x: torch.Tensor, layout: TokenLayout, rotary: Rotary, stores: dict[str, Store] | None
    ) -> torch.Tensor:
        queries, keys, values = self._project(x, layout, rotary)
        if self.spec.sees == "all":
            store = stores["everything"] if stores is not None else None
            output = attend(queries, keys, values, layout.everything, store)
        else:
            sizes = layout.sizes
            by_modality = zip(queries.split(sizes), keys.split(sizes), values.split(sizes), strict=True)
            output = torch.cat(
                [
                    attend(*parts, getattr(layout, name), stores[name] if stores is not None else None)
                    for parts, name in zip(by_modality, MODALITIES, strict=True)
                ]
            )
        if self.image is None or self.spec.output == "shared":
            return self.self_attn.o_proj(output)
        text, image = output.split(layout.sizes)
        return torch.cat((self.self_attn.o_proj(text), self.image.self_attn.o_proj(image)))

    def _project(self, x: torch.Tensor, layout: TokenLayout, rotary: Rotary) -> Projected:
        if self.image is None or self.spec.qkv == "shared":
            return self.self_attn.project(x, rotary)
        text, image = x.split(layout.sizes)
        text_rotary, image_rotary = _split_rotary(rotary, layout.sizes)
        texts, images = self.self_attn.project(text, text_rotary), self.image.self_attn.project(image, image_rotary)
        queries, keys, values = (torch.cat(pair) for pair in zip(texts, images, strict=True))
        return queries, keys, values

    def _feed_forward(self, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        if self.spec.image_ffn_size == 0:
            # image tokens have the shared FFN alone
            text, image = x.split(layout.sizes)
            output = torch.cat((self.mlp(text), torch.zeros_like(image)))
        else:
            output = self._by_modality("mlp", x, layout)
        return output if self.shared_mlp is None else output + self.shared_mlp(x)


def _split_rotary(rotary: Rotary, sizes: tuple[int, int]) -> tuple[Rotary, Rotary]:
    (text_cosine, image_cosine), (text_sine, image_sine) = rotary[0].split(sizes), rotary[1].split(sizes)
    return (text_cosine, text_sine), (image_cosine, image_sine)


def _empty_branches_run() -> bool:
    """Whether a branch without tokens has to run: ranks of a distributed engine must all touch every weight."""
    return torch.is_grad_enabled() or (torch.distributed.is_available() and torch.distributed.is_initialized())
