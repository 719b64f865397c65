"""The ranks of a run: their device, their collectives, and how they end together."""

import contextlib
import gc
import itertools
import os
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from privimage.config.settings import Runtime
from privimage.distributed.failure import Watch
from privimage.distributed.launch import Place, find_place, free_port
from privimage.errors import UserError, status_of, tell
from privimage.telemetry import memory

CONNECT_MINUTES = (
    5.0  # how long a rank waits for the others to appear; nodes of one job start within seconds of each other
)
POLL_SECONDS = 0.05
PIECE_BYTES = 1 << 26  # of what is broadcast at once


@dataclass(frozen=True)
class World:
    """The ranks of a run, as seen by one of them. With `size` 1 there is no process group."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    cores: int = 1  # of the CPU, for this rank
    address: str = "127.0.0.1"
    port: int = 0
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """Whether this rank does what is done once per node."""
        return self.local_rank == 0

    @property
    def backend(self) -> str:
        """NCCL between GPUs, gloo between CPUs."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor of any shape, the same on all ranks, over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's picklable `value`, on every rank. Waits without a time-out."""
        if self.size == 1:
            return value
        self.barrier()
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_bytes(self, data: bytes | None) -> bytes | None:
        """The main rank's bytes, of any size, on every rank; None if it gives none."""
        if self.size == 1:
            return data
        size = self.broadcast_object(None if data is None else len(data))
        if size is None:
            return None
        whole = np.frombuffer(data, np.uint8) if self.is_main and data else np.empty(size, np.uint8)
        # In pieces, so that a GPU need not hold the whole.
        for start in range(0, size, PIECE_BYTES):
            piece = torch.from_numpy(whole[start : start + PIECE_BYTES].copy()).to(self.device)
            dist.broadcast(piece, src=0)
            if not self.is_main:
                whole[start : start + PIECE_BYTES] = piece.cpu().numpy()
        return whole.tobytes()

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable `value` of each rank, in order, on every rank. Waits without a time-out."""
        if self.size == 1:
            return [value]
        self.barrier()
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks as long as it takes: the main rank may be preparing data for hours.

        The time-out of collectives does not apply here. A rank that fails meanwhile ends the wait, through
        its `Watch`.
        """
        if self.store is None:
            return
        # A counter in the store instead of a collective, which would time out while the main rank works for
        # hours.
        key = f"barrier/{next(self._turns)}"
        arrived = self.store.add(key, 1)
        while arrived < self.size:
            time.sleep(POLL_SECONDS)
            arrived = self.store.add(key, 0)

    def variables(self) -> dict[str, str]:
        """This rank's place as torchrun would state it, for libraries that read the environment."""
        # Libraries take the local rank for the number of a GPU: that of this rank's, among those it sees.
        names = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank if self.device.index is None else self.device.index,
            "LOCAL_WORLD_SIZE": self.local_size,
        }
        return {name: str(value) for name, value in names.items()} | {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port or free_port()),
        }

    def fail(self, error: BaseException) -> int:
        """Tell the user why this rank ends early, in one line where `error` was foreseen, and end the other
        ranks too.

        Returns the exit status where this rank is alone. With several ranks only the first to fail prints;
        all end here, with its status.
        """
        # What was foreseen is told in one line; anything else with its traceback, for a bug report.
        status: int | None = status_of(error)
        message = str(error) if status != 1 else "".join(traceback.format_exception(error))
        if isinstance(error, KeyboardInterrupt):
            message = "interrupted"
        elif self.size > 1 and _is_lost_contact(error):
            cause = re.sub(r"^\[\S+\] ", "", str(error).split(". ")[0].splitlines()[0])
            message = (
                f"rank {self.rank} lost contact with the others ({cause}); start all ranks again to go "
                "on from the last checkpoint"
            )
            status = None
        if self.watch:
            self.watch.fail(message, status)
        tell(message, status)
        return status or 1

    def close(self) -> None:
        """Leave the process group together.

        Tensors are collected first, since gloo may abort at exit otherwise.
        """
        if self.watch:
            self.watch.close()
            with contextlib.suppress(
                RuntimeError
            ):  # the main rank, which serves the store, may be gone already
                self.barrier()
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()


def alone(device: torch.device, cores: int = 1) -> World:
    """The world of a process without a launcher, on a device."""
    return World(0, 0, 1, 1, device, cores)


ALONE = alone(torch.device("cpu"))


def connect(runtime: Runtime) -> World:
    """Find this rank's place, take a device, and join the process group.

    Raises UserError, in one line, for half-set variables, a device that is not there, or ranks that cannot
    connect.
    """
    place = find_place()
    device = _device(runtime, place)
    cores = _cores(place)
    torch.set_num_threads(runtime.threads or cores)
    if device.type == "cpu":
        memory.keep_freed()
    if place.size == 1:
        return alone(device, cores)
    # torch's rendezvous reads the address from the environment, whatever launcher has set it.
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    timeout = timedelta(minutes=runtime.timeout_minutes)
    patience = min(timeout, timedelta(minutes=CONNECT_MINUTES))
    try:
        meeting = dist.rendezvous("env://", place.rank, place.size, timeout=patience)
        store, *_ = next(meeting)
        watch = Watch(dist.PrefixStore("privimage/watch", store.clone()), place.rank, place.size)
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("privimage", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            # Another job of this node has the port. No final status: scripts start the ranks again, which
            # then derive another one.
            tell(f"{place.address}:{place.port} is in use; the ranks must be started again", None)
            raise SystemExit(1) from None
        raise UserError(
            f"{place.launcher}: rank {place.rank} of {place.size} could not connect to the others at "
            f"{place.address}:{place.port} ({first});"
            " check that all ranks started, that the name resolves and that the port is open"
        ) from None
    watch.start()
    shared = dist.PrefixStore("privimage/world", store)
    ranks = (place.rank, place.local_rank, place.size, place.local_size)
    return World(*ranks, device, cores, place.address, place.port, shared, watch)


def _device(runtime: Runtime, place: Place) -> torch.device:
    if runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("runtime.device: cuda was asked for, and torch sees no GPU")
    visible = torch.cuda.device_count()
    # A launcher may give each rank one visible GPU, or all GPUs of the node to all its
    # ranks.
    index = 0 if visible == 1 else place.local_rank
    if index >= visible:
        raise UserError(
            f"runtime.device: local rank {place.local_rank} has no GPU, {visible} are visible; start one "
            "rank per GPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _cores(place: Place) -> int:
    # SLURM says how many CPUs a task has; elsewhere the ranks of a node share those that this process may
    # use.
    given = os.environ.get("SLURM_CPUS_PER_TASK", "") if place.launcher == "SLURM" else ""
    return int(given) if given.isdigit() else max(1, len(os.sched_getaffinity(0)) // place.local_size)


def _is_lost_contact(error: BaseException) -> bool:
    # gloo raises plain RuntimeErrors; NCCL's and the store's have their own class.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
