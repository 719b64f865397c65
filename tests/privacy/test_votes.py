"""The mechanism of Private Evolution: one vote an image, in its own class, whatever the features.

Noise on every bin.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import NearestHistogram
from privimage.privacy.mechanisms.histogram import ONE, noisy_histogram, vote_counts
from privimage.stages.evolve import chances
from privimage.stages.nearest import nearest

HOSTILE = (0.0, 1e-45, 1e19, 3e38, -3e38, float("nan"), float("inf"), float("-inf"))


def histogram(features: Tensor, labels: Tensor, candidates: Tensor) -> np.ndarray:
    votes, _ = nearest(features, labels, candidates)
    own = np.arange(len(votes))
    return vote_counts(votes[:, None].numpy(), labels.numpy(), own, candidates.shape[:2], 1) / ONE


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(0, 60), st.integers(1, 3), st.integers(1, 40), st.integers(0, 60),
    st.lists(st.sampled_from(HOSTILE), max_size=4),
    st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_one_image_moves_the_histogram_by_at_most_1(
    count: int,
    rows: int,
    members: int,
    place: int,
    hostile: list[float],
    crowded: bool,
    spoilt: bool,
    seed: int,
) -> None:
    """Also for features that overflow, candidates that lie within rounding of each other, and candidates that
    are not finite.
    """
    generator, place = torch.Generator().manual_seed(seed), place % (count + 1)
    features, labels = (
        torch.randn(count + 1, 4, generator=generator),
        torch.randint(0, rows, (count + 1,), generator=generator),
    )
    candidates = torch.randn(rows, members, 4, generator=generator)
    if crowded:
        candidates = candidates[:, :1] + 1e-6 * candidates
    for position, value in enumerate(hostile):
        features[place, position] = value
        if spoilt:
            candidates[0, position % members, position] = value
    keep = torch.arange(count + 1) != place
    moved = histogram(features, labels, candidates) - histogram(features[keep], labels[keep], candidates)
    assert np.abs(moved).sum() == 1
    assert moved[labels[place]].sum() == 1


def test_an_image_votes_for_the_nearest_of_its_own_class_only() -> None:
    candidates = torch.tensor([[[0.0], [10.0]], [[4.0], [6.0]]])
    votes, distances = nearest(
        torch.tensor([[4.9], [5.1], [4.9], [5.1]]), torch.tensor([0, 0, 1, 1]), candidates
    )
    assert votes.tolist() == [0, 1, 0, 1]
    assert torch.allclose(distances, torch.tensor([4.9, 4.9, 0.9, 0.9]))


def test_the_noise_is_gaussian_of_sigma_on_every_bin_of_every_class() -> None:
    """No votes at all: what comes out is noise.

    Kolmogorov-Smirnov and variance, false-alarm rate 1e-3 each, fixed key.
    """
    plan, key = (
        NearestHistogram(iterations=10, noise_multiplier=6.0, per_image=1),
        insecure_fixed(12).derive("test"),
    )
    noise = (
        noisy_histogram(
            np.zeros((0, 1), np.int64), *[np.zeros(0, np.int64)] * 2, (10, 2000), plan, "aes-ctr", key
        ).ravel()
        / 6.0
    )
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert 5e-4 < stats.chi2.cdf((noise**2).sum(), noise.size) < 1 - 5e-4


def test_counts_are_lowered_by_the_threshold_and_divided_by_their_sum() -> None:
    found = chances(torch.tensor([[1.0, 3.0, 8.0, -5.0], [1.0, 0.0, -1.0, 2.0]]), threshold=2.0)
    assert found.tolist() == [[0.0, 1 / 7, 6 / 7, 0.0], [0.25] * 4]
