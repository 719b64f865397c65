"""Losses of groups of images, for private steps whose unit is the group.

User-level sampling (Charles et al. 2024, arXiv 2407.07737).

A group is laid out as one image with m K copies: m of its images, drawn anew in each step, with K copies
each. What follows knows copies alone: the gradient of a group is the mean over them, clipped once.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn

from privimage.privacy.dpsgd import Losses


class ImageLosses(Losses, Protocol):
    """See `privimage.families.base.ImageLosses`."""

    def probe(self, count: int) -> tuple[Tensor, ...]:
        """The tensors of `draw` for `count` images that are not sensitive."""


class GroupLosses:
    """The losses of m images of each group, by the losses of single images."""

    def __init__(self, losses: ImageLosses, per_group: int):
        """`per_group` is m."""
        self.losses, self.per_group = losses, per_group

    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Images uint8 (B, m, C, H, W), labels (B, m), indices (B,) of groups -> the tensors (B, m K, ...).

        The random numbers of an image belong to its group, its place there, and the seed: those of a group
        are the same whatever other groups there are.
        """
        drawn = [
            self.losses.draw(images[:, place], labels[:, place], indices, seed=_of_place(seed, place))
            for place in range(self.per_group)
        ]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))

    def probe(self, count: int) -> tuple[Tensor, ...]:
        """The tensors (B, m K, ...) of `count` groups of grey images that are not sensitive."""
        drawn = self.losses.probe(count)
        return tuple(part.repeat(1, self.per_group, *[1] * (part.ndim - 2)) for part in drawn)

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """One loss for each of n copies of images (n, ...)."""
        return self.losses(module, *tensors)


def _of_place(seed: int, place: int) -> int:
    """The seed of the images at a place of their groups: 64 bits of a hash, so that no two are related."""
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
