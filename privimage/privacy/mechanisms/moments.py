"""Means of the classes and the covariance about them, noisy, in a few coordinates of an image.

First and second moments as in DP-MEPF (arXiv 2205.12900), of the image itself in place of a network's
features.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from privimage.config import Config
from privimage.privacy.mechanisms.base import Share
from privimage.privacy.mechanisms.embedding import MeanEmbedding
from privimage.privacy.mechanisms.vectors import length

# Radius about the mean of its class within which an image counts in full for the covariance, where all images
# are within 1 of the origin. A constant: one that is fitted to the images would leak.
REACH = 0.6
# What each image adds to the number of images of its class, beside coordinates of a norm of at most 1.
COUNTED = 0.5


@dataclass(frozen=True, kw_only=True)
class _Moment(MeanEmbedding):
    """Half of what the start `moments` may cost."""

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose warm start uses it."""
        return Share(None, config.warm.max_rise / 2) if "moments" in config.warm_starts else None


@dataclass(frozen=True, kw_only=True)
class ClassMeans(_Moment):
    """One noisy sum of the coordinates of images, and of their number, each in the row of its label."""

    name: ClassVar[str] = "noisy means of the classes"
    stage: ClassVar[str] = "warm-means"

    @classmethod
    def vectors(cls, config: Config) -> dict[str, Any]:
        """See `MeanEmbedding.vectors`; those of `counted`."""
        return {"features": coordinates(config) + 1}


@dataclass(frozen=True, kw_only=True)
class Covariance(_Moment):
    """One noisy sum of outer products, of each image's distance from the noisy mean of its class."""

    name: ClassVar[str] = "noisy covariance about these means"
    stage: ClassVar[str] = "warm-covariance"

    @classmethod
    def vectors(cls, config: Config) -> dict[str, Any]:
        """See `MeanEmbedding.vectors`; those of `products`."""
        d = coordinates(config)
        return {"features": d * (d + 1) // 2}


def coordinates(config: Config) -> int:
    """d, the number of coordinates of an image."""
    data = config.data
    return min(config.warm.coordinates, data.channels * data.resolution**2)


def counted(z: Tensor) -> Tensor:
    """Vectors (B, d) of an L2 norm of at most 1 with `COUNTED` after them, again of at most 1: (B, d + 1)."""
    return F.pad(z, (0, 1), value=COUNTED) / length(COUNTED)


def products(z: Tensor) -> Tensor:
    """Outer products of vectors (B, d) as vectors of the same L2 norm: (B, d (d + 1) / 2).

    Only the lower triangle; what stands for two equal entries is sqrt(2) of one.
    """
    row, column = torch.tril_indices(z.shape[1], z.shape[1], device=z.device)
    weight = torch.where(row == column, 1.0, 2**0.5).to(z.dtype)
    return z[:, row] * z[:, column] * weight


def matrix(vector: Tensor, d: int) -> Tensor:
    """The symmetric matrix (d, d) of a vector of `products`."""
    row, column = torch.tril_indices(d, d, device=vector.device)
    lower = torch.zeros(d, d, dtype=vector.dtype, device=vector.device)
    lower[row, column] = torch.where(row == column, vector, vector / 2**0.5)
    return lower + lower.T - lower.diagonal().diag()
