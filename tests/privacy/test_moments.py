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
from privimage.privacy.mechanisms.embedding import Embedding, embedding_sum
from privimage.privacy.mechanisms.moments import (
    coordinates,
    counted,
    matrix,
    products,
)
from privimage.privacy.mechanisms.vectors import QUANTUM
from privimage.runs import pipeline
from privimage.stages.moments import Coordinates, GaussianImages, Moments, _believed, _covariance, _means


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
    labels, group = torch.from_numpy(rng.integers(0, rows, size)), torch.zeros(size, dtype=torch.int64)
    assert squares(embedding_sum(counted(z), labels, group, rows)) <= QUANTUM**-2
    assert counted(z).norm(dim=1).max() <= 1 + 1e-12  # rounded; sums shorten it
    # Whatever the means are: distances are shortened to a norm of 1.
    far = z - torch.from_numpy(rng.normal(size=(rows, z.shape[1])))[labels]
    far = far / far.norm(dim=1, keepdim=True).clamp(min=1.0)
    assert squares(embedding_sum(products(far), torch.zeros_like(labels), group, 1)) <= QUANTUM**-2


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
    noisy = true + rng.normal(size=true.shape)
    believed = _believed(np.zeros_like(true), noisy, np.array(1.0), bands)
    shares = [(believed * true)[bands == b].sum() / (true**2)[bands == b].sum() for b in (0, 1)]
    assert shares == pytest.approx([0.9, 0.5], abs=0.1)
    assert np.abs(believed[bands == 2]).max() < 0.5


@pytest.mark.parametrize("public", [False, True])
def test_a_rare_class_has_the_mean_of_its_images(public: bool):
    """19 of 20 images are of one class: sums over N, and a share of N for each class, are told apart."""
    rng, at, count, noise = np.random.default_rng(0), Coordinates((1, 8, 8), 20), 2000, 1.0
    true, labels = rng.normal(size=(2, 20)) / 6, (np.arange(count) % 20 == 0).astype(int)
    z = counted(torch.from_numpy(true[labels] + rng.normal(size=(count, 20)) / 100))
    sums = np.stack([z[labels == row].sum(0) for row in (0, 1)]) + noise * rng.normal(size=(2, 21))
    given_ = Moments(np.zeros((2, 20)), np.eye(20)) if public else None
    found = _means(Embedding(sums / count, noise / count), given_, at)
    # The noise on a mean is 1.1 / 1,900 for the frequent class and 1.1 / 100 for the rare one.
    assert np.abs(found - true).max(1) == pytest.approx([0, 0], abs=0.05)
    assert np.abs(found - true)[0].max() < 0.005


def test_the_only_class_has_all_images():
    at = Coordinates((1, 8, 8), 5)
    z = torch.full((100, 5), 0.2, dtype=torch.float64)
    sums = counted(z).sum(0, keepdim=True).numpy() / 100
    sums[0, -1] = 0.9  # whatever noise says
    assert np.allclose(_means(Embedding(sums, 0.01), None, at), 0.2, atol=0.02)
    # Over a number that is noisy itself, both divided alike: of groups.
    sums = 0.7 * counted(z).sum(0, keepdim=True).numpy() / 100
    assert np.allclose(_means(Embedding(sums, 0.01, known=False), None, at), 0.2, atol=0.02)


def test_no_direction_is_without_spread():
    """Noise larger than the covariance: eigenvalues are not negative, and no less than a public quarter."""
    rng, d = np.random.default_rng(0), 16
    at = Coordinates((1, 8, 8), d)
    public = np.diag(np.linspace(0.02, 0.001, d))
    true = 2 * products(torch.from_numpy(np.linalg.cholesky(public)).T).sum(0).numpy() / 0.6**2
    noisy = true + 5.0 * rng.normal(size=136) / 1000
    found = _covariance(Embedding(noisy[None], 5.0 / 1000), Moments(np.zeros((1, d)), public), at)
    values, vectors = np.linalg.eigh(found)
    assert (values >= 0.2499 * np.einsum("ik,ij,jk->k", vectors, public, vectors)).all()
    assert np.trace(found) == pytest.approx(2 * np.trace(public), rel=0.5)


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
    noisy = np.load(tmp_path / "run" / "warm" / "means.npz")["values"][:-1].reshape(10, -1)
    z = counted(Coordinates((1, 8, 8), coordinates(config)).of(torch.from_numpy(images.images)))
    clean = np.stack([z[images.labels == row].sum(0) for row in range(10)]) / len(z)
    assert np.abs(noisy / len(z) - clean).max() < 0.05 and np.abs(clean).max() > 0.05
