"""Random Fourier features of a Gaussian kernel (Rahimi and Recht 2007), for DP-MERF."""

import copy
import math

import torch
from torch import Tensor


class RandomFeatures:
    """phi(x) = sqrt(2 / F) [cos(Wx), sin(Wx)], a feature vector of norm 1 for each image.

    The product of phi(x) and phi(y) is about exp(-|x - y|^2 / (2 b^2)). `features` F is even. The bandwidth b
    is `bandwidth` sqrt(pixels), a constant: one that is fitted to sensitive images would leak. The
    frequencies W are public; they come from `seed` alone, on any device.
    """

    def __init__(
        self,
        pixels: int,
        features: int,
        bandwidth: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        drawn = torch.randn(
            pixels, features // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        self.frequencies = (drawn / (bandwidth * math.sqrt(pixels))).to(device, dtype)

    def to(self, dtype: torch.dtype) -> "RandomFeatures":
        """The same with results of another type."""
        other = copy.copy(self)
        other.frequencies = self.frequencies.to(dtype)
        return other

    def state(self) -> list[Tensor]:
        """All that the features of an image depend on beside the image."""
        return [self.frequencies]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> features (B, F)."""
        phases = images.flatten(1).to(self.frequencies.dtype) @ self.frequencies
        return torch.cat([phases.cos(), phases.sin()], dim=1) / math.sqrt(phases.shape[1])
