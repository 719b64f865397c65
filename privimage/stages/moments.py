"""Gaussian images of each class, from noisy means and a noisy covariance of the sensitive set.

At high noise levels a denoiser needs no more than the first two moments of a class, and these can be had for
little of the budget. What the noise hides is taken from the public images that the selection gave to a class.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data import store
from privimage.data.sensitive import ImageDraws
from privimage.distributed.world import World
from privimage.families.base import image_shape
from privimage.models.edm import to_uint8, to_unit
from privimage.privacy.identity import digest_of_tensors
from privimage.privacy.mechanisms.embedding import Embedding, embedding_of
from privimage.privacy.mechanisms.moments import (
    COUNTED,
    REACH,
    ClassMeans,
    Covariance,
    coordinates,
    counted,
    matrix,
    products,
)
from privimage.privacy.mechanisms.vectors import length
from privimage.stages.embedding import noisy_sum
from privimage.stages.noisy_statistic import Drawn, Sensitive
from privimage.stages.public_set import pretraining_set
from privimage.storage.rundir import RunDir

SEEN = 20_000  # public images that moments are computed from, at most
RAREST = 0.1  # of an equal share: a class is taken to have at least as many images
# Of the spread of public images along any direction: without it a classifier would learn from directions
# along which noise has left nothing.
LEAST_SPREAD = 0.25


class Coordinates:
    """The lowest frequencies of an image, by an orthonormal cosine transform of its colours.

    Public: it depends on the shape of the images alone. Lightness has the first places, twice as dense as the
    two differences of colour.
    """

    def __init__(self, shape: tuple[int, int, int], count: int) -> None:
        """`count` coordinates of images of `shape` (C, H, W)."""
        channels, side, _ = shape
        colours = _COLOURS if channels == 3 else np.eye(channels)
        waves = _cosines(side)
        # Frequency i + j decides what is kept; colour counts as a higher one.
        order = sorted(
            ((i + j if c == 0 else 2 * (i + j) + 2), c, i, j)
            for c in range(channels)
            for i in range(side)
            for j in range(side)
        )[:count]
        vectors = [(colours[c][:, None, None] * np.outer(waves[i], waves[j])).ravel() for _, c, i, j in order]
        self.basis = torch.from_numpy(np.stack(vectors, 1))  # (C H W, count), float64
        # Coordinates of about the same frequency, whose noise is judged together.
        self.bands = np.array([8 * min(c, 1) + int(math.log2(1 + level)) for level, c, _, _ in order])
        self.length = math.sqrt(math.prod(shape))  # the largest norm of an image in [-1, 1]

    def of(self, images: Tensor) -> Tensor:
        """Images uint8 (B, C, H, W) -> coordinates float64 (B, count), of L2 norm at most 1."""
        return to_unit(images).flatten(1).double() @ self.basis.to(images.device) / self.length


_COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def _cosines(side: int) -> np.ndarray:
    """The orthonormal vectors (side, side) of the discrete cosine transform, DCT-II, one a row."""
    frequency, place = np.mgrid[:side, :side]
    waves = np.cos(np.pi * (place + 0.5) * frequency / side) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves


@dataclass(frozen=True)
class Moments:
    """Means (rows, d) and the covariance (d, d) about them, in units of `Coordinates`; float64."""

    means: np.ndarray
    covariance: np.ndarray


class GaussianImages:
    """Images of normal distributions, one for each class."""

    def __init__(self, config: Config, world: World, found: Moments) -> None:
        self.config, self.shape = config, image_shape(config)
        at = Coordinates(self.shape, found.means.shape[1])
        values, vectors = np.linalg.eigh(found.covariance)
        # Those that noise has made negative, where no public images have helped.
        root = torch.from_numpy(vectors * np.sqrt(values.clip(min=0)))
        to_pixels = at.basis * at.length
        self.means = (to_pixels @ torch.from_numpy(found.means).T).T.float().to(world.device)
        self.root = (to_pixels @ root).T.float().to(world.device)
        self.draws = ImageDraws(world.device)

    def __call__(self, step: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W) and labels (B,) of `places` int64 (B,) in the batch of a step."""
        labels = (places + step) % len(self.means)
        normal = self.draws.normal(public_seed(self.config, "warm moments", step), places, len(self.root))
        images = self.means[labels] + normal @ self.root
        return to_uint8(images.view(-1, *self.shape)), labels


def moments(
    config: Config, run_dir: RunDir, world: World, sensitive: Sensitive, folder: Path
) -> tuple[Moments, dict[str, Drawn]]:
    """Estimates for the sensitive set, and what they cost, by stage: each statistic is drawn once, kept in
    `folder`.
    """
    at, plan = Coordinates(image_shape(config), coordinates(config)), sensitive.account.plan
    public = _public(config, run_dir, world, sensitive.rows, at)
    drawn = partial(noisy_sum, config, run_dir, world, sensitive)
    first, second = plan.the(ClassMeans), plan.the(Covariance)
    means = drawn(first, folder / "means.npz", sensitive.rows, lambda images, _: counted(at.of(images)))
    estimate = _means(embedding_of(means.values, first), public, at)
    # Distances from the estimate, which is public by now.
    centre = torch.from_numpy(estimate).to(world.device)

    def spread(images: Tensor, labels: Tensor) -> Tensor:
        distance = (at.of(images) - centre[labels]) / REACH
        # Shortened to the radius, so that no product is longer than 1.
        return products(distance / distance.norm(dim=1, keepdim=True).clamp(min=1.0))

    covariance = drawn(second, folder / "covariance.npz", 1, spread, [digest_of_tensors([estimate])])
    found = Moments(estimate, _covariance(embedding_of(covariance.values, second), public, at))
    return found, {first.stage: means, second.stage: covariance}


def _means(noisy: Embedding, public: Moments | None, at: Coordinates) -> np.ndarray:
    """Means of the classes (rows, d) from the noisy embedding (rows, d + 1) of coordinates with `COUNTED`
    after them: public ones, moved as far as noise allows.
    """
    rows, longer = len(noisy.mean), length(COUNTED)
    sums, shares = longer * noisy.mean[:, :-1], longer / COUNTED * noisy.mean[:, -1:]
    # Where N is known, all images are of the only class.
    sure = rows == 1 and noisy.known
    shares = np.ones_like(shares) if sure else shares.clip(min=RAREST / rows)
    variance = (longer * noisy.deviation / shares) ** 2
    # Without public images, classes are alike as far as noise hides their differences.
    prior = public.means if public else np.broadcast_to(sums.sum(0) / shares.sum(), sums.shape)
    return _believed(prior, sums / shares, variance, at.bands[None])


def _covariance(noisy: Embedding, public: Moments | None, at: Coordinates) -> np.ndarray:
    """The covariance (d, d) from the noisy embedding (1, d (d + 1) / 2) of `products`, as `_means`."""
    d = len(at.bands)
    spread = matrix(torch.from_numpy(noisy.mean[0]), d).numpy() * REACH**2
    # Off the diagonal, where nearly all entries are.
    variance = np.array((noisy.deviation * REACH**2) ** 2 / 2)
    prior = public.covariance if public else np.zeros((d, d))
    values, vectors = np.linalg.eigh(
        _believed(prior, spread, variance, 32 * at.bands[:, None] + at.bands[None])
    )
    # Noise has made some small or negative.
    least = LEAST_SPREAD * (vectors * (prior @ vectors)).sum(0)
    return (vectors * np.maximum(values, least)) @ vectors.T


def _believed(prior: np.ndarray, noisy: np.ndarray, variance: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """`prior` moved towards `noisy`, by empirical Bayes within each of `bands` (Morris 1983).

    The mean square of the differences of a band is that of the true ones plus the `variance` of the noise,
    which is broadcast.
    """
    difference = noisy - prior
    bands, variance = (np.broadcast_to(one, difference.shape) for one in (bands, variance))
    share = np.zeros_like(difference)
    for band in np.unique(bands):
        here = bands == band
        signal = max(0.0, (difference[here] ** 2 - variance[here]).mean())
        if signal:
            share[here] = signal / (signal + variance[here])
    return prior + share * difference


def _public(config: Config, run_dir: RunDir, world: World, rows: int, at: Coordinates) -> Moments | None:
    """The same of the public images that pretraining has seen; None for methods without."""
    if config.spec.pretraining == "none":
        return None
    indices, labels, _ = pretraining_set(config, run_dir, world)
    # Computed once, since what is drawn later depends on every digit.
    found = _moments_of(config, run_dir, rows, at, indices, labels) if world.is_main else None
    return world.broadcast_object(found)


def _moments_of(
    config: Config, run_dir: RunDir, rows: int, at: Coordinates, indices: np.ndarray, labels: np.ndarray
) -> Moments:
    """Moments of the public images at `indices`, by their `labels`."""
    seen = np.random.default_rng(public_seed(config, "public moments")).permutation(len(indices))[:SEEN]
    seen.sort()
    images = torch.from_numpy(store.read(run_dir.public_store, indices[seen]))
    found = np.concatenate([at.of(part).numpy() for part in images.split(1000)])
    # Public labels of their own say nothing of the sensitive ones.
    own = labels[seen] if config.spec.pretraining != "all" and rows > 1 else np.zeros(len(seen), np.int64)
    middle = found.mean(0)
    means = np.stack([found[own == row].mean(0) if (own == row).any() else middle for row in range(rows)])
    about = found - means[own]
    return Moments(means, about.T @ about / len(about))
