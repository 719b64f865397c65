"""Noisy histograms of votes: how the semantic query and Private Evolution see the sensitive set."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from privimage.config import Config
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms.base import Mechanism, OneUse, Share
from privimage.privacy.noise import gaussian
from privimage.privacy.relation import Relation

# Votes are counted in parts of this size: sums of whole numbers are exact, in any order.
ONE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Histogram(Mechanism):
    """Votes of images for columns, in the row of the image's class, with noise on every bin."""

    replacing: ClassVar[float] = math.sqrt(
        2
    )  # votes are not negative: those of two images are never opposite
    per_image: int  # votes that one image has

    @property
    def contribution(self) -> float:
        """sqrt(k1): one image adds 1 to at most k1 bins, and a group no longer vector."""
        return math.sqrt(self.per_image)

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        if self.relation.unit == "group":
            return "each group adds votes that are scaled to an L2 norm of at most sqrt(votes_per_image)"
        return (
            "each image adds at most 1 to each of at most votes_per_image bins, an L2 norm of at most "
            "sqrt(votes_per_image)"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"votes_per_image": self.per_image}


@dataclass(frozen=True, kw_only=True)
class SemanticHistogram(OneUse, Histogram):
    """The semantic distribution query: one histogram of votes for public classes (PrivImage, Section 3.2)."""

    name: ClassVar[str] = "semantic distribution query"
    stage: ClassVar[str] = "select"

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`; it is the same for any `count`."""
        return cls(noise_multiplier=0.0, relation=Relation.of(config), per_image=config.select.per_image)

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of methods that select public images by a query."""
        settings = config.select
        return (
            Share(settings.noise_multiplier, settings.max_rise)
            if config.spec.pretraining == "selected"
            else None
        )


@dataclass(frozen=True, kw_only=True)
class NearestHistogram(Histogram):
    """Private Evolution: in each iteration every image votes for the nearest synthetic image of its class."""

    name: ClassVar[str] = "nearest-neighbour histogram"
    stage: ClassVar[str] = "evolve"
    iterations: int

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`; it is the same for any `count`."""
        relation, iterations = Relation.of(config), config.evolve.iterations
        return cls(noise_multiplier=0.0, relation=relation, per_image=1, iterations=iterations)

    @property
    def composition(self) -> SampledGaussian:
        """See `Mechanism.composition`."""
        replacement = self.relation.replacement
        return SampledGaussian(self.noise_multiplier, count=self.iterations, replacement=replacement)


def vote_counts(
    votes: np.ndarray, labels: np.ndarray, groups: np.ndarray, shape: tuple[int, int], per_image: int
) -> np.ndarray:
    """How often the images of each sensitive class (row) voted for each column, in parts of 1 / `ONE`: int64
    (rows, columns).

    votes int64 (N, k1): the columns that each image votes for; one that an image names twice counts once.
    labels int64 (N,) in [0, rows), groups int64 (N,), all different for images on their own. The votes of a
    group together are scaled down, where they are more, to an L2 norm of at most sqrt(`per_image`), rounded
    towards zero in exact arithmetic: they are a function of the group alone, and so is their bound.
    """
    rows, columns = shape
    # Sorted, so that equal votes of an image are neighbours and only the first of them counts.
    ordered = np.sort(votes, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group, row = (np.broadcast_to(one[:, None], ordered.shape)[first] for one in (groups, labels))
    # The votes of each group for each bin, and the squared length of all of them.
    bins, counts = np.unique(
        np.stack([group, row * columns + ordered[first]], axis=1), axis=0, return_counts=True
    )
    squares = np.zeros(groups.max(initial=-1) + 1, np.int64)
    np.add.at(squares, bins[:, 0], counts**2)
    squares = squares[bins[:, 0]]
    weights = counts * ONE
    for i in np.flatnonzero(squares > per_image):
        # The root of a whole number, rounded down: sqrt(k1) counts / |counts|, never more.
        weights[i] = math.isqrt(per_image * (ONE * int(counts[i])) ** 2 // int(squares[i]))
    total = np.zeros(rows * columns, np.int64)
    np.add.at(total, bins[:, 1], weights)
    return total.reshape(shape)


def noisy_histogram(
    votes: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    shape: tuple[int, int],
    mechanism: Histogram,
    source: str,
    key: bytes,
) -> np.ndarray:
    """`vote_counts` with Gaussian noise of standard deviation sigma sqrt(k1) on every bin (Theorem 3.1 of the
    paper of PrivImage), times sqrt(2) where neighbours have a unit replaced.

    votes int64 (N, k1), labels and groups int64 (N,) -> float64 of `shape`. Raises ValueError if an image has
    more than `mechanism.per_image` votes. The caller charges the ledger before it uses what is returned.
    """
    if votes.shape[1] > mechanism.per_image:
        raise ValueError(f"{votes.shape[1]} votes per image, planned for {mechanism.per_image}")
    return noisy_counts(
        vote_counts(votes, labels, groups, shape, mechanism.per_image), mechanism, source, key
    )


def noisy_counts(total: np.ndarray, mechanism: Histogram, source: str, key: bytes) -> np.ndarray:
    """`vote_counts` int64, of any shape, with noise: float64."""
    # Every bin gets noise, empty ones too: which bins are empty is private.
    noise = gaussian(source, key, total.size, mechanism.standard_deviation)
    return total / ONE + noise.reshape(total.shape)
