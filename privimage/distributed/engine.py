"""The engines of public pretraining behind one interface: torch DDP, or DeepSpeed ZeRO 0, 1 and 2.

Both train with Adam (betas 0.9 and 0.999 by default, no weight decay), keep the weights in fp32,
and give the same state: full tensors by parameter name. A run may therefore go on with another number of
ranks or with the other engine.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from privimage.config import Config
from privimage.distributed.microbatch import pieces
from privimage.distributed.world import World
from privimage.errors import UserError

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


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO 0, 1 or 2 around torch's Adam; bf16 is by autocast, so that the weights stay fp32."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, world: World, settings: dict):
        super().__init__(module, optimizer)
        os.environ.update(
            world.variables() | {"DS_ACCELERATOR": world.device.type}
        )  # which DeepSpeed reads, whatever the launcher
        try:
            import deepspeed
            from deepspeed.ops import __compatible_ops__
        except ImportError as error:
            raise UserError(
                f"pretrain.engine: deepspeed does not load ({error}); pip install 'privimage[cluster]', or "
                "choose ddp"
            ) from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Its shared-memory all-reduce between CPUs would be compiled at the first start, for a minute and
        # more.
        __compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(world.backend, verbose=False)
        self.wrapped, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=settings)
        self.sharded = settings["zero_optimization"]["stage"] > 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.forward`."""
        return self.wrapped(*inputs, **named)

    def _synchronised(self, last: bool) -> AbstractContextManager:
        self.wrapped.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    def _clear(self) -> None:
        """Its `step` has done so."""

    def _step(self) -> None:
        self.wrapped.step()

    def state(self) -> dict:
        """See `Engine.state`; ZeRO's shards are put together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        # Shards of the moments are gathered parameter by parameter, which bounds the memory.
        step = self.wrapped.global_steps
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for name, parameter in self._named() if step else []:
            for key in MOMENTS:
                moments[key][name] = (
                    safe_get_full_optimizer_state(parameter, key)
                    if self.sharded
                    else self.optimizer.state[parameter][key]
                )
        return {"module": self.module.state_dict(), "step": step, **moments}

    def load(self, state: dict) -> None:
        """See `Engine.load`; each rank keeps its shard."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if state["step"] and self.sharded:
            # The shards of the moments exist after the first update: this one has zero gradients and changes
            # nothing.
            self.update(lambda _: 0.0 * torch.stack([p.sum() for _, p in self._named()]).sum())
        self.module.load_state_dict(state["module"])
        self.wrapped.global_steps = state["step"]
        step = torch.tensor(float(state["step"]))
        for name, parameter in self._named():
            moments = {
                key: state[key][name].to(parameter.device, torch.float32, copy=True)
                for key in MOMENTS
                if state["step"]
            }
            if self.sharded:
                safe_set_full_fp32_param(parameter, parameter.detach())
                for key, value in moments.items():
                    safe_set_full_optimizer_state(parameter, value, key)
            elif moments:
                self.optimizer.state[parameter] = {"step": step.clone(), **moments}
        if self.sharded:
            for slot in self.optimizer.state.values():
                slot["step"] = step.clone()


def deepspeed_settings(path: Path | None, images: int, bf16: bool) -> dict:
    """DeepSpeed's settings from its JSON file, or ZeRO stage 1 where there is none.

    `images` is the batch of one rank.

    Raises UserError that names the file for settings that would change what is trained or split the weights.
    """
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": 1},
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    if path is not None:
        try:
            settings = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"pretrain.deepspeed_config: {path}: {error}") from None
        stage = settings.setdefault("zero_optimization", {}).setdefault("stage", 0)
        if stage not in (0, 1, 2):
            raise UserError(
                f"{path}: zero_optimization.stage: 0, 1 and 2 keep the weights whole, {stage!r} is not "
                "supported"
            )
        for key in (
            "optimizer",
            "scheduler",
            "bf16",
            "fp16",
            "gradient_clipping",
            "train_batch_size",
            "gradient_accumulation_steps",
        ):
            if key in settings:
                instead = (
                    "torch_autocast, which keeps the weights in fp32"
                    if key in ("bf16", "fp16")
                    else "the section `pretrain` of the configuration"
                )
                raise UserError(f"{path}: {key}: leave it out; it is set by {instead}")
    # What this package decides: batch size and clipping must not come from two places.
    ours = {
        "train_micro_batch_size_per_gpu": images,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return settings | ours | {"gradient_clipping": 0.0}  # unset, recent versions clip to a norm of 1


def make_engine(config: Config, module: nn.Module, world: World) -> Engine:
    """The engine of `pretrain.engine` around a module that is on `world.device` already, equal on all ranks.

    Raises UserError for a DeepSpeed that is not there or a settings file that it should not be given.
    """
    settings = config.pretrain
    bf16 = config.runtime.precision == "bf16"
    if settings.engine == "ddp":
        return DDPEngine(module, adam(module, settings.learning_rate), world, bf16)
    # DeepSpeed wants the batch of one rank.
    images = -(-settings.batch_size // world.size)
    bf16 = bf16 or world.device.type == "cuda"
    return DeepSpeedEngine(
        module,
        adam(module, settings.learning_rate),
        world,
        deepspeed_settings(settings.deepspeed_config, images, bf16),
    )
