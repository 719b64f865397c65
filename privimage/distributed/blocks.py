"""Work on many images that the ranks share, with results that do not depend on how many ranks there are."""

from collections.abc import Callable

import torch
from torch import Tensor

from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped

BLOCK = 512


def in_blocks(count: int, width: int, dtype: torch.dtype, compute: Callable[[int, int], Tensor], world: World, stopped: str) -> Tensor:
    """`compute(start, stop)` gives (stop - start, width) for the images from start to stop; all of them (count, width), on every rank.

    Rank r takes every W-th block of 512, so that each image is computed beside the same others for any W. Raises Stopped with
    the message `stopped` when a stop was requested.
    """
    found = torch.zeros(count, width, dtype=dtype, device=world.device)
    for first in range(0, count, BLOCK * world.size):
        start = first + BLOCK * world.rank
        if start < count:
            found[start : start + BLOCK] = compute(start, min(start + BLOCK, count))
        if stop.agreed(world):
            raise Stopped(stopped)
    return world.all_reduce_(found)
