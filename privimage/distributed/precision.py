"""The precision that `auto` stands for."""

from pathlib import Path

import torch

from privimage.config import Config
from privimage.distributed.world import World

PROCESSOR = Path("/proc/cpuinfo")


def resolved(config: Config, world: World) -> Config:
    """The settings with `auto` of `runtime.precision` and `finetune.precision` replaced by what suits the
    main rank's device.

    All ranks get the main rank's answer, so that a result does not depend on which of them computed it.
    """
    found = world.broadcast_object("bf16" if faster_in_bf16(world.device) else "fp32")
    changed = {
        name: section.model_copy(update={"precision": found})
        for name, section in (("runtime", config.runtime), ("finetune", config.finetune))
        if section.precision == "auto"
    }
    return config.model_copy(update=changed)


def faster_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix instructions.

    GPUs since Ampere, CPUs with AMX or AVX-512 BF16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = PROCESSOR.read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
