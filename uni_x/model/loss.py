"""The language-model head and its loss, in chunks, apart for text and image targets.

Logits of a whole batch over a vocabulary of 150,000 outweigh everything else in a training step. Here a chunk of
tokens gets its logits, its loss and its gradients at once and the logits are dropped (the idea of Liger Kernel's fused
linear cross entropy, Hsu et al., 2024), so that no logit is kept and none is computed twice; on CUDA that kernel itself
does it where it is installed. The loss lives in the module that owns the head's weight: under ZeRO-3 and FSDP a weight
is whole only while its own module runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LIGER_DEVICES = {"cuda"}
# of the logits of a chunk, at the most: the weight is read, and its gradient added to, once a chunk
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Targets:
    """What the loss is asked for: the positions that have a target, sorted text targets first.

    Attributes:
        rows: `(targets,)` index of each position among the tokens.
        ids: `(targets,)` the token that follows it.
        sizes: number of text targets and of image codes.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    sizes: tuple[int, int]

    def to(self, device: torch.device | str, **options: Any) -> "Targets":
        """The same on another device; accelerate calls it where a model is spread over several."""
        return Targets(self.rows.to(device, **options), self.ids.to(device, **options), self.sizes)


@dataclass(frozen=True)
class LossOptions:
    """How the two losses are weighed; see `UniXConfig`. `codes` is the first and the last id + 1 of the image codes."""

    codes: tuple[int, int]
    by_modality: bool = False
    text_weight: float = 1.0
    image_weight: float = 1.0
    z_loss: float = 0.0


class LanguageModelHead(nn.Linear):
    """Projection to the vocabulary. Given targets it returns losses, else logits."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        targets: Targets | None = None,
        options: LossOptions | None = None,
        vocabulary_range: tuple[int, int] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """`(tokens, hidden_size)` to logits `(tokens, vocab_size)`, or to losses of targets, in nats.

        The losses are the weighted total, which alone carries a gradient, the plain sums of text and image, and the
        plain loss of each target, empty where Liger's kernel is used, which gives sums alone.
        `vocabulary_range` asks for the logits of the ids from its first to before its last alone.
        """
        return apply_head(hidden, self.weight, targets, options, vocabulary_range)


def apply_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: Targets | None = None,
    options: LossOptions | None = None,
    vocabulary_range: tuple[int, int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What `LanguageModelHead` computes, with a weight `(vocab_size, hidden_size)` from elsewhere."""
    if targets is not None and options is not None:
        chosen = hidden.index_select(0, targets.rows)
        if not torch.is_grad_enabled():
            chosen, weight = chosen.detach(), weight.detach()  # no gradient is worked out beside the loss
        kernel = liger_loss() if chosen.device.type in LIGER_DEVICES and chosen.shape[0] else None
        if kernel is not None:
            return _losses_by_liger(chosen, weight, targets, options, kernel)
        return _ChunkedLoss.apply(chosen, weight, targets, options)
    return F.linear(hidden, weight if vocabulary_range is None else weight[slice(*vocabulary_range)])


@cache
def liger_loss() -> Callable[..., Any] | None:
    """Liger Kernel's fused linear cross entropy, None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss


def _losses_by_liger(
    hidden: torch.Tensor, weight: torch.Tensor, targets: Targets, options: LossOptions, kernel: Callable[..., Any]
) -> tuple[torch.Tensor, ...]:
    fused = kernel(
        reduction="sum", lse_square_scale=options.z_loss, return_z_loss=True, accum_dtype=torch.float32
    )  # its loss holds the z-loss, which it returns apart too
    total, plain = hidden.new_zeros((), dtype=torch.float32), []
    weights = (options.text_weight, options.image_weight)
    parts = zip(hidden.split(targets.sizes), targets.ids.split(targets.sizes), strict=True)
    for (rows, ids), loss_weight, (first, last) in zip(
        parts, weights, _vocabularies(weight.shape[0], options), strict=True
    ):
        if not rows.shape[0]:
            plain.append(torch.zeros_like(total))
            continue
        output = fused(weight[first:last], rows, ids - first)
        total = total + loss_weight * output.loss.float()
        plain.append((output.loss - output.z_loss).detach().float())
    return total, plain[0], plain[1], hidden.new_empty(0, dtype=torch.float32)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: Targets, options: LossOptions
    ) -> tuple[torch.Tensor, ...]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        plain = []
        start = 0
        for size, loss_weight, vocabulary in zip(
            targets.sizes,
            (options.text_weight, options.image_weight),
            _vocabularies(weight.shape[0], options),
            strict=True,
        ):
            part = slice(start, start + size)
            first, last = vocabulary
            z_loss = _work_in_chunks(
                hidden[part],
                weight[first:last],
                targets.ids[part] - first,
                losses[part],
                None if hidden_gradient is None else hidden_gradient[part],
                None if weight_gradient is None else weight_gradient[first:last],
                loss_weight,
                options.z_loss,
            )
            plain.append(losses[part].sum())
            total += loss_weight * (plain[-1] + options.z_loss * z_loss)
            start += size
        gradient = None if weight_gradient is None else weight_gradient.to(weight.dtype)
        ctx.save_for_backward(hidden_gradient, gradient)
        ctx.spent = False
        ctx.mark_non_differentiable(*plain, losses)
        return total, *plain, losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.spent:
            raise RuntimeError("the gradients of this loss are scaled in place, so backward runs through it once")
        ctx.spent = True
        hidden, weight = (
            None if gradient is None else gradient.mul_(gradients[0].to(gradient.dtype))
            for gradient in ctx.saved_tensors
        )
        return hidden, weight, None, None


def _vocabularies(vocab_size: int, options: LossOptions) -> tuple[tuple[int, int], tuple[int, int]]:
    """Range of ids that the softmax runs over, for text targets and for image codes."""
    if options.by_modality:
        return (0, options.codes[0]), options.codes
    return (0, vocab_size), (0, vocab_size)


def _work_in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    losses: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
    loss_weight: float,
    z_weight: float,
) -> torch.Tensor:
    """Fills in the cross entropies and gives the sum of squared log-partitions; adds weighted gradients in place."""
    z_loss = hidden.new_zeros((), dtype=torch.float32)
    count = hidden.shape[0]
    chunks = -(-count * 4 * weight.shape[0] // CHUNK_BYTES)
    chunk = max(1, -(-count // max(1, chunks)))
    on_cpu = hidden.device.type == "cpu"
    # one piece of memory for the logits of all chunks: fresh pages for each would cost as much as the softmax
    buffer = hidden.new_empty((chunk, weight.shape[0])) if on_cpu else None
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        part = hidden[rows]
        logits = torch.mm(part, weight.t(), out=None if buffer is None else buffer[: part.shape[0]]).float()
        target = ids[rows, None]
        of_target = logits.gather(1, target)
        top, place = logits.max(dim=-1, keepdim=True)
        # a CPU's softmax over the last dimension works row by row, and may write where it reads
        gradient = torch.softmax(logits, dim=-1, out=logits if on_cpu else None)
        partition = top - gradient.gather(1, place).log()
        losses[rows] = (partition - of_target)[:, 0]
        z_loss += partition.square().sum()
        if hidden_gradient is None and weight_gradient is None:
            continue
        if z_weight:
            gradient.mul_(1 + 2 * z_weight * partition)
        gradient.scatter_add_(1, target, gradient.new_full((), -1.0).expand_as(target))
        if loss_weight != 1.0:
            gradient.mul_(loss_weight)
        gradient = gradient.to(weight.dtype)
        if hidden_gradient is not None:
            torch.mm(gradient, weight, out=hidden_gradient[rows])
        if weight_gradient is not None:
            if gradient.dtype == weight_gradient.dtype:
                weight_gradient.addmm_(gradient.t(), part)
            else:
                weight_gradient += gradient.t() @ part
    return z_loss
