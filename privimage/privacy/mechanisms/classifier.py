"""Noisy gradients of a linear classifier: what the labels of the synthetic images are learned from."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.models.label_features import LabelFeatures
from privimage.privacy.mechanisms.base import OneUse, Share
from privimage.privacy.mechanisms.vectors import LESS, length, shortened
from privimage.privacy.noise import gaussian
from privimage.privacy.relation import Relation

# Features and residuals are whole multiples of these: integer sums are exact, in any order and on any number
# of ranks. Sums of a million products of the two fit into 64 bits, those of a block into a float64.
ONE_FEATURE, ONE_RESIDUAL = 1 << 14, 1 << 24
FEATURE, RESIDUAL = 1 / ONE_FEATURE, 1 / ONE_RESIDUAL
# What an image of a group adds to the number of images, beside its gradient; see `images_behind`.
WEIGHT = 0.05
# Images of a group up to which their gradients are shortened together. Of larger ones the mean is taken: the
# products of all pairs of images would not have room.
LARGEST_GROUP = 128
# Bits by which products of features and of residuals are rounded down, so that sums of products of both have
# less than 63 bits.
OF_FEATURES, OF_RESIDUALS = 10, 20


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
    network: bool = False  # whether some of the features are those of a network

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`."""
        data = config.data
        return cls(
            noise_multiplier=0.0,
            relation=Relation.of(config),
            count=count,
            features=LabelFeatures.count(
                (data.channels, data.resolution, data.resolution), config.label_network
            ),
            network=config.label_network is not None,
            steps=config.classify.steps,
        )

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose synthetic images a private classifier labels."""
        return Share(None, config.classify.max_rise) if "classify" in config.stages else None

    @property
    def draws(self) -> int:
        """See `Mechanism.draws`: in each of the steps, which are one use together."""
        return self.steps

    @property
    def contribution(self) -> float:
        """1: the largest norm of the gradient of an image, and of the sum of those of a group, shortened."""
        return 1.0

    @property
    def weight(self) -> float:
        """What an image adds to the noisy number of images; none where that is the public N."""
        return WEIGHT if self.relation.unit == "group" else 0.0

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        of = (
            "its images' gradients, and their number, together shortened to an L2 norm of at most 1,"
            if self.relation.unit == "group"
            else "a gradient of L2 norm at most 1"
        )
        return (
            f"in each of `steps` steps each {self.relation.unit} adds {of} to the sum, which gets noise of "
            "noise_multiplier times sqrt(steps); all steps together are one Gaussian mechanism of "
            "noise_multiplier"
            + ("; features are fixed, or of a network trained on public images" if self.network else "")
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


class Alike:
    """Products of the features of images of one group, for the norm of the sum of their gradients.

    With residuals r and features x the gradient of an image is r x^T, and the squared norm of a sum of
    gradients is the sum of (r . r') (x . x') over all pairs of images: the gradients themselves, of thousands
    of numbers, are never made (Goodfellow 2015, arXiv 1510.01799).
    """

    def __init__(self, features: Tensor, groups: Tensor) -> None:
        """`whole_features` int16 (B, d) and groups int64 (B,), with all their images."""
        _, self.group, self.count = groups.unique(return_inverse=True, return_counts=True)
        sizes = self.count[self.group]
        self.several = ((sizes > 1) & (sizes <= LARGEST_GROUP)).nonzero().flatten()
        of, own = features[self.several].double(), self.group[self.several]
        products = (of @ of.T).to(torch.int64) >> OF_FEATURES
        self.products = torch.where(own[:, None] == own, products, 0).to(torch.int32)

    def factors(self, residuals: Tensor, weight: float) -> Tensor:
        """Factors float64 (B,) in [1 / n, 1], equal for the n images of a group, by which the sum of their
        gradients has an L2 norm of at most 1.

        residuals float64 (B, K) of a norm of at most 1; each image also adds `weight` to one more number.
        """
        sizes, several = self.count.double(), self.several
        # Whole numbers all the way: the factors of a group are a function of its images alone.
        whole = (residuals[several] / RESIDUAL).trunc()
        products = ((whole @ whole.T).to(torch.int64) >> OF_RESIDUALS) * self.products
        own = torch.zeros_like(self.count).index_add_(0, self.group[several], products.sum(1))
        # And as much more as rounding down may have taken off each of the n^2 products.
        of_both = (ONE_FEATURE**2 >> OF_FEATURES) + (ONE_RESIDUAL**2 >> OF_RESIDUALS) + 1
        unit = 2.0 ** (OF_FEATURES + OF_RESIDUALS) * (FEATURE * RESIDUAL) ** 2
        squares = (own + self.count.square() * of_both).double() * unit
        norms = (squares + (weight * sizes).square()).sqrt() / length(weight)
        # Each of the K n residuals will be rounded by less than one.
        room = LESS - sizes * residuals.shape[1] ** 0.5 * RESIDUAL
        found = torch.where(self.count > LARGEST_GROUP, 0.0, room / norms)
        return torch.where(self.count == 1, 1.0, found.clamp(max=1.0).maximum(1 / sizes))[self.group]


def gradient_sum(features: Tensor, residuals: Tensor, alike: Alike, weight: float = 0.0) -> Tensor:
    """Outer products of `residuals` float64 (B, K) and `whole_features` int16 (B, d), summed over images,
    those of one group shortened together, and the sum of `weight` for each image: int64 (K d + 1,), in units
    of `FEATURE` `RESIDUAL`.

    Adding or removing all images of a group moves the sum by an L2 norm of at most 1 / (`FEATURE`
    `RESIDUAL`), exactly: residuals of a norm above 1 are shortened, those that are not finite are zero, and
    roundings are towards zero or allowed for.
    """
    residuals = shortened(residuals)
    factors = alike.factors(residuals, weight)[:, None] / length(weight)
    whole = (residuals * factors / RESIDUAL).trunc()
    # Products and sums of whole numbers below 2^53: exact in float64, which has a fast matrix product.
    total = (whole.T @ features.double()).to(torch.int64).flatten()
    images = (factors * weight / RESIDUAL).to(torch.int64).sum(0) * ONE_FEATURE
    return torch.cat([total, images])


def noisy_gradient(total: np.ndarray, mechanism: NoisyGradients, source: str, key: bytes) -> np.ndarray:
    """`gradient_sum` over the whole set, int64, with the noise of one step on every number: float64.

    The caller charges the ledger, once for all steps, before it uses what is returned.
    """
    noise = gaussian(source, key, total.size, mechanism.step_deviation)
    return total * (FEATURE * RESIDUAL) + noise.reshape(total.shape)


def images_behind(noisy: np.ndarray, mechanism: NoisyGradients) -> float:
    """The number of images whose gradients are in a `noisy_gradient`, in full: the public N, or for groups by
    the noisy sum of what was left of them.
    """
    # A group has at least the weight of one image.
    if not mechanism.weight:
        return float(mechanism.count)
    return max(mechanism.count, float(noisy[-1]) / mechanism.weight)
