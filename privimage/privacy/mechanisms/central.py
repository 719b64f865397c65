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
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms.base import Mechanism, Share
from privimage.privacy.noise import gaussian


@dataclass(frozen=True, kw_only=True)
class CentralImages(Mechanism):
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
        return cls(noise_multiplier=0.0, count=count, parts=config.warm.parts, pooling=pooling, values=values)

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """Of runs whose warm start uses it."""
        return Share(None, config.warm.max_rise) if "central" in config.warm_starts else None

    @property
    def composition(self) -> SampledGaussian:
        """See `Mechanism.composition`."""
        return SampledGaussian(self.noise_multiplier)

    @property
    def sensitivity(self) -> float:
        """sqrt(values): the largest norm of a small image with values in [-1, 1]."""
        return self.values**0.5

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        return (
            "each image is in one of `parts` parts, at random and independently of all others, and adds a "
            "small image of L2 norm at most sqrt(values) to the sum of its part and label"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"parts": self.parts, "values": self.values}

    @property
    def unit(self) -> int:
        """How many units of an integer small image are 1: pooled pixels have range [-255, 255] each."""
        return 255 * self.pooling**2


def _pooling(resolution: int) -> int:
    """Halved up to 32 pixels, a quarter at 64, an eighth from 128 on, as far as it can be divided."""
    wanted = 2 if resolution < 64 else 4 if resolution < 128 else 8
    while resolution % wanted:
        wanted //= 2
    return wanted


def random_parts(source_bits: np.ndarray, parts: int) -> np.ndarray:
    """The part of each image, int64 (N,) in [0, parts), from 64 random bits each, uint64 (N,).

    The remainder of 64 bits: each part is as likely as any other to within parts / 2^64.
    """
    return (source_bits % np.uint64(parts)).astype(np.int64)


def central_sum(images: Tensor, groups: Tensor, rows: int, mechanism: CentralImages) -> Tensor:
    """Pooled images summed by group, in units of 1 / `mechanism.unit`: int64 (rows, values).

    images uint8 (B, C, H, W), groups int64 (B,) in [0, rows). In integers, so that the sum is exact, in any
    order: adding or removing an image moves it by an L2 norm of at most `unit` sqrt(values).
    """
    side = mechanism.pooling
    centred = 2 * images.to(torch.int64) - 255  # in [-255, 255]
    pooled = centred.unfold(2, side, side).unfold(3, side, side).sum((-2, -1))
    total = torch.zeros(rows, mechanism.values, dtype=torch.int64, device=images.device)
    return total.index_add_(0, groups, pooled.flatten(1))


def noisy_central_means(total: np.ndarray, mechanism: CentralImages, source: str, key: bytes) -> np.ndarray:
    """`central_sum` over the whole set with Gaussian noise of standard deviation sigma sqrt(values) on every
    number, divided by the public N / (parts labels).

    total int64 (rows, values), rows being parts times labels -> float64 (rows, values). The mean of a rare
    class is paler, that of a frequent one more than its images. The caller charges the ledger before it uses
    what is returned.
    """
    # Every row gets noise, empty ones too: which are empty is private.
    noise = gaussian(source, key, total.size, mechanism.standard_deviation)
    return (total / mechanism.unit + noise.reshape(total.shape)) * (len(total) / mechanism.count)
