"""The mechanism of central images: sensitivity, noise on every number, a public denominator, random parts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import CentralImages
from privimage.privacy.mechanisms.central import central_sum, noisy_central_means, random_parts
from privimage.privacy.noise import bit_generator

KEY = insecure_fixed(13).derive("test")


def mechanism(
    count: int, parts: int = 2, pooling: int = 2, values: int = 16, noise: float = 0.0
) -> CentralImages:
    return CentralImages(noise_multiplier=noise, count=count, parts=parts, pooling=pooling, values=values)


def of_images(images: torch.Tensor, places: torch.Tensor, rows: int, plan: CentralImages) -> torch.Tensor:
    """The sum where each image is a unit of its own."""
    return central_sum(images, places, torch.arange(len(places)), rows, plan)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, 8), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]),
    st.sampled_from(["noise", "black", "white", "both"]), st.integers(0, 2**31),
)  # fmt: skip
def test_one_image_moves_the_sum_by_at_most_its_sensitivity(
    count: int, rows: int, pooling: int, channels: int, kind: str, seed: int
):
    """To the last bit: the sums are integers, and their difference is compared as integers."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count + 1, channels, 8, 8), dtype=np.uint8)
    if kind != "noise":
        images[0] = {"black": 0, "white": 255}.get(kind, rng.choice([0, 255], images[0].shape))
    values = channels * (8 // pooling) ** 2
    plan = mechanism(count + 1, pooling=pooling, values=values)
    tensors = torch.from_numpy(images), torch.from_numpy(rng.integers(0, rows, count + 1))
    difference = of_images(*tensors, rows, plan) - of_images(*(t[1:] for t in tensors), rows, plan)
    assert sum(value**2 for value in difference.flatten().tolist()) <= plan.one**2 * values
    assert plan.sensitivity**2 == pytest.approx(values)
    assert difference.any(1).sum() <= 1
    # Black and white images reach the bound: it cannot be lowered.
    if kind in ("black", "white"):
        assert sum(value**2 for value in difference.flatten().tolist()) == plan.one**2 * values


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from(["noise", "white"]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_group_moves_the_sum_by_no_more_than_an_image(
    size: int, rows: int, pooling: int, kind: str, seed: int
):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 1, 8, 8), dtype=np.uint8)
    if kind == "white":
        images[:] = 255
    plan, places = mechanism(5, pooling=pooling, values=(8 // pooling) ** 2), rng.integers(0, rows, size)
    tensors = torch.from_numpy(images), torch.from_numpy(places), torch.full((size,), 7)
    squares = sum(value**2 for value in central_sum(*tensors, rows, plan).flatten().tolist())
    assert squares <= plan.one**2 * plan.values
    if kind == "white" and rows == 1:
        assert squares >= plan.one**2 * plan.values * (1 - 1e-4)


def test_small_images_are_means_of_squares_of_pixels():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, :2, :2] = torch.tensor([[0, 255], [255, 255]])
    total = of_images(image, torch.zeros(1, dtype=torch.int64), 1, mechanism(1)) / mechanism(1).one
    assert total.flatten().tolist() == [0.5] + 15 * [-1.0]


def test_a_class_is_divided_by_its_public_share_whatever_its_size():
    """4 images, 2 parts, 2 labels: one image a row is a mean of 1, two are 2, none is 0."""
    images = torch.full((4, 1, 8, 8), 255, dtype=torch.uint8)
    total = of_images(images, torch.tensor([0, 0, 1, 2]), 4, mechanism(4)).numpy()
    means = noisy_central_means(total, mechanism(4), "aes-ctr", KEY)
    assert means.mean(1).tolist() == [2, 1, 1, 0]


def test_every_number_gets_noise_of_the_stated_deviation_also_of_empty_rows():
    """Kolmogorov-Smirnov, false-alarm rate 1e-3, fixed key."""
    plan = mechanism(1000, parts=20, noise=3.0)
    noise = noisy_central_means(np.zeros((200, 16), np.int64), plan, "aes-ctr", KEY)
    # Sums have deviation 3 sqrt(16); rows are divided by 1000 / 200.
    assert stats.kstest(noise.ravel() * 5 / 12, "norm").pvalue > 1e-3


def test_parts_are_equally_likely_and_follow_from_the_bits_of_each_image_alone():
    """Chi-squared, false-alarm rate 1e-3, fixed key."""
    bits = bit_generator("aes-ctr", KEY).random_raw(70_000)
    parts = random_parts(bits, 7)
    assert stats.chisquare(np.bincount(parts, minlength=7)).pvalue > 1e-3
    assert np.array_equal(random_parts(bits[::-1], 7), parts[::-1])
