"""Weights packed for products of a few rows, which is what decoding on a CPU is made of.

A step of decoding reads every weight once for a handful of rows. torch's float32 product reads them at a third of the
memory's speed; oneDNN's, on weights that were brought into its own order beforehand, comes near it (the same operators
that torch.compile uses on CPUs). What is left is the cost of starting operations, so a layer is also run in fewer of
them: where all tokens of a step are of one modality, every plan is a stack of dense layers, whose norms go into the
projections behind them and whose residuals go into the products. It takes the memory of the weights a second time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from uni_x.model.attention import attend
from uni_x.model.cache import Store
from uni_x.model.causal_lm import UniXForCausalLM
from uni_x.model.layers import DecoderLayer, RMSNorm, Rotary, SelfAttention, rotate
from uni_x.model.layout import Stream, TokenLayout
from uni_x.model.loss import LanguageModelHead, apply_head

MAX_ROWS = 64  # above, the plain product is as fast or faster


class PackedWeights:
    """Packed copies of the weights of a model's layers and head.

    Args:
        model: as the engine uses it. Weights that have changed since are packed anew at the next use.
    """

    def __init__(self, model: UniXForCausalLM):
        self.model = model
        self._products: dict[Any, _Product] = {}
        self._layers: dict[tuple[int, str], _DenseLayer | None] = {}
        self._checksum: list[tuple[int, int]] = []

    @property
    def is_possible(self) -> bool:
        """Whether the model's device and dtype have these operators, and no hook moves its weights about."""
        weight = self.model.get_input_embeddings().weight
        return (
            not any("forward" in vars(module) for module in self.model.modules())
            and weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets the layers and the head use packed weights; nothing changes where that is not possible."""
        replacements: dict[type, Callable[..., Any]] = {DecoderLayer: self._layer, LanguageModelHead: self._head}
        possible = self.is_possible
        if possible:
            self._forget_what_has_changed()
        replaced = [module for module in self.model.modules() if possible and type(module) in replacements]
        try:
            for module in replaced:
                module.forward = partial(replacements[type(module)], module, module.forward)
            yield
        finally:
            for module in replaced:
                del module.forward

    def _head(
        self,
        module: LanguageModelHead,
        plain: Callable[..., Any],
        hidden: torch.Tensor,
        vocabulary_range: tuple[int, int] | None = None,
    ) -> Any:
        if vocabulary_range is None or not _few_rows(hidden):
            return apply_head(hidden, module.weight, vocabulary_range=vocabulary_range)
        key = (id(module), vocabulary_range)
        if key not in self._products:
            self._products[key] = _Product(module.weight[slice(*vocabulary_range)])
        return self._products[key](hidden)

    def _layer(
        self,
        module: DecoderLayer,
        plain: Callable[..., torch.Tensor],
        x: torch.Tensor,
        layout: TokenLayout,
        rotary: Rotary,
        stores: dict[str, Store] | None = None,
    ) -> torch.Tensor:
        texts, images = layout.sizes
        if not _few_rows(x) or (texts and images):
            return plain(x, layout, rotary, stores)
        modality = "text" if texts else "image"
        key = (id(module), modality)
        if key not in self._layers:
            self._layers[key] = self._dense_layer(module, modality)
        dense = self._layers[key]
        if dense is None:
            return plain(x, layout, rotary, stores)
        seen = "everything" if module.spec.sees == "all" else modality
        return dense(x, rotary, getattr(layout, seen), stores[seen] if stores is not None else None)

    def _dense_layer(self, module: DecoderLayer, modality: str) -> "_DenseLayer | None":
        """The layer as tokens of one modality go through it; None where its parts are not plain (LoRA)."""
        path = module.path(modality)
        attention = path.attention
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
        plain = (*inputs, path.o_proj, *(part for ffn in path.ffns for part in ffn.children()))
        if any(type(part) is not nn.Linear for part in plain):
            return None
        heads, kv_heads = (projection.out_features // attention.head_dim for projection in inputs[:2])
        return _DenseLayer(
            qkv=self._product(inputs, path.norms[0]),
            output=self._product([path.o_proj]),
            ffns=[
                (self._product([ffn.gate_proj, ffn.up_proj], path.norms[1]), self._product([ffn.down_proj]))
                for ffn in path.ffns
            ],
            heads=(heads, kv_heads),
            head_norms=_head_norms(attention, heads, kv_heads),
            eps=torch.tensor(path.norms[0].eps),
        )

    def _product(self, projections: Sequence[nn.Linear], norm: RMSNorm | None = None) -> "_Product":
        """Projections of the same input as one product, packed once however many paths use it."""
        key = (id(norm), *map(id, projections))
        if key not in self._products:
            weight = torch.cat([projection.weight.detach() for projection in projections])
            biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
            self._products[key] = _Product(
                weight if norm is None else weight * norm.weight.detach(), torch.cat(biases) if biases else None
            )
        return self._products[key]

    def _forget_what_has_changed(self) -> None:
        """Compares a checksum of all weights; it costs about as much as one step of decoding."""
        with torch.no_grad():
            checksum = [
                (weight.data_ptr(), int(weight.detach().view(torch.int32).sum(dtype=torch.int64)))
                for weight in self.model.parameters()
            ]
        if checksum != self._checksum:
            self._products.clear()
            self._layers.clear()
            self._checksum = checksum


class _Product:
    """A linear layer on weights in oneDNN's own order."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), MAX_ROWS // 8)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


@dataclass(frozen=True)
class _DenseLayer:
    """A decoder layer as tokens of one modality go through it.

    Attributes:
        qkv: the first norm's weights and the query, key and value projections.
        output: the attention's output projection.
        ffns: for each FFN, whose outputs are added up, the second norm's weights with gate and up, and down.
        heads: of queries, and of keys.
        head_norms: weights of the query and key norms, `(heads + kv_heads, head_dim)`; None where there are none.
        eps: of the norms, `()`.
    """

    qkv: _Product
    output: _Product
    ffns: Sequence[tuple[_Product, _Product]]
    heads: tuple[int, int]
    head_norms: torch.Tensor | None
    eps: torch.Tensor

    def __call__(self, x: torch.Tensor, rotary: Rotary, stream: Stream, store: Store | None) -> torch.Tensor:
        heads, kv_heads = self.heads
        joined = self.qkv(_scaled(x, self.eps)).view(x.shape[0], heads + 2 * kv_heads, -1)
        looking = joined[:, : heads + kv_heads]  # queries and keys, which are normed and rotated alike
        if self.head_norms is not None:
            looking = _scaled(looking, self.eps).mul_(self.head_norms)
        looking = rotate(looking, rotary)
        seen = attend(looking[:, :heads], looking[:, heads:], joined[:, heads + kv_heads :], stream, store)
        x = self.output.added_to(x, seen)
        scaled = _scaled(x, self.eps)
        for gate_and_up, down in self.ffns:
            gate, up = gate_and_up(scaled).chunk(2, dim=-1)
            x = down.added_to(x, F.silu(gate).mul_(up))
        return x


def _head_norms(attention: SelfAttention, heads: int, kv_heads: int) -> torch.Tensor | None:
    if not isinstance(attention.q_norm, RMSNorm) or not isinstance(attention.k_norm, RMSNorm):
        return None
    weights = (attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1))
    return torch.cat(weights).detach()


def _scaled(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """RMS norm without its weights, in the fewest operations: starting them is what they cost."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()


def _few_rows(x: torch.Tensor) -> bool:
    return 0 < x.numel() <= MAX_ROWS * x.shape[-1]
