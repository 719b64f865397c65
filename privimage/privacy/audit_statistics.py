"""The canaries of an audit in the noisy statistics that a run draws beside its training.

Each mechanism's own sums and noise are used; only what sees the images is replaced. A canary adds the worst
vector that there could be, along a direction that no other canary uses.
"""

from dataclasses import dataclass
from functools import singledispatch

import numpy as np
import torch

from privimage.config import Config
from privimage.privacy.mechanisms import CentralImages, MeanEmbedding, Mechanism, NoisyGradients
from privimage.privacy.mechanisms.central import central_sum, noisy_central_means
from privimage.privacy.mechanisms.classifier import Alike, gradient_sum, noisy_gradient, whole_features
from privimage.privacy.mechanisms.embedding import embedding_sum, noisy_embedding
from privimage.privacy.mechanisms.histogram import Histogram, noisy_histogram

LENGTH = 1000.0  # of what a canary adds, in bounds on it
AT_ONCE = 512  # images whose vectors are in memory


@dataclass(frozen=True)
class Canaries:
    """The images of the canaries that are in the set."""

    total: int  # m, of all canaries
    images: int  # of each
    owners: np.ndarray  # int64 (n,), in [0, m): whose image it is
    signs: np.ndarray  # float64 (n,): 1, or -1 for one that stands for an absent one under replacement
    groups: np.ndarray  # int64 (n,): the group of each; all different where images are the unit

    @classmethod
    def of(cls, coins: np.ndarray, images: int, mechanism: Mechanism) -> "Canaries":
        """Canaries of `images` images each; coins bool (m,) say which take part."""
        replaced, grouped = mechanism.relation.replacement, mechanism.relation.unit == "group"
        owners = np.repeat(np.arange(len(coins)) if replaced else np.flatnonzero(coins), images)
        groups = owners if grouped else np.arange(len(owners))
        return cls(len(coins), images, owners, np.where(coins[owners], 1.0, -1.0), groups)

    def parts(self) -> list[slice]:
        """Slices of about `AT_ONCE` images, with all images of their canaries."""
        step = max(1, AT_ONCE // self.images) * self.images
        return [slice(start, start + step) for start in range(0, len(self.owners), step)]

    def vectors(self, part: slice) -> torch.Tensor:
        """Vectors float64 (B, m) of the images of a slice, along the coordinates of their canaries."""
        owners, signs = torch.from_numpy(self.owners[part]), torch.from_numpy(self.signs[part])
        return torch.nn.functional.one_hot(owners, self.total) * (LENGTH * signs[:, None])


def scores(
    mechanism: Mechanism, coins: np.ndarray, images: int, config: Config, keys: list[bytes]
) -> np.ndarray:
    """What one draw of a statistic says of each canary, float64 (m,), in contributions of a unit.

    A canary that takes part has about 1, where it has one image; another 0, or -1 where neighbours have a
    unit replaced. The standard deviation of the noise is that of one draw over the contribution of a unit.
    `keys`, 32 secret bytes for each use of the mechanism, over which scores are averaged.
    """
    canaries = Canaries.of(coins, images, mechanism)
    return np.mean([_score(mechanism, canaries, config, key) for key in keys], axis=0)


@singledispatch
def _score(mechanism: Mechanism, canaries: Canaries, config: Config, key: bytes) -> np.ndarray:
    raise TypeError(f"{mechanism.name} has no canaries")


@_score.register
def _of_histogram(mechanism: Histogram, canaries: Canaries, config: Config, key: bytes) -> np.ndarray:
    """Votes for bins of the canary's own; one that stands for an absent canary votes for others."""
    each = mechanism.per_image
    bins = np.where(canaries.signs > 0, canaries.owners, canaries.total + canaries.owners)
    votes = bins[:, None] * each + np.arange(each)
    groups, shape = canaries.groups, (1, 2 * canaries.total * each)
    source = config.privacy.noise_source
    counted = noisy_histogram(votes, np.zeros_like(groups), groups, shape, mechanism, source, key)
    own, other = counted.reshape(2, canaries.total, each).sum(2) / each
    return own - other if mechanism.relation.replacement else own


@_score.register
def _of_embedding(mechanism: MeanEmbedding, canaries: Canaries, config: Config, key: bytes) -> np.ndarray:
    total = torch.zeros(canaries.total + 1, dtype=torch.int64)
    for part in canaries.parts():
        vectors, groups = canaries.vectors(part), torch.from_numpy(canaries.groups[part])
        total += embedding_sum(vectors, torch.zeros_like(groups), groups, 1, mechanism.weight)
    return noisy_embedding(total.numpy(), mechanism, config.privacy.noise_source, key)[:-1]


@_score.register
def _of_central(mechanism: CentralImages, canaries: Canaries, config: Config, key: bytes) -> np.ndarray:
    """White or black images, each canary's in a row of its own."""
    total = torch.zeros(canaries.total, mechanism.values, dtype=torch.int64)
    for part in canaries.parts():
        places, groups = torch.from_numpy(canaries.owners[part]), torch.from_numpy(canaries.groups[part])
        white = torch.from_numpy(canaries.signs[part] > 0).to(torch.uint8)[:, None, None, None] * 255
        images = white.expand(-1, config.data.channels, config.data.resolution, config.data.resolution)
        total += central_sum(images, places, groups, canaries.total, mechanism)
    noisy = noisy_central_means(total.numpy(), mechanism, config.privacy.noise_source, key)
    return noisy.sum(1) * mechanism.count / len(total) / mechanism.values


@_score.register
def _of_classifier(mechanism: NoisyGradients, canaries: Canaries, config: Config, key: bytes) -> np.ndarray:
    """Features along the canary's coordinate, and a residual as large as it likes; of one step."""
    total = torch.zeros(canaries.total + 1, dtype=torch.int64)
    for part in canaries.parts():
        features, groups = whole_features(canaries.vectors(part)), torch.from_numpy(canaries.groups[part])
        residuals = torch.full((len(groups), 1), LENGTH, dtype=torch.float64)
        total += gradient_sum(features, residuals, Alike(features, groups), mechanism.weight)
    return noisy_gradient(total.numpy(), mechanism, config.privacy.noise_source, key)[:-1]
