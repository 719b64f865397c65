"""The embedding mechanism: sensitivity exactly 1, Gaussian noise on every number, division by N."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from privimage.models.network_moments import NetworkMoments, Scales, pooled
from privimage.models.random_features import RandomFeatures
from privimage.models.resnet import classifier
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import MeanEmbedding
from privimage.privacy.mechanisms.embedding import (
    WEIGHT,
    embedding_of,
    embedding_sum,
    noisy_embedding,
)
from privimage.privacy.mechanisms.vectors import QUANTUM
from privimage.privacy.relation import Relation

KEY = insecure_fixed(13).derive("test")
HOSTILE = (0.0, 1.0, -1.0, 1e-30, 1e30, 1e200, -1e308, float("nan"), float("inf"), float("-inf"))


def of_images(features: Tensor, labels: Tensor, rows: int) -> Tensor:
    """The sum where each image is a unit of its own, (rows, F)."""
    total = embedding_sum(features, labels, torch.arange(len(labels)), rows)
    assert total[-1] == 0  # no weight: N is public
    return total[:-1].view(rows, -1)


def without(tensor: Tensor, place: int) -> Tensor:
    return torch.cat([tensor[:place], tensor[place + 1 :]])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, 12), st.integers(1, 40), st.integers(1, 4), st.integers(0, 12), st.sampled_from([1e-3,
    1.0, 1e3]),
    st.lists(st.sampled_from(HOSTILE), max_size=5), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_one_image_moves_the_sum_by_at_most_1(
    count: int,
    size: int,
    rows: int,
    place: int,
    scale: float,
    hostile: list[float],
    all_of_it: bool,
    seed: int,
):
    """To the last bit: the sums are integers, and their difference is compared as integers."""
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(count + 1, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, rows, (count + 1,), generator=generator)
    place %= count + 1
    for position, value in enumerate(hostile):
        features[place, position % size] = value
    if hostile and all_of_it:
        features[place] = hostile[0]
    moved = of_images(features, labels, rows) - of_images(
        without(features, place), without(labels, place), rows
    )
    assert sum(value**2 for value in moved.flatten().tolist()) <= QUANTUM**-2
    assert moved.any(1).sum() <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.sampled_from([2, 8, 512, 2000]),
    st.sampled_from([1e-320, 1e-300, 1e-9, 0.5, 1e300]),
    st.integers(0, 2**31),
)
def test_images_through_the_features_move_it_by_at_most_1(count: int, size: int, bandwidth: float, seed: int):
    """Black and white images and noise, and bandwidths at which the frequencies overflow."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    pixels[:: max(1, count // 2)] = rng.choice([0, 255])
    images, labels = torch.from_numpy(pixels) / 127.5 - 1, torch.from_numpy(rng.integers(0, 3, count))
    features = RandomFeatures(16, size, bandwidth, 0, torch.device("cpu"), torch.float64)(images)
    moved = of_images(features, labels, 3) - of_images(features[1:], labels[1:], 3)
    assert sum(value**2 for value in moved.flatten().tolist()) <= QUANTUM**-2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0, 1.5, 1e9]),
    st.sampled_from([1.0, 1e6, 1e200]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_groups_through_a_network_move_it_by_at_most_1(
    count: int, weights: float, factor: float, together: bool, seed: int
):
    """Networks that are dead or overflow, and public images that say nothing of the sensitive ones' scale;
    all images but the last as a group of one label or of several, or as units of their own.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network = classifier("resnet-small", 1, 3).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(weights)
    pixels = rng.integers(0, 256, (count + 1, 1, 8, 8), dtype=np.uint8)
    pixels[:: max(1, count // 2)] = rng.choice([0, 255])
    images, labels = torch.from_numpy(pixels) / 127.5 - 1, torch.from_numpy(rng.integers(0, 3, count + 1))
    found = Scales.of(pooled(network, torch.zeros(4, 1, 8, 8) + torch.arange(4).view(4, 1, 1, 1) / 4))
    scales = Scales(found.mean, found.factor * factor)
    features = NetworkMoments(network, scales, torch.device("cpu"), torch.float64)(images)
    left = count if together else 1
    groups = torch.arange(count + 1)
    groups[:left] = 0
    moved = embedding_sum(features, labels, groups, 3, WEIGHT) - embedding_sum(
        features[left:], labels[left:], groups[left:], 3, WEIGHT
    )
    assert sum(value**2 for value in moved.flatten().tolist()) <= QUANTUM**-2


def test_features_of_norm_1_are_summed_as_they_are_and_longer_ones_shortened():
    features = torch.tensor([[0.6, 0.8], [-0.6, 0.8], [30.0, 40.0]], dtype=torch.float64)
    total = of_images(features, torch.tensor([0, 1, 1]), 3).double() * QUANTUM
    assert torch.allclose(
        total, torch.tensor([[0.6, 0.8], [0.0, 1.6], [0.0, 0.0]], dtype=torch.float64), atol=1e-8
    )


def test_features_whose_norm_is_rounded_down_to_1_do_not_pass_the_bound():
    """(1, quantum) is longer than 1 by 2^-61, which float64 does not show; its sum in whole numbers does."""
    total = of_images(torch.tensor([[1.0, QUANTUM]], dtype=torch.float64), torch.tensor([0]), 1)
    assert sum(value**2 for value in total.flatten().tolist()) <= QUANTUM**-2
    # The same of two images together, which are (1, 4 quanta).
    whole = torch.tensor([[2.0**29, 0.0], [2.0**29, 4.0]], dtype=torch.float64)
    total = embedding_sum((whole + 0.5) * QUANTUM / (1 - 1e-9), *torch.zeros(2, 2, dtype=torch.int64), 1)
    assert sum(value**2 for value in total.tolist()) <= QUANTUM**-2


def test_an_image_with_a_feature_that_is_not_finite_adds_exactly_nothing():
    features = torch.full((3, 4), 0.5, dtype=torch.float64)
    alone = of_images(features[:1], torch.zeros(1, dtype=torch.int64), 1)
    features[1, 2], features[2, 0] = float("nan"), float("inf")
    assert torch.equal(of_images(features, torch.zeros(3, dtype=torch.int64), 1), alone)


def test_sums_do_not_depend_on_the_order_or_the_blocks():
    """Integers.

    Float sums would differ in their last bits, and with equal noise the difference of two runs would show it.
    """
    generator = torch.Generator().manual_seed(1)
    features = RandomFeatures(16, 64, 0.5, 0, torch.device("cpu"), torch.float64)(
        torch.rand(500, 16, generator=generator)
    )
    labels, order = torch.randint(0, 3, (500,), generator=generator), torch.randperm(500, generator=generator)
    whole = of_images(features, labels, 3)
    shuffled, by_label = features[order], labels[order]
    parts = sum(of_images(shuffled[i : i + 7], by_label[i : i + 7], 3) for i in range(0, 500, 7))
    assert torch.equal(whole, parts)


def test_the_noise_is_gaussian_of_sigma_over_n_on_every_number():
    """No images at all: what comes out is noise.

    Kolmogorov-Smirnov and variance, false-alarm rate 1e-3 each, fixed key.
    """
    plan = MeanEmbedding(count=250, features=2000, noise_multiplier=3.0)
    noisy = embedding_of(noisy_embedding(np.zeros(20001, np.int64), plan, "aes-ctr", KEY), plan)
    noise = noisy.mean.ravel() / noisy.deviation
    assert noisy.deviation == pytest.approx(3.0 / 250)
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert 5e-4 < stats.chi2.cdf((noise**2).sum(), noise.size) < 1 - 5e-4


def test_it_is_the_sum_divided_by_the_public_n_not_by_the_images_that_are_there():
    features = torch.full((3, 4), 0.5, dtype=torch.float64)
    total = embedding_sum(features, torch.zeros(3, dtype=torch.int64), torch.arange(3), 1).numpy()
    plan = MeanEmbedding(count=100, features=4, noise_multiplier=1e-9)
    assert embedding_of(noisy_embedding(total, plan, "aes-ctr", KEY), plan).mean == pytest.approx(
        np.full((1, 4), 0.015), rel=1e-6
    )


def test_other_keys_give_other_noise_and_the_same_key_the_same():
    plan, total = MeanEmbedding(count=10, features=50, noise_multiplier=1.0), np.zeros(101, np.int64)
    first, again, other = (
        noisy_embedding(total, plan, "aes-ctr", key) for key in (KEY, KEY, insecure_fixed(14).derive("test"))
    )
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.5


def test_groups_are_shortened_together_and_the_mean_is_over_all_images():
    """Three groups of 4, 2 and 1 images of different classes, each of a unit vector: no mean within a group,
    which would leave 1 / n of each. Without noise the embedding is a mean over images, weighted by group.
    """
    groups, labels = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    ones = torch.ones(7, 1, dtype=torch.float64)
    total = embedding_sum(ones, labels, groups, 4).double() * QUANTUM
    root = 2**-0.5
    assert total.tolist() == pytest.approx([0.5 + root, 0.5 + root, 1.5, 0.5, 0], rel=1e-6)
    plan = MeanEmbedding(count=3, features=1, noise_multiplier=1e-9, relation=Relation("group"))
    sums = embedding_sum(ones, labels, groups, 4, plan.weight).numpy()
    found = embedding_of(noisy_embedding(sums, plan, "aes-ctr", KEY), plan)
    # Of unit vectors in rows of their own about as much is left of all groups.
    assert found.mean.sum() == pytest.approx(1.0, rel=1e-6) and not found.known
    assert found.mean[:, 0] == pytest.approx((total[:-1] / total.sum()).numpy(), rel=0.03)
    # Fewer images than groups there cannot be, whatever noise says of their number.
    assert embedding_of(0 * sums, plan).deviation == pytest.approx(1e-9 * (1 + WEIGHT**2) ** 0.5 / 3)


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
@pytest.mark.parametrize("size", [1, 2, 1000, 300_000])
def test_a_group_of_any_size_is_one(size: int, weight: float):
    """Alike, and in one row: squares of hundreds of thousands of vectors do not overflow."""
    features = torch.full((size, 2), 0.5**0.5, dtype=torch.float64)
    zeros = torch.zeros(size, dtype=torch.int64)
    total = embedding_sum(features, zeros, zeros, 1, weight).tolist()
    assert 1 - 1e-6 < sum(value**2 for value in total) * QUANTUM**2 <= 1
