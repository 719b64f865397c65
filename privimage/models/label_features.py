"""What a private classifier of labels sees of an image: how strong each frequency is at each place, and
features of a network that public images have trained.

A linear classifier on such features is the best private one without private deep learning (Tramèr and Boneh
2021, arXiv 2011.11660). Under noise it matters most that few numbers tell much: those of the network do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage.models.edm import to_unit
from privimage.models.local_frequencies import LocalFrequencies
from privimage.models.network_moments import least
from privimage.models.resnet import classifier

GRIDS, MOST = (4, 2, 1), 4096  # squares in a row over which maps of the network are averaged; numbers of all
OF_NETWORK = 0.8  # share of the network in the squared norm of the features
AT_ONCE = 128  # images of 32x32 that are looked at at once
# Logits are TEMPERATURE times the product of weights and features of length 1.
TEMPERATURE = 10.0


def body_of(network: str, channels: int) -> nn.Sequential:
    """The layers of a query network that give the features, with fresh weights, in eval mode.

    Of the blocks the last one knows public classes rather than images, and is left out.
    """
    return classifier(network, channels, 1).body().eval().requires_grad_(False)


def field_means(body: nn.Module, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> means of the channels over the squares of a grid: (B, K, g, g)."""
    maps = body(images)
    grid = next(g for g in GRIDS if (g <= maps.shape[-1] and maps.shape[1] * g * g <= MOST) or g == 1)
    return F.adaptive_avg_pool2d(maps, grid)


@dataclass(frozen=True)
class PublicFeatures:
    """A part of a query network, and constants from public images."""

    network: str  # its name
    state: dict[str, Tensor]  # of `body_of`
    mean: Tensor  # (K,), of each channel over images and places
    deviation: Tensor  # (K,), above 0

    @classmethod
    def of(cls, network: str, body: nn.Module, features: Tensor) -> "PublicFeatures":
        """From the `field_means` features (n, K, g, g) of public images."""
        found = features.detach().double()
        mean = found.mean((0, 2, 3))
        deviation = (found - mean[:, None, None]).square().mean((0, 2, 3)).sqrt()
        return cls(network, body.state_dict(), mean.float(), deviation.clamp(min=least(deviation)).float())

    def tensors(self) -> list[Tensor]:
        """All that the features of an image depend on beside the image."""
        return [*self.state.values(), self.mean, self.deviation]

    def to_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and a name, from which `PublicFeatures(**...)` is the same."""
        state = {name: value.cpu() for name, value in self.state.items()}
        constants = {"mean": self.mean.cpu(), "deviation": self.deviation.cpu()}
        return {"network": self.network, "state": state} | constants


class LabelFeatures:
    """Features of images of one shape: float32 (B, `count`), in no particular range."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        public: PublicFeatures | None = None,
        mirrored: bool = False,
    ) -> None:
        """For images of `shape` (C, H, W), square; without `public` the frequencies alone.

        `mirrored`: those of an image and of its mirror image are the same, the mean of both. What tells them
        apart tells nothing of a class, and without it the rest is louder than the noise by more.
        """
        self.frequencies, self.body, self.mirrored = LocalFrequencies(shape, device), None, mirrored
        if public is not None:
            self.body = body_of(public.network, shape[0]).to(device)
            self.body.load_state_dict(public.state)
            self.mean, self.deviation = (
                constant.to(device)[:, None, None] for constant in (public.mean, public.deviation)
            )

    @staticmethod
    @lru_cache
    def count(shape: tuple[int, int, int], network: str | None) -> int:
        """The number of features of an image of `shape` (C, H, W), with those of the query network named."""
        frequencies = LocalFrequencies.count(shape)
        if network is None:
            return frequencies
        # A real pass of one image: what operators need on the meta device takes seconds to load.
        with torch.random.fork_rng(devices=[]):
            return frequencies + field_means(body_of(network, shape[0]), torch.zeros(1, *shape))[0].numel()

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, d) of images (B, C, H, W) in [-1, 1].

        They can be differentiated. The derivative of `mirrored` ones is by the images as they stand, twice,
        to save the pass back through their mirror images: whoever follows it turns them over now and then.
        """
        parts = self._parts(images)
        if self.mirrored:
            with torch.no_grad():
                others = self._parts(images.flip(3))
            parts = [one + ((other - one) / 2).detach() for one, other in zip(parts, others, strict=True)]
        if self.body is None:
            return parts[0]
        shared = zip(parts, (1 - OF_NETWORK, OF_NETWORK), strict=True)
        return torch.cat([share**0.5 * F.normalize(part) for part, share in shared], 1)

    def _parts(self, images: Tensor) -> list[Tensor]:
        """Frequencies (B, d), and what the network sees (B, d)."""
        found = [self.frequencies(images)]
        if self.body is not None:
            found.append(((field_means(self.body, images) - self.mean) / self.deviation).flatten(1))
        return found


class LabelClassifier:
    """A linear classifier of images by `LabelFeatures`, from what a release holds of it."""

    def __init__(self, state: Mapping[str, Any], shape: tuple[int, int, int], device: torch.device) -> None:
        """`state`: `weights` (classes, d), `public`, the `PublicFeatures.to_dict` of it or None, and whether
        features are `mirrored`.
        """
        public = None if state["public"] is None else PublicFeatures(**state["public"])
        self.features = LabelFeatures(shape, device, public, state["mirrored"])
        self.weights = state["weights"].to(device)
        self.at_once = max(1, AT_ONCE * 32 * 32 // max(32 * 32, shape[1] * shape[2]))

    @torch.no_grad()
    def labels(self, images: np.ndarray) -> np.ndarray:
        """The labels int64 (B,) that it gives to images uint8 (B, H, W, C)."""
        parts = [
            # The largest product, whatever the length of the features.
            (self.features(to_unit(part.to(self.weights.device))).to(self.weights.dtype) @ self.weights.T)
            .argmax(1)
            .cpu()
            for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(self.at_once)
        ]
        return torch.cat(parts).numpy()

    def slope(self, images: Tensor, labels: Tensor, moved: tuple[int, int] = (0, 0)) -> Tensor:
        """The gradient (B, C, H, W) of the logarithm of the probability that it gives to `labels` int64 (B,).

        It is by images (B, C, H, W) in [-1, 1], which it sees `moved` down and to the right by so many
        pixels, their border repeated. Of mirrored features see `LabelFeatures`.
        """
        parts = zip(images.split(self.at_once), labels.split(self.at_once), strict=True)
        return torch.cat([self._slope(*part, moved) for part in parts])

    @torch.enable_grad()
    def _slope(self, images: Tensor, labels: Tensor, moved: tuple[int, int]) -> Tensor:
        images = images.detach().float().requires_grad_()
        (down, right), (height, width) = moved, images.shape[2:]
        around = max(abs(down), abs(right))
        seen = F.pad(images, (around,) * 4, mode="replicate")
        seen = seen[..., around - down : around - down + height, around - right : around - right + width]
        logits = TEMPERATURE * F.normalize(self.features(seen).to(self.weights.dtype)) @ self.weights.T
        return torch.autograd.grad(-F.cross_entropy(logits, labels, reduction="sum"), images)[0]
