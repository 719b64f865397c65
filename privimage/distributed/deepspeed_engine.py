"""DeepSpeed as an engine of public pretraining: ZeRO 0, 1 and 2, which keep the weights whole."""

import json
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privimage.distributed.engine import MOMENTS, Engine
from privimage.distributed.world import World
from privimage.errors import UserError


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
