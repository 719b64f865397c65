"""Noisy histograms of votes: how the semantic query and Private Evolution see the sensitive set."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from privimage.config import Config
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms.base import Mechanism, Share
from privimage.privacy.noise import gaussian


@dataclass(frozen=True, kw_only=True)
class Histogram(Mechanism):
    """Votes of images for columns, in the row of the image's class, with noise on every bin."""

    per_image: int  # votes that one image has

    @property
    def sensitivity(self) -> float:
        """sqrt(k1): one image adds 1 to at most k1 bins."""
        return math.sqrt(self.per_image)

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        return (
            "each image adds at most 1 to each of at most votes_per_image bins, an L2 norm of at most "
            "sqrt(votes_per_image)"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"votes_per_image": self.per_image}


@dataclass(frozen=True, kw_only=True)
class SemanticHistogram(Histogram):
    """The semantic distribution query: one histogram of votes for public classes (PrivImage, Section 3.2)."""

    name: ClassVar[str] = "semantic distribution query"
    stage: ClassVar[str] = "select"

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`; it is the same for any `count`."""
        return cls(noise_multiplier=0.0, per_image=config.select.per_image)

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of methods that select public images by a query."""
        settings = config.select
        return (
            Share(settings.noise_multiplier, settings.max_rise)
            if config.spec.pretraining == "selected"
            else None
        )

    @property
    def composition(self) -> SampledGaussian:
        """See `Mechanism.composition`."""
        return SampledGaussian(self.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class NearestHistogram(Histogram):
    """Private Evolution: in each iteration every image votes for the nearest synthetic image of its class."""

    name: ClassVar[str] = "nearest-neighbour histogram"
    stage: ClassVar[str] = "evolve"
    iterations: int

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`; it is the same for any `count`."""
        return cls(noise_multiplier=0.0, per_image=1, iterations=config.evolve.iterations)

    @property
    def composition(self) -> SampledGaussian:
        """See `Mechanism.composition`."""
        return SampledGaussian(self.noise_multiplier, count=self.iterations)


def vote_counts(votes: np.ndarray, labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How often the images of each sensitive class (row) voted for each column: float64 (rows, columns).

    votes int64 (N, k1): the columns that each image votes for; one that an image names twice counts once, so
    that one image adds at most 1 to each of at most k1 bins of one row, an L2 norm of at most sqrt(k1).
    labels int64 (N,) in [0, rows).
    """
    counts = np.zeros((rows, columns))
    # Sorted, so that equal votes of an image are neighbours and only the first of them counts.
    ordered = np.sort(votes, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    np.add.at(counts, (np.broadcast_to(labels[:, None], ordered.shape)[first], ordered[first]), 1.0)
    return counts


def noisy_histogram(
    votes: np.ndarray,
    labels: np.ndarray,
    rows: int,
    columns: int,
    mechanism: Histogram,
    source: str,
    key: bytes,
) -> np.ndarray:
    """`vote_counts` with Gaussian noise of standard deviation sigma sqrt(k1) on every bin (Theorem 3.1 of the
    paper of PrivImage).

    votes int64 (N, k1), labels int64 (N,) -> float64 (rows, columns). Raises ValueError if an image has more
    than `mechanism.per_image` votes. The caller charges the ledger
    before it uses what is returned.
    """
    if votes.shape[1] > mechanism.per_image:
        raise ValueError(f"{votes.shape[1]} votes per image, planned for {mechanism.per_image}")
    # Every bin gets noise, empty ones too: which bins are empty is private.
    noise = gaussian(source, key, rows * columns, mechanism.standard_deviation)
    return vote_counts(votes, labels, rows, columns) + noise.reshape(rows, columns)
