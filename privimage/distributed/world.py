"""Who am I: rank, size and device, from the variables of the launcher that started this process."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from privimage.config import Runtime
from privimage.errors import UserError


@dataclass(frozen=True)
class World:
    """The ranks of this run as one of them sees them. `size` 1 needs no launcher and no process group."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value):
        """The main rank's `value` (any picklable object), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group; tensors are collected first, since gloo may abort at exit otherwise."""
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()


def connect(runtime: Runtime) -> World:
    """Find out rank and size from torchrun's variables, take a device, and join the process group."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() if runtime.device == "auto" else runtime.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("runtime.device: cuda was asked for, and torch sees no GPU")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    torch.set_num_threads(runtime.threads or max(1, (os.cpu_count() or 1) // local_size))
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=runtime.timeout_minutes))
    return World(rank, local_rank, size, local_size, device)
