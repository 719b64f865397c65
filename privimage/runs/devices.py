"""Whether the ranks have the devices that they need, and reach each other."""

import os
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from privimage.config import Config
from privimage.distributed.world import World

State = Literal["ok", "warning", "mistake"]
SENT_BYTES, TIMES = 1 << 26, 3  # of the trial all-reduce
LARGE = {"resnet50"}  # networks of the query that a CPU trains for weeks


@dataclass(frozen=True)
class Row:
    """What one check has found."""

    name: str
    state: State
    text: str


def devices(config: Config, world: World, stages: Collection[str]) -> Row:
    """Every rank has a GPU to itself, or none has one and `stages` need none.

    All ranks call it together.
    """
    if world.device.type == "cuda":
        name = str(getattr(torch.cuda.get_device_properties(world.device), "uuid", world.device.index))
    else:
        name = ""
    places = world.gather_objects((socket.gethostname(), name, torch.cuda.device_count()))
    if not name:
        return Row("device", *_without_gpu(config, world, stages))
    shared = sorted({place[:2] for place in places if places.count(place) > 1})
    if shared:
        told = f"several ranks on GPU {shared[0][1]} of {shared[0][0]}; start one rank per GPU"
        return Row("device", "mistake", told)
    idle = torch.cuda.device_count() - world.local_size
    if idle > 0 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return Row("device", "warning", f"{idle} of the node's GPUs have no rank; start one rank per GPU")
    kind, total = torch.cuda.get_device_name(world.device), torch.cuda.mem_get_info(world.device)[1]
    return Row("device", "ok", f"{world.size} ranks on {kind}, {total / 2**30:.0f} GiB each")


def _without_gpu(config: Config, world: World, stages: Collection[str]) -> tuple[State, str]:
    cores = f"{world.size} rank{'s' if world.size > 1 else ''} on the CPU, {world.cores} cores each"
    large = "query" in stages and config.query.network in LARGE
    if large and not in_job():
        return "warning", f"{cores}; no GPU here, and {config.query.network} needs one"
    if large:
        told = "trains for weeks on a CPU; ask for GPUs (slurm.gpus), or query.network=resnet-small"
        return "mistake", f"no GPU is visible in this job, and {config.query.network} {told}"
    return "ok", cores


def in_job() -> bool:
    """Whether this is a job of SLURM, not a machine that submits."""
    return "SLURM_JOB_ID" in os.environ


def connection(world: World) -> Row:
    """The ranks reach each other; the bandwidth of a sum over all of them."""
    tensor = torch.ones(SENT_BYTES // 4, device=world.device)
    world.all_reduce_(tensor)  # connections are made at the first one
    started = time.monotonic()
    for _ in range(TIMES):
        world.all_reduce_(tensor)
    total = float(tensor[0])
    seconds = (time.monotonic() - started) / TIMES
    if total != float(world.size) ** (TIMES + 1):
        return Row("connection", "mistake", "a sum over the ranks is wrong; check drivers and network cards")
    rate = 2 * (world.size - 1) / world.size * SENT_BYTES / seconds / 1e9
    return Row("connection", "ok", f"all-reduce of {SENT_BYTES >> 20} MiB: {rate:.2f} GB/s per rank")
