"""The sensitive set in device memory, and the random numbers of its per-image losses."""

import statistics

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class SensitiveSet(Dataset):
    """All sensitive images on one device: uint8 (N, C, H, W), labels int64 (N,).

    A batch is (images, labels, indices); an empty batch is a batch.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: torch.device):
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.tensor(indices, dtype=torch.int64, device=self.images.device)
        return self.images[at], self.labels[at], at


class ImageDraws:
    """Random numbers that belong to an image, independent of the batch and the rank that process it.

    One generator is seeded again for each (seed, index); the seed changes with every step.
    """

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device)

    def normal(self, seed: int, indices: Tensor, size: int) -> Tensor:
        """Standard normal numbers (len(indices), size) for the images at `indices`."""
        draws = torch.empty(len(indices), size, device=self.generator.device)
        # One generator seeded per image: the draw of an image is the same in any batch, on any rank.
        for row, index in zip(draws, indices.tolist(), strict=True):
            self.generator.manual_seed(_mix(seed, index))
            row.normal_(generator=self.generator)
        return draws


def _mix(seed: int, index: int) -> int:
    """A 64-bit hash of two numbers (the finaliser of SplitMix64)."""
    value = (seed + (index + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def dropped(normal: Tensor, probability: float) -> Tensor:
    """Mask (B,) of standard normal draws (B,) that fall into the lower tail of `probability`."""
    return (
        normal < statistics.NormalDist().inv_cdf(probability)
        if probability
        else torch.zeros_like(normal, dtype=torch.bool)
    )
