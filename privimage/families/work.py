"""How much work a stage is, from a short measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What one stage takes of one rank that does all the work."""

    stage: str
    steps: int
    images: float  # a step
    seconds: float
    memory: float  # bytes


def probed(device: torch.device) -> int:
    """How many images to measure with."""
    return 256 if device.type == "cuda" else 8


def measured(forward: Callable[[], Tensor], images: int) -> tuple[float, float]:
    """Seconds of a forward pass an image, and bytes of activations an image in training; `forward()` is one pass of `images` images."""
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        forward()
    best = float("inf")
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            forward().sum().item()
            best = min(best, time.perf_counter() - start)
    return best / images, sum(held) / images
