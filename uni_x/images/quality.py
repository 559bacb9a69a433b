"""How good a tokenizer is: likeness of reconstructions, and how much of the codebook is used. Pure functions."""

import math

import torch
import torch.nn.functional as F

LARGEST_PSNR = 100.0  # dB, given to pictures that agree in every byte


def peak_signal_to_noise(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """PSNR of each pair of pictures `(n, 3, height, width)` in [0, 1]: `(n,)` in dB, at most 100.

    10 log10(1 / mean squared error), the mean taken over the picture's pixels and channels.
    """
    errors = (first - second).square().flatten(1).mean(dim=1)
    return (-10 * errors.clamp_min(1e-30).log10()).clamp_max(LARGEST_PSNR)


def structural_similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM of each pair of pictures `(n, channels, height, width)` in [0, 1]: `(n,)`, 1 where they agree.

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13 with its
    constants: a Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03; windows that lie wholly inside
    the picture; the mean over channels. Raises `ValueError` for pictures smaller than the window.
    """
    size, deviation = 11, 1.5
    n, channels, height, width = first.shape
    if min(height, width) < size:
        raise ValueError(f"SSIM needs pictures of at least {size} x {size} pixels, these have {height} x {width}")
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    profile = torch.exp(-offsets.square() / (2 * deviation**2))
    profile = profile / profile.sum()

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        values = F.conv2d(values, profile.view(1, 1, size, 1))
        return F.conv2d(values, profile.view(1, 1, 1, size))

    # in float64, since the variances are small differences of squares
    first = first.double().reshape(n * channels, 1, height, width)
    second = second.double().reshape(n * channels, 1, height, width)
    mean_1, mean_2 = local_mean(first), local_mean(second)
    variance_1 = local_mean(first.square()) - mean_1.square()
    variance_2 = local_mean(second.square()) - mean_2.square()
    covariance = local_mean(first * second) - mean_1 * mean_2
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_1.square() + mean_2.square() + c1) * (variance_1 + variance_2 + c2))
    return likeness.reshape(n, -1).mean(dim=1).float()


def codebook_use(codes: torch.Tensor, codebook_size: int) -> dict[str, float]:
    """How the codes of some pictures spread over the codebook.

    `used` is how many different codes occur, `share` that number over `codebook_size`, `perplexity` two to the
    entropy of their frequencies in bits: the number of codes that evenly used would carry as much.
    """
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    shares = counts[counts > 0] / counts.sum()
    used = len(shares)
    perplexity = math.exp(float(-(shares * shares.log()).sum()))
    return {"used": used, "share": used / codebook_size, "perplexity": perplexity}
