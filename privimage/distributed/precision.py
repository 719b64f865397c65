"""The precision that `auto` stands for."""

import torch

from privimage.config import Config
from privimage.distributed.world import World


def resolved(config: Config, world: World) -> Config:
    """The settings with `auto` of `runtime.precision` and `finetune.precision` replaced by what suits the
    main rank's device.

    All ranks get the main rank's answer, so that a result does not depend on which of them computed it. What
    is computed from sensitive images is named by the answer (`privacy.identity`), not by `auto`.
    """
    found = world.broadcast_object("bf16" if faster_in_bf16(world.device) else "fp32")
    changed = {
        name: section.model_copy(update={"precision": found})
        for name, section in (("runtime", config.runtime), ("finetune", config.finetune))
        if section.precision == "auto"
    }
    return config.model_copy(update=changed)


def faster_in_bf16(device: torch.device) -> bool:
    """Whether it is a GPU with bf16 matrix instructions, as all since Ampere.

    A CPU is not asked: its gain is small without AMX, and without AVX-512 it would be slower.
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_multiplies_in_bf16() -> bool:
    """Whether this machine's CPU has instructions for matrix products in bf16 (AMX).

    A run on it is faster in bf16, by a quarter to a third (docs/results.md), but would not be on another
    machine: for those who choose settings for a machine, `auto` does not ask.
    """
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not there in older versions
    return bool(capabilities.get("amx_bf16"))
