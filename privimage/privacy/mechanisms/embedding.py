"""The noisy mean embedding: how matching sees the sensitive set (Harder et al. 2021, DP-MERF)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.models.network_moments import moments_length
from privimage.privacy.mechanisms.base import OneUse, Share
from privimage.privacy.mechanisms.vectors import QUANTUM, VectorsOfUnits, length, whole_vectors
from privimage.privacy.noise import gaussian
from privimage.privacy.relation import Relation

# What an image of a group adds, beside a vector of a norm of at most 1, to a number from which follows how
# much was left of all vectors when those of each group were shortened. Its noise is 5 times that of a vector
# of norm 1, and it makes all others 2 % larger.
WEIGHT = 0.2


@dataclass(frozen=True, kw_only=True)
class MeanEmbedding(OneUse):
    """One noisy sum of feature vectors, each in the row of its image's label."""

    name: ClassVar[str] = "noisy mean embedding"
    stage: ClassVar[str] = "match"
    count: int  # N
    features: int  # F
    network: bool = False  # whether the features are those of a network, in place of random ones

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`."""
        relation = Relation.of(config)
        return cls(noise_multiplier=0.0, relation=relation, count=count, **cls.vectors(config))

    @classmethod
    def vectors(cls, config: Config) -> dict[str, Any]:
        """The fields that say what a feature vector is."""
        return {"features": embedding_length(config), "network": config.match.embedding == "network"}

    @property
    def contribution(self) -> float:
        """1: the largest norm of a feature vector, and of the sum of those of a group, shortened."""
        return 1.0

    @property
    def weight(self) -> float:
        """What an image adds to the noisy number of images; none where that is the public N."""
        return WEIGHT if self.relation.unit == "group" else 0.0

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        of_network = (
            "; vectors are moments of the features of a network that was trained on public images"
            if self.network
            else ""
        )
        if self.relation.unit == "group":
            adds = (
                "each group adds its images' feature vectors, and their number, together shortened to an L2 "
                "norm of at most 1, to the sum"
            )
        else:
            adds = "each image adds one feature vector of L2 norm at most 1 to the sum"
        return adds + of_network

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"features": self.features}


@dataclass(frozen=True, kw_only=True)
class WarmEmbedding(MeanEmbedding):
    """The same before DP-SGD, which goes on from what it tells (FETA-Pro, arXiv 2601.06368)."""

    name: ClassVar[str] = "noisy mean embedding for the warm start"
    stage: ClassVar[str] = "warm-embedding"

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose warm start uses it."""
        return Share(None, config.warm.max_rise) if "embedding" in config.warm_starts else None


def embedding_length(config: Config) -> int:
    """F, the numbers of a feature vector of the embedding."""
    if config.match.embedding == "network":
        return moments_length(config.query.network, config.data.channels, config.data.resolution)
    return config.match.features


def embedding_sum(features: Tensor, labels: Tensor, groups: Tensor, rows: int, weight: float = 0.0) -> Tensor:
    """The features of each class summed over its images, and `weight` for each image, those of one group
    shortened together, in units of `QUANTUM`: int64 (rows * F + 1,), the weight last.

    features float64 (B, F), labels int64 (B,) in [0, rows), groups int64 (B,), all different for images on
    their own, and with all their images. Adding or removing all images of a group moves the sum by an L2 norm
    of at most 1 / QUANTUM, exactly; the features of an image of which one is not finite add nothing.
    """
    total = torch.zeros(rows * features.shape[1] + 1, dtype=torch.int64, device=features.device)
    units = VectorsOfUnits(groups, labels, features.shape[1], weight)
    units.add(slice(None), whole_vectors(features, weight))
    units.add_to(total)
    return total


def noisy_embedding(total: np.ndarray, mechanism: MeanEmbedding, source: str, key: bytes) -> np.ndarray:
    """`embedding_sum` over the whole sensitive set with Gaussian noise of standard deviation sigma on every
    number: int64 (rows * F + 1,) -> float64.

    The caller charges the ledger before it uses what is returned.
    """
    noise = gaussian(source, key, total.size, mechanism.standard_deviation)
    return total * QUANTUM + noise


@dataclass(frozen=True)
class Embedding:
    """What a noisy sum says of the mean."""

    mean: np.ndarray  # float64 (rows, F): row c estimates the sum of phi(x) over class c, over all images
    deviation: float  # standard deviation of the noise on each number of the mean
    known: bool = True  # whether it is over the public N, and not over a noisy number


def embedding_of(noisy: np.ndarray, mechanism: MeanEmbedding) -> Embedding:
    """The mean embedding by `noisy_embedding` (rows * F + 1,): over the public N, or for groups over the
    noisy weight of all images.

    Of a group an image counts by what is left of it where the vectors of the group are shortened: the mean is
    a weighted one, in which images count for less the more alike they are within their group.
    """
    count, weight = float(mechanism.count), mechanism.weight
    if weight:
        # A group has at least the weight of one image.
        count = max(count, float(noisy[-1]) * length(weight) / weight)
    scale = length(weight) / count
    mean = noisy[:-1].reshape(-1, mechanism.features) * scale
    return Embedding(mean, mechanism.standard_deviation * scale, not weight)
