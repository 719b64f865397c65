"""The noisy mean embedding: how matching sees the sensitive set (Harder et al. 2021, DP-MERF)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.privacy.mechanisms.base import OneUse, Share
from privimage.privacy.noise import gaussian
from privimage.privacy.relation import Relation

# Features are summed as whole multiples of it: integer sums are exact, in any order and on any number of
# ranks.
QUANTUM = 2.0**-30


@dataclass(frozen=True, kw_only=True)
class MeanEmbedding(OneUse):
    """One noisy sum of feature vectors, each in the row of its image's label."""

    name: ClassVar[str] = "noisy mean embedding"
    stage: ClassVar[str] = "match"
    count: int  # N
    features: int  # F

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`."""
        relation, features = Relation.of(config), cls.length(config)
        return cls(noise_multiplier=0.0, relation=relation, count=count, features=features)

    @classmethod
    def length(cls, config: Config) -> int:
        """F, the numbers of a feature vector."""
        return config.match.features

    @property
    def contribution(self) -> float:
        """1: the largest norm of a feature vector, and of the mean of those of a group."""
        return 1.0

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        if self.relation.unit == "group":
            return "each group adds the mean of its images' feature vectors, of L2 norm at most 1, to the sum"
        return "each image adds one feature vector of L2 norm at most 1 to the sum"

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


def shortened(vectors: Tensor) -> Tensor:
    """Vectors float64 (B, d) of an L2 norm of at most 1: longer ones are shortened, one that is not finite
    is 0.
    """
    vectors = torch.where(vectors.isfinite().all(1, keepdim=True), vectors, 0.0)
    # The largest number first, so that squares do not overflow; at last a trifle below 1, since the norm
    # itself is rounded.
    vectors = vectors / vectors.abs().amax(1, keepdim=True).clamp(min=1.0)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1.0) * (1 - 1e-9)


def embedding_sum(features: Tensor, labels: Tensor, sizes: Tensor, rows: int) -> Tensor:
    """The features of each class summed over its images, each divided by the number of images of its group,
    in units of `QUANTUM`: int64 (rows, F).

    features float64 (B, F), labels int64 (B,) in [0, rows), sizes int64 (B,) of the groups, 1 for an image on
    its own. Adding or removing all images of a group moves the sum by an L2 norm of at most 1 / QUANTUM,
    exactly: longer vectors are shortened, both roundings are towards zero, so that each of n images adds a
    vector of at most 1 / (n QUANTUM), and an image with a feature that is not finite adds nothing.
    """
    features = shortened(features)
    total = torch.zeros(rows, features.shape[1], dtype=torch.int64, device=features.device)
    whole = (features / QUANTUM).trunc().to(torch.int64)
    return total.index_add_(0, labels, whole.div(sizes[:, None], rounding_mode="trunc"))


def noisy_mean_embedding(total: np.ndarray, mechanism: MeanEmbedding, source: str, key: bytes) -> np.ndarray:
    """`embedding_sum` over the whole sensitive set with Gaussian noise of standard deviation sigma on every
    number, divided by the public N.

    total int64 (rows, F) -> float64 (rows, F): row c estimates (1 / N) sum of phi(x) over the images x of
    class c. The caller charges the ledger before it uses what is returned.
    """
    noise = gaussian(source, key, total.size, mechanism.standard_deviation)
    return (total * QUANTUM + noise.reshape(total.shape)) / mechanism.count
