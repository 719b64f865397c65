"""What the unit tests of the networks share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def perturbed() -> Callable[[nn.Module], nn.Module]:
    """Adds small fixed noise to every parameter.

    Fresh networks start near zero, where many faults are invisible.
    """

    def perturb(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in module.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        return module

    return perturb
