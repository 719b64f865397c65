"""Exponential moving average of a module's weights."""

from typing import Any

import torch
from torch import nn


class EMA:
    """Averaged weights of `module` in fp32, updated in place on the module's device.

    The n-th update (n = 1, 2, ...) decays by min(decay, (1 + n) / (10 + n)), so that the random start is soon
    forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.averages = {name: value.detach().clone().float() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [value.detach().float() for value in self.module.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give the averaged weights to another module of the same layout, in its own precision.

        Its buffers stay.
        """
        for name, value in module.named_parameters():
            value.copy_(self.averages[name])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: {"updates": int, "averages": {name: fp32 tensor}}."""
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises KeyError for a state of another network."""
        self.updates = state["updates"]
        for name, value in self.averages.items():
            value.copy_(state["averages"][name])
