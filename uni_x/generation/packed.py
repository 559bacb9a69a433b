"""Weights packed for products of a few rows, which is what decoding on a CPU is made of.

A step of decoding reads every weight once for a handful of rows. torch's float32 product reads them at a third of the
memory's speed; oneDNN's, on weights that were brought into its own order beforehand, comes near it (the same operators
that torch.compile uses on CPUs). Projections of the same input are packed together, since a small product costs as much
as a larger one. It takes the memory of the weights a second time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from uni_x.model.causal_lm import UniXForCausalLM
from uni_x.model.layers import FeedForward, Projected, Rotary, SelfAttention
from uni_x.model.loss import LanguageModelHead, apply_head

MAX_ROWS = 64  # above, the plain product is as fast or faster


class PackedWeights:
    """Packed copies of the weights of a model's layers and head.

    Args:
        model: as the engine uses it. Weights that have changed since are packed anew at the next use.
    """

    def __init__(self, model: UniXForCausalLM):
        self.model = model
        self._packed: dict[Any, tuple[torch.Tensor, torch.Tensor | None]] = {}
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
        replaced: list[tuple[nn.Module, str]] = []
        possible = self.is_possible
        if possible:
            self._forget_what_has_changed()
        try:
            for module in self.model.modules() if possible else ():
                for kind, method, replacement in self._replacements():
                    if type(module) is kind and all(type(part) is nn.Linear for part in _projections(module)):
                        setattr(module, method, partial(replacement, module, getattr(module, method)))
                        replaced.append((module, method))
            yield
        finally:
            for module, method in replaced:
                delattr(module, method)

    def _replacements(self) -> Sequence[tuple[type[nn.Module], str, Callable[..., Any]]]:
        """Kind of module, its method, and what takes the method's place, which gets the method itself too."""
        return (
            (nn.Linear, "forward", self._linear),
            (LanguageModelHead, "forward", self._head),
            (SelfAttention, "project", self._project),
            (FeedForward, "forward", self._feed_forward),
        )

    def _linear(self, module: nn.Linear, plain: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        return self._product(x, module) if _few_rows(x) else plain(x)

    def _head(
        self,
        module: LanguageModelHead,
        plain: Callable[..., Any],
        hidden: torch.Tensor,
        vocabulary_range: tuple[int, int] | None = None,
    ) -> Any:
        if vocabulary_range is None or not _few_rows(hidden):
            return apply_head(hidden, module.weight, vocabulary_range=vocabulary_range)
        return self._product(hidden, module, rows=vocabulary_range)

    def _project(self, module: SelfAttention, plain: Callable[..., Any], x: torch.Tensor, rotary: Rotary) -> Projected:
        if not _few_rows(x):
            return plain(x, rotary)
        parts = _projections(module)
        joined = self._product(x, *parts).unflatten(-1, (-1, module.head_dim))
        queries, keys, values = joined.split([part.out_features // module.head_dim for part in parts], dim=-2)
        return module.rotated(queries, keys, values, rotary)

    def _feed_forward(self, module: FeedForward, plain: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        if not _few_rows(x):
            return plain(x)
        gate, up = self._product(x, module.gate_proj, module.up_proj).chunk(2, dim=-1)
        return module.down_proj(F.silu(gate) * up)

    def _product(self, x: torch.Tensor, *modules: nn.Linear, rows: tuple[int, int] | None = None) -> torch.Tensor:
        key = (id(modules[0]), rows)
        if key not in self._packed:
            biases = [module.bias.detach() for module in modules if module.bias is not None]
            weights = [module.weight.detach()[slice(*rows) if rows else slice(None)] for module in modules]
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), MAX_ROWS // 8)
            self._packed[key] = packed, torch.cat(biases) if biases else None
        packed, bias = self._packed[key]
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def _forget_what_has_changed(self) -> None:
        """Compares a checksum of all weights; it costs about as much as one step of decoding."""
        with torch.no_grad():
            checksum = [
                (weight.data_ptr(), int(weight.detach().view(torch.int32).sum(dtype=torch.int64)))
                for weight in self.model.parameters()
            ]
        if checksum != self._checksum:
            self._packed.clear()
            self._checksum = checksum


def _few_rows(x: torch.Tensor) -> bool:
    return 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def _projections(module: nn.Module) -> list[Any]:
    """The linear layers that are packed together, where the module has some."""
    names = {SelfAttention: ("q_proj", "k_proj", "v_proj"), FeedForward: ("gate_proj", "up_proj")}
    return [getattr(module, name) for name in names.get(type(module), ()) if hasattr(module, name)]
