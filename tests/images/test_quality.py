"""PSNR, SSIM and codebook use against their definitions."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from uni_x.images.quality import codebook_use, peak_signal_to_noise, structural_similarity


def test_psnr_is_ten_times_the_log_of_the_inverse_error():
    first = torch.zeros(2, 3, 8, 8)
    second = torch.stack([torch.full((3, 8, 8), 0.1), torch.zeros(3, 8, 8)])
    assert peak_signal_to_noise(first, second).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_ssim_agrees_with_gaussian_filters_of_scipy():
    random = np.random.default_rng(0)
    first = random.random((24, 30))
    second = np.clip(first + 0.2 * random.standard_normal((24, 30)), 0, 1)

    def mean(values):
        return ndimage.gaussian_filter(values, sigma=1.5, radius=5)[5:-5, 5:-5]

    mean_1, mean_2 = mean(first), mean(second)
    variances = mean(first**2) - mean_1**2 + mean(second**2) - mean_2**2
    covariance = mean(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + 1e-4) / (mean_1**2 + mean_2**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (variances + 9e-4)
    ours = structural_similarity(torch.from_numpy(first)[None, None], torch.from_numpy(second)[None, None])
    assert ours.item() == pytest.approx((luminance * structure).mean(), abs=1e-5)


def test_ssim_of_a_picture_with_itself_is_one():
    picture = torch.rand(2, 3, 16, 16)
    assert structural_similarity(picture, picture).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_needs_pictures_as_large_as_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        structural_similarity(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_codes_that_are_used_evenly_have_their_number_as_perplexity():
    use = codebook_use(torch.tensor([[[0, 1], [2, 3]]]), codebook_size=8)
    assert use == pytest.approx({"used": 4, "share": 0.5, "perplexity": 4.0})
    assert codebook_use(torch.tensor([0, 0, 0, 5]), 8)["perplexity"] < 2.0
