"""The engines of public pretraining behind one interface: torch DDP, or DeepSpeed ZeRO 0, 1 and 2.

Both train with Adam (betas 0.9 and 0.999 by default, no weight decay), keep the weights in fp32,
and give the same state: full tensors by parameter name. A run may therefore go on with another number of
ranks or with the other engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from privimage.config import Config
from privimage.distributed.microbatch import pieces
from privimage.distributed.world import World

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Forward, backward, update and state of one module that all ranks train together."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer

    @abstractmethod
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward pass, through the wrapper that averages gradients over the ranks."""

    def update(self, loss: Callable[[slice], Tensor], count: int = 1, at_once: int = 1) -> Tensor:
        """One update by the mean loss of this rank's `count` images, averaged over the ranks.

        `loss(piece)` is the mean loss (a scalar) of the images in a slice, by way of `forward`; there are at
        most `at_once` in one. Their gradients add up, and the ranks exchange them once. Returns the mean
        loss, detached.
        """
        total = torch.zeros((), device=next(self.module.parameters()).device)
        self._clear()
        for piece in pieces(count, at_once):
            with self._synchronised(piece.stop == count):
                part = loss(piece) * ((piece.stop - piece.start) / count)
                self._backward(part)
            total += part.detach()
        self._step()
        return total

    @abstractmethod
    def _synchronised(self, last: bool) -> AbstractContextManager:
        """A context of forward and backward passes, of which only the last one exchanges gradients."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget the gradients of the update before."""

    @abstractmethod
    def _step(self) -> None:
        """Update the module by its gradients."""

    @abstractmethod
    def state(self) -> dict:
        """Weights and optimizer as full fp32 tensors, in one form for every engine and number of ranks.

        Returns {"module": state dict, "step": updates done, "exp_avg": {name: tensor}, "exp_avg_sq": {name:
        tensor}}. All ranks must call it together; any of them may write it.
        """

    @abstractmethod
    def load(self, state: dict) -> None:
        """Take over what `state` returned; on all ranks, before the first update."""

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad
        ]


def adam(
    module: nn.Module, learning_rate: float, betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    """Adam without weight decay, in one kernel where the module is on a GPU."""
    fused = next(module.parameters()).is_cuda
    return torch.optim.Adam(module.parameters(), lr=learning_rate, betas=betas, fused=fused or None)


class DDPEngine(Engine):
    """torch DistributedDataParallel; with one rank the bare module."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, world: World, bf16: bool):
        super().__init__(module, optimizer)
        self.bf16, self.device = bf16, world.device
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Gradients live in the buckets that are reduced: one copy less.
        self.parallel = (
            DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
            if world.size > 1
            else None
        )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.forward`; in bf16 by autocast where runtime.precision asks for it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return (self.parallel or self.module)(*inputs, **named)

    def _synchronised(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.parallel is None else self.parallel.no_sync()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        self.optimizer.step()

    def state(self) -> dict:
        """See `Engine.state`."""
        # Only names and full tensors: the state does not depend on engine or number of ranks.
        slots = {
            name: self.optimizer.state[parameter]
            for name, parameter in self._named()
            if parameter in self.optimizer.state
        }
        step = int(next(iter(slots.values()))["step"]) if slots else 0
        return {
            "module": self.module.state_dict(),
            "step": step,
            **{key: {name: slot[key] for name, slot in slots.items()} for key in MOMENTS},
        }

    def load(self, state: dict) -> None:
        """See `Engine.load`."""
        self.module.load_state_dict(state["module"])
        for name, parameter in self._named() if state["step"] else []:
            moments = {key: state[key][name].to(parameter.device, copy=True) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}


def make_engine(config: Config, module: nn.Module, world: World) -> Engine:
    """The engine of `pretrain.engine` around a module that is on `world.device` already, equal on all ranks.

    Raises UserError for a DeepSpeed that is not there or a settings file that it should not be given.
    """
    settings = config.pretrain
    bf16 = config.runtime.precision == "bf16"
    if settings.engine == "ddp":
        return DDPEngine(module, adam(module, settings.learning_rate), world, bf16)
    from privimage.distributed.deepspeed_engine import DeepSpeedEngine, deepspeed_settings

    # DeepSpeed wants the batch of one rank.
    images = -(-settings.batch_size // world.size)
    bf16 = bf16 or world.device.type == "cuda"
    return DeepSpeedEngine(
        module,
        adam(module, settings.learning_rate),
        world,
        deepspeed_settings(settings.deepspeed_config, images, bf16),
    )
