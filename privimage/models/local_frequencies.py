"""Fixed features of an image for a linear classifier: how strong each frequency is at each place.

Band-pass filters, the modulus, and means over squares: the first order of a scattering network (Bruna and
Mallat 2013). Nothing here is learned, so no data set has a part in it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8  # squares in a row of the image over which is averaged
LARGEST = 32  # pixels of a side; larger images are reduced
DIRECTIONS, SCALES = 8, (1.0, 2.0)  # the finest waves are 8 / 3 pixels long, the others twice that
NOISE_IMAGES = 500  # by which channels are brought to one scale
LEAST = 0.02  # energy below which an image counts as flat
SMOOTH = 1e-4  # added to energies, so that their roots have a slope at 0


class LocalFrequencies:
    """Features of images of one shape: float32 (B, `count`), in no particular range."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        """For images of `shape` (C, H, W), square."""
        self.channels, self.side = shape[0], min(shape[1], LARGEST)
        self.filters = _filters(self.side).to(device)
        of_noise = self._maps(_natural_noise(self.channels, self.side).to(device))
        self.mean = of_noise.mean((0, 2, 3), keepdim=True)
        self.deviation = (of_noise - self.mean).square().mean((0, 2, 3), keepdim=True).sqrt()

    @staticmethod
    def count(shape: tuple[int, int, int]) -> int:
        """The number of features of an image of `shape` (C, H, W)."""
        return (shape[0] + DIRECTIONS * len(SCALES)) * min(shape[1], GRID) ** 2

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, d) of images (B, C, H, W) in [-1, 1]; they can be differentiated."""
        if images.shape[-1] > self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="area")
        return ((self._maps(images) - self.mean) / self.deviation).flatten(1)

    def _maps(self, images: Tensor) -> Tensor:
        """Colours and energies, averaged over squares: (B, channels + filters, grid, grid)."""
        # Edges of things are edges of lightness: the energies of colours add little but noise.
        spectrum = torch.fft.fft2(images.mean(1, keepdim=True))
        energies = torch.fft.ifft2(spectrum * self.filters).abs()
        # Relative to the contrast of the image, and compressed.
        contrast = (energies.square().mean((1, 2, 3), keepdim=True) + LEAST**2).sqrt()
        maps = torch.cat([images, (energies / contrast + SMOOTH).sqrt()], 1)
        return F.adaptive_avg_pool2d(maps, GRID) if self.side > GRID else maps


def _filters(side: int) -> Tensor:
    """Bands of frequency, one of each direction and scale: (filters, side, side), of the spectrum."""
    frequency = torch.fft.fftfreq(side, dtype=torch.float64)
    y, x = torch.meshgrid(frequency, frequency, indexing="ij")
    found = []
    for scale in SCALES:
        centre = 0.375 / scale  # cycles per pixel
        for direction in range(DIRECTIONS):
            angle = math.pi * direction / DIRECTIONS
            along, across = (
                x * math.cos(angle) + y * math.sin(angle),
                y * math.cos(angle) - x * math.sin(angle),
            )
            distance = (along - centre) ** 2 + (1.4 * across) ** 2
            found.append(torch.exp(-distance / (2 * (centre / 2.2) ** 2)))
    filters = torch.stack(found)
    filters[:, 0, 0] = 0  # lightness itself is no wave
    return filters.float()


def _natural_noise(channels: int, side: int) -> Tensor:
    """Noise (B, C, H, W) in [-1, 1] with the spectrum of photographs, amplitudes falling as 1 / frequency
    (Field 1987), and mostly grey.
    """
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    radius[0, 0] = 1 / side
    white = torch.randn(NOISE_IMAGES, channels, side, side, generator=torch.Generator().manual_seed(0))
    noise = torch.fft.ifft2(torch.fft.fft2(white) / radius).real
    noise = noise + 2 * noise.mean(1, keepdim=True) if channels > 1 else noise
    return (noise / noise.flatten(1).std(1)[:, None, None, None] / 2).clamp(-1, 1)
