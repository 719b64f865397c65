"""The moments of a warm start: sensitivity, estimates under noise, images that follow from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import read_sensitive
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import TINY, charges

from privimage.config import load
from privimage.distributed.world import ALONE
from privimage.privacy.mechanisms.embedding import QUANTUM, embedding_sum
from privimage.privacy.mechanisms.moments import coordinates, matrix, products
from privimage.runs import pipeline
from privimage.stages.moments import Coordinates, GaussianImages, Moments, _believed


def squares(total: torch.Tensor) -> int:
    return sum(value**2 for value in total.flatten().tolist())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 5, 64]), st.sampled_from([1, 3]),
    st.sampled_from(["noise", "black", "white", "both"]), st.integers(0, 2**31),
)  # fmt: skip
def test_images_of_a_unit_move_each_sum_by_at_most_one(
    size: int, rows: int, count: int, channels: int, kind: str, seed: int
):
    """A unit is an image, or a group of several; sums are integers, and compared as integers."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, channels, 8, 8), dtype=np.uint8)
    if kind != "noise":
        images[:] = {"black": 0, "white": 255}.get(kind, rng.choice([0, 255], images.shape))
    z = Coordinates((channels, 8, 8), count).of(torch.from_numpy(images))
    labels, sizes = torch.from_numpy(rng.integers(0, rows, size)), torch.full((size,), size)
    assert squares(embedding_sum(z, labels, sizes, rows)) <= QUANTUM**-2
    # Whatever the means are: distances are shortened to a norm of 1.
    far = z - torch.from_numpy(rng.normal(size=(rows, z.shape[1])))[labels]
    far = far / far.norm(dim=1, keepdim=True).clamp(min=1.0)
    assert squares(embedding_sum(products(far), torch.zeros_like(labels), sizes, 1)) <= QUANTUM**-2


def test_products_are_outer_products_of_the_same_length():
    z = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outer = z[:, :, None] * z[:, None]
    torch.testing.assert_close(products(z).norm(dim=1), outer.flatten(1).norm(dim=1))
    torch.testing.assert_close(matrix(products(z).sum(0), 7), outer.sum(0))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)])
def test_all_coordinates_together_are_the_image(shape: tuple[int, int, int]):
    images = torch.randint(0, 256, (5, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    at = Coordinates(shape, int(np.prod(shape)))
    back = at.of(images) @ at.basis.T * at.length
    torch.testing.assert_close(back, images.flatten(1).double() / 127.5 - 1, atol=1e-6, rtol=0)
    # The first is the lightness of the whole image.
    first = at.basis[:, 0]
    torch.testing.assert_close(first, torch.full_like(first, len(first) ** -0.5))


def test_differences_are_believed_as_far_as_they_exceed_the_noise():
    """Fixed seed: 4,000 numbers a band, so that shares are within 0.1 of what they should be."""
    rng = np.random.default_rng(0)
    bands = np.repeat([0, 1, 2], 4000)[None]
    true = rng.normal(size=bands.shape) * np.array([3.0, 1.0, 0.0])[bands]
    believed = _believed(np.zeros_like(true), true + rng.normal(size=true.shape), 1.0, bands)
    shares = [(believed * true)[bands == b].sum() / (true**2)[bands == b].sum() for b in (0, 1)]
    assert shares == pytest.approx([0.9, 0.5], abs=0.1)
    assert np.abs(believed[bands == 2]).max() < 0.5


def test_gaussian_images_have_the_means_and_the_covariance():
    config, rng = load(TINY), np.random.default_rng(0)
    d = coordinates(config)
    means, root = rng.normal(size=(2, d)) / 30, rng.normal(size=(d, d)) / 200
    draw = GaussianImages(config, ALONE, Moments(means, root @ root.T))
    images, labels = draw(3, torch.arange(4000))
    z = Coordinates(images.shape[1:], d).of(images).numpy()
    for label in (0, 1):
        mine = z[labels.numpy() == label]
        assert np.abs(mine.mean(0) - means[label]).max() < 0.01
        assert np.abs(np.cov(mine.T) - root @ root.T).max() < 5e-4
    again, _ = draw(3, torch.arange(10, 20))
    assert torch.equal(again, images[10:20])  # an image belongs to its place, not to its batch


WARM = (
    "warm.starts=[moments]", "warm.steps=6", "warm.batch_size=16", "privacy.insecure_fixed_key=7",
    "privacy.epsilon=200", "warm.max_rise=1",
)  # fmt: skip


@pytest.mark.parametrize("method", ["dpdm", "privimage+d", "pdp-diffusion"])
def test_a_run_draws_each_moment_once_near_the_truth(tmp_path: Path, method: str):
    config = load(TINY, [*WARM, f"method={method}", f"run.dir={tmp_path / 'run'}"])
    assert pipeline.run(config, config.stages[: config.stages.index("warm") + 1]) == 0
    used = sum(one.count for one in charges(tmp_path / "run"))
    assert used == (3 if method == "privimage+d" else 2)
    images = read_sensitive(config, "train")
    noisy = np.load(tmp_path / "run" / "warm" / "means.npz")["values"]
    z = Coordinates((1, 8, 8), coordinates(config)).of(torch.from_numpy(images.images)).numpy()
    clean = np.stack([z[images.labels == row].sum(0) for row in range(10)]) / len(z)
    assert np.abs(noisy - clean).max() < 0.05 and np.abs(clean).max() > 0.05
