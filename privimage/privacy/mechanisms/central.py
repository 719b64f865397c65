"""Central images: noisy sums of the images of each class, over random parts of the sensitive set.

After the central images of DP-FETA (arXiv 2504.01395), which divides by the realised number of images; here
sums get noise, and the denominator is public.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.privacy.mechanisms.base import OneUse, Share
from privimage.privacy.noise import gaussian
from privimage.privacy.relation import Relation

# Of a pooled pixel; what is divided among the images of a group is rounded to one.
PARTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CentralImages(OneUse):
    """One noisy sum of small images for each class and part of the set, every image in one part."""

    name: ClassVar[str] = "central images"
    stage: ClassVar[str] = "warm-central"
    count: int  # N
    parts: int  # P
    pooling: int  # side of the squares of pixels that are averaged
    values: int  # of a small image: channels times pixels

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`."""
        data, pooling = config.data, _pooling(config.data.resolution)
        values = data.channels * (data.resolution // pooling) ** 2
        return cls(
            noise_multiplier=0.0,
            relation=Relation.of(config),
            count=count,
            parts=config.warm.parts,
            pooling=pooling,
            values=values,
        )

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose warm start uses it."""
        return Share(None, config.warm.max_rise) if "central" in config.warm_starts else None

    @property
    def contribution(self) -> float:
        """sqrt(values): the largest norm of a small image with values in [-1, 1], and of a mean of them."""
        return self.values**0.5

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        unit = self.relation.unit
        what = "the mean of its small images" if unit == "group" else "a small image"
        return (
            f"each {unit} is in one of `parts` parts, at random and independently of all others, and adds "
            f"{what}, of L2 norm at most sqrt(values), to the sums of its part and its labels"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"parts": self.parts, "values": self.values}

    @property
    def one(self) -> int:
        """The whole number that stands for 1: the sum of a square of pixels is in [-1, 1] of it."""
        return 255 * self.pooling**2 * PARTS


def _pooling(resolution: int) -> int:
    """Halved up to 32 pixels, a quarter at 64, an eighth from 128 on, as far as it can be divided."""
    wanted = 2 if resolution < 64 else 4 if resolution < 128 else 8
    while resolution % wanted:
        wanted //= 2
    return wanted


def random_parts(source_bits: np.ndarray, parts: int) -> np.ndarray:
    """The part of each unit, int64 (N,) in [0, parts), from 64 random bits each, uint64 (N,).

    The remainder of 64 bits: each part is as likely as any other to within parts / 2^64.
    """
    return (source_bits % np.uint64(parts)).astype(np.int64)


def central_sum(
    images: Tensor, places: Tensor, groups: Tensor, rows: int, mechanism: CentralImages
) -> Tensor:
    """Pooled images summed by row, each divided by the number of images of its group, in parts of 1 /
    `mechanism.one`: int64 (rows, values).

    images uint8 (B, C, H, W), places int64 (B,) in [0, rows), groups int64 (B,), all different for images on
    their own, and with all their images. In integers, so that the sum is exact, in any order, and rounded
    towards zero: adding or removing all images of a group moves it by an L2 norm of at most `one`
    sqrt(values).
    """
    side = mechanism.pooling
    centred = 2 * images.to(torch.int64) - 255  # in [-255, 255]
    pooled = centred.unfold(2, side, side).unfold(3, side, side).sum((-2, -1))
    total = torch.zeros(rows, mechanism.values, dtype=torch.int64, device=images.device)
    _, own, count = groups.unique(return_inverse=True, return_counts=True)
    sizes = count[own]
    return total.index_add_(0, places, (pooled.flatten(1) * PARTS).div(sizes[:, None], rounding_mode="trunc"))


def noisy_central_means(total: np.ndarray, mechanism: CentralImages, source: str, key: bytes) -> np.ndarray:
    """`central_sum` over the whole set with Gaussian noise of standard deviation sigma sqrt(values) on every
    number, divided by the public N / (parts labels).

    total int64 (rows, values), rows being parts times labels -> float64 (rows, values). The mean of a rare
    class is paler, that of a frequent one more than its images. The caller charges the ledger before it uses
    what is returned.
    """
    # Every row gets noise, empty ones too: which are empty is private.
    noise = gaussian(source, key, total.size, mechanism.standard_deviation)
    return (total / mechanism.one + noise.reshape(total.shape)) * (len(total) / mechanism.count)
