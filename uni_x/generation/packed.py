"""Weights packed for products of a few rows, which is what decoding on a CPU is made of.

A step of decoding reads every weight once for a handful of rows. torch's float32 product reads them at a third of the
memory's speed; oneDNN's, on weights that were brought into its own order beforehand, comes near it (the same operators
that torch.compile uses on CPUs). It costs the memory of the weights a second time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from uni_x.model.causal_lm import UniXForCausalLM
from uni_x.model.loss import LanguageModelHead, apply_head

MAX_ROWS = 64  # above, the plain product is as fast or faster


class PackedWeights:
    """Packed copies of the weights of a model's linear layers.

    Args:
        model: as the engine uses it; weights that have changed are packed anew at the next use.
    """

    def __init__(self, model: UniXForCausalLM):
        self.model = model
        self._packed: dict[tuple[int, tuple[int, int] | None], tuple[tuple[int, int], torch.Tensor]] = {}

    @property
    def is_possible(self) -> bool:
        """Whether the model's device and dtype have these operators."""
        weight = self.model.get_input_embeddings().weight
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lets the linear layers and the head use packed weights; nothing changes where that is not possible."""
        if not self.is_possible:
            yield
            return
        replaced: list[nn.Module] = []
        try:
            for module in self.model.modules():
                forward: Callable[..., Any]
                if type(module) is nn.Linear:
                    forward = partial(self._linear, module)
                elif type(module) is LanguageModelHead:
                    forward = partial(self._head, module)
                else:
                    continue
                module.forward = forward  # type: ignore[method-assign]
                replaced.append(module)
            yield
        finally:
            for module in replaced:
                del module.forward

    def _linear(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if not 0 < x.numel() <= MAX_ROWS * x.shape[-1]:
            return F.linear(x, module.weight, module.bias)
        return _product(x, self._pack(module.weight), module.bias)

    def _head(
        self,
        module: LanguageModelHead,
        hidden: torch.Tensor,
        vocabulary_range: tuple[int, int] | None = None,
    ) -> Any:
        if vocabulary_range is None or hidden.numel() > MAX_ROWS * hidden.shape[-1]:
            return apply_head(hidden, module.weight, vocabulary_range=vocabulary_range)
        return _product(hidden, self._pack(module.weight, vocabulary_range), None)

    def _pack(self, weight: torch.Tensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
        state = (weight.data_ptr(), weight._version)
        key = (id(weight), rows)
        found = self._packed.get(key)
        if found is None or found[0] != state:
            part = weight.detach() if rows is None else weight.detach()[slice(*rows)]
            found = self._packed[key] = (state, torch.ops.mkldnn._reorder_linear_weight(part, MAX_ROWS // 8))
        return found[1]


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
