"""First and second moments of the features of a public network, for DP-MEPF (Harder et al. 2023, arXiv
2205.12900).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from privimage.models.resnet import Classifier, classifier

GRID = 4  # a map of features is averaged over the fields of a grid: what is where counts, roughly
# Of the root mean square of all deviations: features that hardly vary among public images count less, in
# place of drowning the others where a sensitive image has them.
LEAST = 0.1


def least(deviation: Tensor) -> Tensor:
    """The deviation that features are taken to have at least, by those of all of them."""
    return LEAST * deviation.square().mean().sqrt().clamp(min=1e-12)


def pooled(network: Classifier, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> features (B, d) of all blocks of the network."""
    maps = [F.adaptive_avg_pool2d(found, min(found.shape[-1], GRID)) for found in network.maps(images)]
    return torch.cat([found.flatten(1) for found in maps], dim=1)


@lru_cache
def moments_length(network: str, channels: int, resolution: int) -> int:
    """F, the length of the vector of `NetworkMoments` by the query network of that name."""
    # A real pass of one image: what operators need on the meta device takes seconds to load.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        built = classifier(network, channels, 1).eval()
        return 2 * pooled(built, torch.zeros(1, channels, resolution, resolution)).shape[1]


@dataclass(frozen=True)
class Scales:
    """Public constants, float64 (2 d,): what moments are on average, and the factor of the difference."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Scales":
        """From features (n, d) of public images: afterwards each moment has mean 0 and the same deviation
        over these, and the vectors have a root mean square norm of 1.
        """
        features = features.detach().double().cpu()
        moments = _moments(features, features.mean(0))
        deviation = moments.std(0, correction=0)
        # Of first and of second moments, which have units of their own.
        factor = torch.cat([1 / half.clamp(min=least(half)) for half in deviation.chunk(2)])
        norm = (deviation * factor).norm().clamp(min=1e-12)
        return cls(moments.mean(0), factor / norm)


class NetworkMoments:
    """phi(x), a vector of norm at most 1 for each image: features f and (f - mean f)^2, scaled by public
    constants, and shortened where that is longer than 1.

    The network is frozen and in eval mode, so that the vector of an image depends on that image alone.
    """

    def __init__(
        self, network: Classifier, scales: Scales, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.network = network.requires_grad_(False).eval().to(device)
        self.mean, self.factor = scales.mean.to(device, dtype), scales.factor.to(device, dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> vectors (B, 2 d), by which gradients reach the images."""
        features = pooled(self.network, images).to(self.mean.dtype)
        moments = _moments(features, self.mean[: features.shape[1]])
        vectors = (moments - self.mean) * self.factor
        return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1)

    def to(self, dtype: torch.dtype) -> "NetworkMoments":
        """The same with results of another type."""
        return NetworkMoments(self.network, Scales(self.mean, self.factor), self.mean.device, dtype)

    def state(self) -> list[Tensor]:
        """All that the vector of an image depends on beside the image."""
        return [*self.network.state_dict().values(), self.mean, self.factor]


def _moments(features: Tensor, centre: Tensor) -> Tensor:
    return torch.cat([features, (features - centre).square()], dim=1)
