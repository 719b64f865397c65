"""The engines of public pretraining behind one interface: torch DDP, or DeepSpeed ZeRO 0, 1 and 2.

Both train with Adam (betas 0.9 and 0.999 by default, no weight decay), keep the weights in fp32,
and give the same state: full tensors by parameter name. A run may therefore go on with another number of
ranks or with the other engine.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from privimage.config import Config
from privimage.distributed.world import World
from privimage.errors import UserError

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Forward, backward, update and state of one module that all ranks train together."""

    def __init__(self, module: nn.Module, learning_rate: float, betas: tuple[float, float] = BETAS):
        self.module, self.learning_rate = module, learning_rate
        self.optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate, betas=betas)

    @abstractmethod
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward pass, through the wrapper that averages gradients over the ranks."""

    @abstractmethod
    def backward_and_step(self, loss: Tensor) -> None:
        """Backward pass of this rank's mean loss (scalar), mean of the gradients over ranks, one update."""

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


class DDPEngine(Engine):
    """torch DistributedDataParallel; with one rank the bare module."""

    def __init__(
        self,
        module: nn.Module,
        learning_rate: float,
        world: World,
        bf16: bool,
        betas: tuple[float, float] = BETAS,
    ):
        super().__init__(module, learning_rate, betas)
        self.bf16, self.device = bf16, world.device
        # Gradients live in the buckets that are reduced: one copy less.
        devices = [world.device.index] if world.device.type == "cuda" else None
        self.wrapped = (
            DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
            if world.size > 1
            else module
        )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `Engine.forward`; in bf16 by autocast where runtime.precision asks for it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.wrapped(*inputs, **named)

    def backward_and_step(self, loss: Tensor) -> None:
        """See `Engine.backward_and_step`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
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

    def __init__(self, module: nn.Module, learning_rate: float, world: World, settings: dict):
        super().__init__(module, learning_rate)
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

    def backward_and_step(self, loss: Tensor) -> None:
        """See `Engine.backward_and_step`."""
        self.wrapped.backward(loss)
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
            self.backward_and_step(
                0.0 * torch.stack([parameter.sum() for _, parameter in self._named()]).sum()
            )
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
        return DDPEngine(module, settings.learning_rate, world, bf16)
    # DeepSpeed wants the batch of one rank.
    images = -(-settings.batch_size // world.size)
    bf16 = bf16 or world.device.type == "cuda"
    return DeepSpeedEngine(
        module, settings.learning_rate, world, deepspeed_settings(settings.deepspeed_config, images, bf16)
    )
