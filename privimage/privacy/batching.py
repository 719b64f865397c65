"""How many images may go through the network at once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from privimage.config import Finetune
from privimage.privacy.gradients import GRADIENTS, Losses

CPU_IMAGES = 32  # a larger batch is no faster on a CPU, and harder on its caches
MOST = 4096


def physical_batch_size(settings: Finetune, module: nn.Module, losses: Losses, probe: Callable[[int], tuple[Tensor, ...]], device: torch.device) -> int:
    """`finetune.physical_batch_size`; for `auto` what fits into 80 % of a GPU's free memory, or a fixed number on a CPU.

    `probe(count)` makes a batch of the right shapes without sensitive images; its gradients are computed twice to measure.
    """
    if settings.physical_batch_size != "auto":
        return settings.physical_batch_size
    if device.type != "cuda":
        return min(CPU_IMAGES, settings.logical_batch_size)
    free, _ = torch.cuda.mem_get_info(device)
    small, large = (_peak(settings, module, losses, probe, device, count) for count in (4, 12))
    an_image = max(1.0, (large - small) / 8)
    fitting = int((0.8 * free - small) / an_image)
    return max(1, min(fitting, MOST, settings.logical_batch_size))


def _peak(settings: Finetune, module: nn.Module, losses: Losses, probe: Callable, device: torch.device, count: int) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    gradients = GRADIENTS[settings.gradients](module, None)
    gradients.backward(losses, *probe(count))
    gradients.to_standard_module()
    return torch.cuda.max_memory_allocated(device) - before
