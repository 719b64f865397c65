"""Physical batch sizes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from privimage.config.settings import Finetune
from privimage.distributed.microbatch import activations
from privimage.errors import UserError
from privimage.models import parameters
from privimage.privacy.gradients import GRADIENTS, Losses, clip_and_sum_, trained_parameters
from privimage.telemetry import memory

# Images at once on a CPU: more than the most, or of more bytes, are no faster, since caches no longer hold
# them; with less than the fewest the overhead of each operator is felt (docs/results.md, "Physical
# batches on a CPU").
CPU_FEWEST, CPU_MOST, CPU_BYTES = 32, 128, 375e6
CPU_UNIT = (
    16  # images: in a multiple of it every place of a batch was rounded alike on the CPUs that were measured
)
OF_MEMORY = 0.6  # of a machine, for the private steps of its ranks
GPU_COPIES = 2048  # noised copies; a larger batch is no faster on a GPU


def bytes_of_an_image(
    module: nn.Module, losses: Losses, probe: Callable[[int], tuple[Tensor, ...]], device: torch.device
) -> float:
    """Bytes that a private step holds of each image in fp32: activations of its noise copies and a gradient.

    `probe(count)` makes a batch of the right shapes without sensitive images.
    """

    def forward(images: int) -> Tensor:
        return losses(module, *(tensor.flatten(0, 1) for tensor in probe(images)))

    size = sum(parameter.numel() for parameter in trained_parameters(module))
    return activations(forward, device, "fp32", images=1) + 4 * size


def _cpu_images(held: float) -> int:
    """Images at once with which a CPU is fastest, where a step holds `held` bytes of each."""
    return max(CPU_FEWEST, min(CPU_MOST, int(CPU_BYTES / max(held, 1.0)) // CPU_UNIT * CPU_UNIT))


def cpu_batch_size(settings: Finetune, held: float) -> int:
    """`finetune.physical_batch_size`.

    For `auto`, the size used on a CPU where a step holds `held` bytes of each image (see
    `bytes_of_an_image`), and assumed before the memory of a GPU is known.
    """
    return (
        min(_cpu_images(held), settings.logical_batch_size)
        if settings.physical_batch_size == "auto"
        else settings.physical_batch_size
    )


def filled_size(images: int, device: torch.device) -> int:
    """To how many images a physical batch of at most `images` is filled up, so that each gradient is a
    function of its image alone.
    """
    return images if device.type == "cuda" or images == 1 else math.ceil(images / CPU_UNIT) * CPU_UNIT


def physical_batch_size(
    settings: Finetune,
    module: nn.Module,
    losses: Losses,
    probe: Callable[[int], tuple[Tensor, ...]],
    device: torch.device,
    ranks: int,
    per_group: int = 1,
) -> int:
    """`finetune.physical_batch_size`, in units with `per_group` images each; a group is never divided.

    For `auto` what fits into 80 % of a GPU's free memory and fills it, or at most 128 on a CPU.

    `probe(count)` makes a batch of the right shapes without sensitive images; its gradients are computed and
    clipped twice to measure. Batches are filled up to this size, so it is at most what makes the fewest
    batches of a rank's share even; on a CPU the next multiple of `CPU_UNIT`.
    """
    given = settings.physical_batch_size
    if given != "auto":
        given = max(1, given // per_group)
    if device.type != "cuda":
        most = _on_a_cpu(module, losses, probe, ranks) if given == "auto" else given
    else:
        most = _fitting(settings, module, losses, probe, device, per_group) if given == "auto" else given
    # The expected share of a rank, and room for the random size of Poisson samples.
    share = settings.logical_batch_size / ranks
    largest = share + 3 * math.sqrt(share)  # of a thousand Poisson samples; the one beyond takes a batch more
    return filled_size(math.ceil(largest / math.ceil(largest / most)), device)


def _on_a_cpu(
    module: nn.Module, losses: Losses, probe: Callable[[int], tuple[Tensor, ...]], ranks: int
) -> int:
    """As many images as are fastest; fewer where memory has no room for them, and 1 at worst.

    By all of the memory, not by what is free: the size is part of what a step is named by, so that another
    one would be charged again. Raises UserError where not even one image has room.
    """
    size = sum(parameter.numel() for parameter in trained_parameters(module))
    # Gradients and activations are there twice at the peak; beside them the sums in float64.
    held = bytes_of_an_image(module, losses, probe, torch.device("cpu"))
    room = OF_MEMORY * memory.total() / ranks - 5 * 8 * size
    most = int(room / max(2 * held, 1.0))
    if most < 1:
        raise UserError(
            f"finetune: a gradient of {size:,} numbers and the activations of an image have no room for "
            f"{ranks} ranks in {memory.total() / 2**30:.0f} GiB; use fewer ranks, or a smaller model"
        )
    return max(1, min(_cpu_images(held), most // CPU_UNIT * CPU_UNIT))


def _fitting(
    settings: Finetune,
    module: nn.Module,
    losses: Losses,
    probe: Callable[[int], tuple[Tensor, ...]],
    device: torch.device,
    per_group: int,
) -> int:
    # Two sizes give the memory per image and the part that does not grow.
    free, _ = torch.cuda.mem_get_info(device)
    small, large = (_peak(settings, module, losses, probe, device, count) for count in (4, 12))
    an_image = max(1.0, (large - small) / 8)
    return max(
        1, min(int((0.8 * free - small) / an_image), GPU_COPIES // (settings.noise_copies * per_group))
    )


def _peak(
    settings: Finetune, module: nn.Module, losses: Losses, probe: Callable, device: torch.device, count: int
) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    # What a private step does with the most memory: backward, then clipping.
    gradients = GRADIENTS[settings.gradients](module, None)
    gradients.backward(losses, *probe(count))
    trained = trained_parameters(module)
    clip_and_sum_(torch.zeros(parameters(module), device=device, dtype=torch.float64), trained, 1.0)
    gradients.detach()
    return torch.cuda.max_memory_allocated(device) - before
