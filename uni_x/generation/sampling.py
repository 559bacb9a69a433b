"""From logits to the next token: guidance, filters, and draws that do not depend on what else is in the batch."""

from dataclasses import dataclass

import torch

from uni_x.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: keeps the k most likely tokens (and those tied with the last of them); 0 keeps all.
        top_p: keeps the smallest set of most likely tokens whose probability reaches p.
        guidance_scale: classifier-free guidance (Ho and Salimans, 2022); 1 is off.
        seed: of this request alone; the same request draws the same tokens in any batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature is 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k is 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p lies above 0 and is at most 1, not {self.top_p}")


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance on logits `(rows, vocabulary)`, with a scale for each row `(rows,)`."""
    return unconditional + (conditional - unconditional) * scale[:, None]


def filtered_probabilities(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Probabilities after temperature, top-k and top-p, in this order; a row of settings a row of logits.

    Args:
        logits: `(rows, vocabulary)`, -inf where a token is not allowed.
        temperature, top_k, top_p: `(rows,)`; a temperature of 0 leaves the most likely token alone.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    vocabulary = logits.shape[1]
    limits = torch.where(greedy, 1, torch.where(top_k == 0, vocabulary, top_k)).clamp(max=vocabulary)
    if bool((limits < vocabulary).any()) or bool((top_p < 1).any()):
        descending = scaled.sort(dim=-1, descending=True).values
        kth = descending.gather(1, limits[:, None] - 1)
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
        scaled = _keep_nucleus(scaled, top_p)
    return torch.softmax(scaled, dim=-1)


def _keep_nucleus(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ascending, order = scaled.sort(dim=-1, stable=True)
    # the most likely token always stays
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)[:, None]
    dropped[:, -1] = False
    dropped &= (top_p < 1)[:, None]
    return scaled.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), float("-inf"))


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverts the cumulative distribution of each row at `uniform` `(rows,)` in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    at = uniform[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, at, right=True).squeeze(1)
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(chosen, last)
