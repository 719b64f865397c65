"""Random Fourier features.

Norm 1, inner products that estimate the Gaussian kernel, frequencies from the seed alone.
"""

import pytest
import torch

from privimage.models.random_features import RandomFeatures

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 10, 3000])
def test_features_have_norm_1(size: int) -> None:
    images = torch.rand(7, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = RandomFeatures(75, size, 0.3, 0, CPU, torch.float64)(images)
    assert features.shape == (7, size)
    assert torch.allclose(features.norm(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("bandwidth", [0.3, 0.6, 2.0])
def test_inner_products_estimate_the_gaussian_kernel(bandwidth: float) -> None:
    """Each of the F / 2 terms is a cosine: the error has a deviation of at most 1 / sqrt(F / 2) = 0.007.

    Five of them, 15 pairs, fixed seed.
    """
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    features = RandomFeatures(64, 40_000, bandwidth, 1, CPU, torch.float64)(images)
    squares = torch.cdist(images.flatten(1), images.flatten(1)).square()
    assert torch.allclose(features @ features.T, torch.exp(-squares / (2 * bandwidth**2 * 64)), atol=0.035)


def test_the_frequencies_are_those_of_the_seed_in_any_precision() -> None:
    first, again, other = (
        RandomFeatures(16, 8, 0.5, seed, CPU, torch.float64).frequencies for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(RandomFeatures(16, 8, 0.5, 3, CPU).frequencies, first.float())
