"""Floating-point operations of a network, and how many a device could do."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 operations per second of one device, by a word of its name, as their makers state them.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}
FEW = 8  # images by which operations are counted


def of_training(forward: Callable[[int], Any]) -> float:
    """Operations per image of a training step: three times those of a forward pass.

    `forward(n)` is a forward pass of n images. Matrix products and convolutions count, nothing else.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(FEW)
    return 3 * counter.get_total_flops() / FEW


def peak(device: torch.device) -> float | None:
    """What one device could do per second in bf16; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for word, value in PEAKS.items() if word in name), None)
