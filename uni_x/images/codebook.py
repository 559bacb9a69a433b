"""The codebook: nearest codes, and how a codebook is learnt.

`Codebook` is the part of a tokenizer that is saved. `CodebookLearner` stands beside it in training alone.
"""

import torch
from torch import nn

DISTANCES_AT_ONCE = 2**24  # 64 MB of float32, whatever the number of vectors and codes


class Codebook(nn.Module):
    """`size` vectors of `dim`; a latent vector's code is the index of the nearest one."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight)

    def codes(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(n, dim, h, w)` to codes `(n, h, w)`, int64."""
        n, dim, height, width = latents.shape
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, dim)
        return nearest_codes(vectors, self.embedding.weight).view(n, height, width)

    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(n, h, w)` to their vectors `(n, dim, h, w)`."""
        return self.embedding(codes).permute(0, 3, 1, 2)


@torch.no_grad()
def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the codebook row with the least Euclidean distance: `(count, dim)`, `(size, dim)` to `(count,)`.

    Works through the vectors in chunks, so that memory does not grow with count x size.
    """
    squares = codebook.square().sum(dim=1)
    chunk = max(1, DISTANCES_AT_ONCE // len(codebook))
    # |v - c|^2 less |v|^2, which is the same for every code
    nearest = [torch.addmm(squares, part, codebook.T, alpha=-2).argmin(dim=1) for part in vectors.split(chunk)]
    return torch.cat(nearest) if nearest else torch.empty(0, dtype=torch.int64, device=vectors.device)


class CodebookLearner(nn.Module):
    """Moves each code to the running mean of the vectors it stands for.

    The moving averages are those of van den Oord et al. 2017 (VQ-VAE), appendix A.1; the start is k-means++ with a
    few rounds of k-means; codes that fall out of use restart at vectors of the batch, drawn in proportion to their
    squared error. Random draws come from torch's global generator.
    """

    counts: torch.Tensor
    sums: torch.Tensor

    def __init__(self, codebook: torch.Tensor, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("counts", torch.zeros(len(codebook), device=codebook.device))
        self.register_buffer("sums", torch.zeros_like(codebook))

    @torch.no_grad()
    def start(self, codebook: torch.Tensor, vectors: torch.Tensor) -> None:
        """Fills `codebook` `(size, dim)`, in place, with centres of `vectors` `(count, dim)` found by k-means."""
        codebook.copy_(k_means(vectors, len(codebook)))
        codes = nearest_codes(vectors, codebook)
        self.counts.copy_(torch.bincount(codes, minlength=len(codebook)))
        self.sums.copy_(codebook * self.counts[:, None])

    @torch.no_grad()
    def update(self, codebook: torch.Tensor, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """Takes a batch of vectors `(count, dim)` and their codes `(count,)` into the means; `codebook` in place."""
        counts = torch.bincount(codes, minlength=len(codebook)).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        in_use = self.counts > 1e-3  # a mean of less than that would be noise; the code stays where it is
        means = self.sums / self.counts.clamp_min(1e-3)[:, None]
        codebook.copy_(torch.where(in_use[:, None], means, codebook))

    @torch.no_grad()
    def restart(self, codebook: torch.Tensor, vectors: torch.Tensor, codes: torch.Tensor) -> int:
        """Moves codes that stand for less than a hundredth of their fair share; returns how many were moved."""
        errors = (vectors - codebook[codes]).square().sum(dim=1)
        idle = (self.counts < 0.01 * self.counts.mean()).nonzero().flatten()
        # where every vector has its code to rounding, there is nothing to move to
        worth = errors > 1e-4 * vectors.var(dim=0).sum()
        count = min(len(idle), int(worth.sum()))
        if count == 0:
            return 0
        idle = idle[:count]
        chosen = torch.multinomial(errors * worth, count)
        codebook[idle] = vectors[chosen]
        self.counts[idle] = self.counts.mean()
        self.sums[idle] = vectors[chosen] * self.counts[idle, None]
        return count


def k_means(vectors: torch.Tensor, count: int, rounds: int = 10) -> torch.Tensor:
    """`count` centres `(count, dim)` of `vectors`: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds."""
    centres = vectors.new_empty(count, vectors.shape[1])
    centres[0] = vectors[torch.randint(len(vectors), ())]
    errors = (vectors - centres[0]).square().sum(dim=1)
    for index in range(1, count):
        # fewer distinct vectors than centres: the rest start anywhere
        weights = errors if errors.sum() > 0 else torch.ones_like(errors)
        centres[index] = vectors[torch.multinomial(weights, 1)[0]]
        errors = torch.minimum(errors, (vectors - centres[index]).square().sum(dim=1))
    for _ in range(rounds):
        codes = nearest_codes(vectors, centres)
        sizes = torch.bincount(codes, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
        centres = torch.where((sizes > 0)[:, None], sums / sizes.clamp_min(1)[:, None], centres)
    return centres
