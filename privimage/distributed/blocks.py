"""Computation on many images that the ranks share.

The result for an image depends on no other image, and not on the number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from privimage.distributed.microbatch import block_size
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped

# A multiple of what kernels take at once (16 rows on the CPUs that were measured). Larger ones are hardly
# faster; smaller ones waste less on a short last block.
BLOCK = 128


def without_chance() -> AbstractContextManager:
    """A context in which GPU kernels are deterministic and do not use TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def filled(images: Tensor, size: int) -> Tensor:
    """Pad `images` (n, ...), 1 <= n <= size, to (size, ...) with copies of the last one.

    A library chooses its kernels, and so the rounding, by the number of images. With a constant number, the
    result for an image does not depend on the others. Callers drop the results of the copies.
    """
    if not 1 <= len(images) <= size:
        raise ValueError(f"{len(images)} images do not fill a block of {size}")
    return torch.cat([images, images[-1:].expand(size - len(images), *images.shape[1:])])


def blockwise(compute: Callable[..., Tensor], *tensors: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the slice of each block of `tensors` (n, ...) and `compute` of it, (size, ...) to (size, ...)."""
    for start in range(0, len(tensors[0]), size):
        parts = [tensor[start : start + size] for tensor in tensors]
        with without_chance():
            results = compute(*(filled(part, size) for part in parts))
        yield slice(start, start + len(parts[0])), results[: len(parts[0])]


def in_blocks(
    count: int,
    shape: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    read: Callable[[int, int], Tensor],
    compute: Callable[[Tensor], Tensor],
    world: World,
    stopped: str,
) -> Tensor:
    """What `compute` gives for `count` images of a shape (C, H, W), as (count, width) on every rank.

    `read(start, stop)` gives the images from start to stop (stop - start, C, H, W), and `compute` takes a
    block of them, always as many, to (block, width). Rank r takes every W-th block. Raises Stopped with the
    message `stopped` when a stop was requested.
    """
    # Every rank fills its own blocks; the others are zero, so that a sum puts them together.
    found = torch.zeros(count, width, dtype=dtype, device=world.device)
    size = block_size(shape, BLOCK)
    for first in range(0, count, size * world.size):
        start = first + size * world.rank
        if start < count:
            images = read(start, min(start + size, count)).to(world.device)
            for place, results in blockwise(compute, images, size=size):
                found[start + place.start : start + place.stop] = results
        # All ranks make the same number of turns, so that they can agree here.
        if stop.agreed(world):
            raise Stopped(stopped)
    return world.all_reduce_(found)


def made_in_turn(
    into: Sequence[Tensor],
    make: Callable[[Tensor], Sequence[Tensor]],
    size: int,
    world: World,
    stopped: str,
) -> None:
    """Fill tensors of zeros `into` (count, ...) with what `make` gives for blocks of at most `size` indices
    (B,), equal on all ranks, which take the blocks in turn.

    Raises Stopped with the message `stopped` when a stop was requested, between two blocks.
    """
    blocks = torch.arange(len(into[0]), device=world.device).split(size)
    # All ranks make the same number of turns, so that they can agree.
    for turn in range(0, len(blocks), world.size):
        if stop.agreed(world):
            raise Stopped(stopped)
        if turn + world.rank < len(blocks):
            block = blocks[turn + world.rank]
            for tensor, made in zip(into, make(block), strict=True):
                tensor[block] = made
    # Each block was made by one rank and is zero on all others: sums put them together.
    for tensor in into:
        world.all_reduce_(tensor)
