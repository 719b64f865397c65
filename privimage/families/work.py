"""How much work a stage is, from a short measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 8  # images to begin with: a large network is slow enough with them
ENOUGH = 0.1  # seconds of a pass beside which the overhead of its calls is small


@dataclass(frozen=True)
class Work:
    """What one stage takes of one rank that does all the work."""

    stage: str
    steps: int
    images: float  # a step
    seconds: float
    memory: float  # bytes


def measured(forward: Callable[[int], Tensor], device: torch.device, precision: str, at_once: int) -> tuple[float, float]:
    """Seconds of a forward pass an image, and bytes of activations an image in training.

    `forward(n)` is one pass of n images on `device`, in `precision`, "fp32" or "bf16". More and more images are taken until a pass is
    long enough to be measured, or has the `at_once` images that it will have.
    """
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.numel() * tensor.element_size())
        return tensor

    images = min(FEW, at_once)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            forward(images)
        memory = sum(held) / images
        with torch.no_grad():
            while (best := min(_seconds(forward, images) for _ in range(3))) < ENOUGH and images < at_once:
                images = min(2 * images, at_once)
    return best / images, memory


def _seconds(forward: Callable[[int], Tensor], images: int) -> float:
    start = time.perf_counter()
    forward(images).sum().item()
    return time.perf_counter() - start
