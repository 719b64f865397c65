"""Noisy gradients of a linear classifier: what the labels of the synthetic images are learned from."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from privimage.config import Config
from privimage.models.local_frequencies import LocalFrequencies
from privimage.privacy.mechanisms.base import OneUse, Share
from privimage.privacy.mechanisms.embedding import shortened
from privimage.privacy.relation import Relation

# Features and residuals are whole multiples of these: integer sums are exact, in any order and on any number
# of ranks. Sums of a million products of the two fit into 64 bits, those of a block into a float64.
FEATURE, RESIDUAL = 2.0**-14, 2.0**-24


@dataclass(frozen=True, kw_only=True)
class NoisyGradients(OneUse):
    """Gradient descent with the noisy gradient of all images in each of T steps.

    T Gaussian mechanisms, each with T times the variance of `noise_multiplier`, chosen one after the other:
    together they are exactly one Gaussian mechanism of `noise_multiplier` (Dong, Roth and Su 2022, Gaussian
    differential privacy, Corollary 3.3), and as one they are accounted for and charged.
    """

    name: ClassVar[str] = "noisy gradients of a classifier"
    stage: ClassVar[str] = "classify"
    count: int  # N
    features: int  # of an image
    steps: int  # T

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`."""
        data = config.data
        return cls(
            noise_multiplier=0.0,
            relation=Relation.of(config),
            count=count,
            features=LocalFrequencies.count((data.channels, data.resolution, data.resolution)),
            steps=config.classify.steps,
        )

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose synthetic images a private classifier labels."""
        return Share(None, config.classify.max_rise) if "classify" in config.stages else None

    @property
    def contribution(self) -> float:
        """1: the largest norm of the gradient of an image, and of the mean of those of a group."""
        return 1.0

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        of = "the mean of its images' gradients" if self.relation.unit == "group" else "a gradient"
        return (
            f"in each of `steps` steps each {self.relation.unit} adds {of}, of L2 norm at most 1, to the "
            "sum, which gets noise of noise_multiplier times sqrt(steps); all steps together are one "
            "Gaussian mechanism of noise_multiplier"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"features": self.features, "steps": self.steps}

    @property
    def step_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum of one step; 0 without noise."""
        return self.standard_deviation * math.sqrt(self.steps)


def whole_features(features: Tensor) -> Tensor:
    """Features (B, d), brought to an L2 norm of 1, in units of `FEATURE`: int16 of a norm of at most 1.

    Zero for an image with a feature that is not finite, and for one whose features are all zero.
    """
    features = features.double()
    # With a largest number of 1 every vector is long enough to be shortened.
    features = shortened(features / features.abs().amax(1, keepdim=True).clamp(min=1e-30))
    return (features / FEATURE).trunc().to(torch.int16)


def gradient_sum(features: Tensor, residuals: Tensor, sizes: Tensor) -> Tensor:
    """Outer products of `residuals` float64 (B, K) and `whole_features` int16 (B, d), each divided by the
    number of images of its group, summed over images: int64 (K, d), in units of `FEATURE` `RESIDUAL`.

    sizes int64 (B,) of the groups, 1 for an image on its own. Adding or removing all images of a group moves
    the sum by an L2 norm of at most 1 / (`FEATURE` `RESIDUAL`), exactly: residuals of a norm above 1 are
    shortened, those that are not finite are zero, and roundings are towards zero.
    """
    whole = (shortened(residuals) / sizes[:, None] / RESIDUAL).trunc()
    # Products and sums of whole numbers below 2^53: exact in float64, which has a fast matrix product.
    return (whole.T @ features.double()).to(torch.int64)
