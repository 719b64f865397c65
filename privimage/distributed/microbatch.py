"""How many images go through a network at once: as many as there is memory for, the same on all ranks."""

import copy
from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.telemetry import memory

FEW = 8  # images by which memory is measured
OF_FREE = 0.6  # of the free memory; the rest is for gradients, optimizer states and fragmentation
SMALL = 64 * 64  # pixels of an image up to which blocks have their full size


def activations(
    forward: Callable[[int], Tensor], device: torch.device, precision: str, images: int = FEW
) -> float:
    """Bytes per image kept for the backward pass, by one of `images` images.

    `forward(n)` is one pass of n images on `device`, in `precision`, "fp32" or "bf16".
    """
    # Autograd's own list of what it keeps: exact for any network.
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.numel() * tensor.element_size())
        return tensor

    with (
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor),
    ):
        forward(images)
    return sum(held) / images


def fitting(wanted: int, forward: Callable[[int], Tensor], precision: str, world: World, what: str) -> int:
    """The number of images, at most `wanted`, whose forward and backward pass has room on every rank.

    `forward(n)` returns a loss of n images, of which nothing may be sensitive. From an estimate by a few
    images, then by trying: where the memory of a GPU runs out, half as many. All ranks call it together.
    Raises UserError that begins with `what` where there is no room for a single image.
    """
    # A CPU gives no error when memory runs out, the system ends the process: there the estimate decides.
    room = OF_FREE * _free(world)
    size = max(1, min(wanted, int(room / max(activations(forward, world.device, precision), 1.0))))
    if world.device.type == "cuda":
        size = _tried(size, forward, precision, world, what)
    return min(world.gather_objects(size))


def fitting_images(
    wanted: int,
    shape: tuple[int, ...],
    network: nn.Module,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    precision: str,
    world: World,
    what: str,
) -> int:
    """As `fitting`, by `loss(network, images, labels)` of blank images (n, *shape) in [-1, 1] of class 0.

    Tried on a copy of the network: in training mode a pass changes running statistics.
    """
    network = copy.deepcopy(network).train()

    def of_blank(count: int) -> Tensor:
        labels = torch.zeros(count, dtype=torch.int64, device=world.device)
        return loss(network, torch.zeros(count, *shape, device=world.device), labels)

    return fitting(wanted, of_blank, precision, world, what)


def _free(world: World) -> float:
    if world.device.type == "cuda":
        return float(torch.cuda.mem_get_info(world.device)[0])
    return memory.available() / world.local_size


def _tried(size: int, forward: Callable[[int], Tensor], precision: str, world: World, what: str) -> int:
    while True:
        try:
            with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = forward(size)
            loss.sum().backward()
            return size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if size == 1:
                raise UserError(f"{what}: not even one image has room in the memory of the GPU") from None
            size = -(-size // 2)


def pieces(count: int, size: int) -> Iterator[slice]:
    """`count` images in pieces of nearly equal length, at most `size` each."""
    parts = -(-count // size)
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


def block_size(shape: tuple[int, ...], most: int) -> int:
    """How many images of a shape (..., H, W) to compute at once where nothing is kept for a backward pass.

    `most` up to 64x64 pixels and fewer in proportion above, a multiple of 16. A function of the shape alone:
    rounding depends on it, so it must not change with the memory that happens to be free.
    """
    pixels = prod(shape[-2:])
    return most if pixels <= SMALL else max(16, most * SMALL // pixels // 16 * 16)
