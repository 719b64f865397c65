"""Which randomness a training may use after a restart, so that its promise holds whatever happened before.

An *attempt* is a stretch of private steps that is computed by one and the same arrangement (ranks, batch, settings, inputs, software, device).
Started again with the same arrangement, an attempt repeats its steps to the bit, with the same samples and the same noise:
nothing new comes out, and its charges count once. With another arrangement, rounding could differ, and the difference of two
outputs with equal noise would show it: a new attempt then begins with fresh samples and fresh noise, every step of it is
charged, and as many steps fewer are made in the end as were charged but lost. The charges of all attempts are at most T.
"""

import hashlib
import json
import platform
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from privimage.privacy.keys import RootKey
from privimage.privacy.optimizer import Ranks
from privimage.rundir import read_json, write_json

PROCESSOR = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Attempt:
    """Private steps `first` to `last` (exclusive) of one arrangement."""

    number: int
    first: int
    last: int
    arrangement: dict


def resume_attempt(path: Path, arrangement: dict, step: int, steps: int, charged_elsewhere: Callable[[int], int]) -> Attempt:
    """The attempt to go on with from a checkpoint at `step` of the planned `steps`.

    `charged_elsewhere(number)` is how many private steps the ledger holds that do not belong to attempt `number`. The attempts
    of a run are a list in the file `path`, the newest last; a new one is written there before anything is drawn.
    """
    kept = read_json(path)["attempts"] if path.exists() else []
    same = bool(kept) and kept[-1]["arrangement"] == arrangement and kept[-1]["first"] <= step
    number = len(kept) - 1 if same else len(kept)
    first = kept[-1]["first"] if same else step
    before = charged_elsewhere(number)
    attempt = Attempt(number, first, first + max(0, steps - before), arrangement)
    write_json(path, {"attempts": [*kept[:number], vars(attempt)]})
    return attempt


def arranged(world: Ranks, root: RootKey, settings: dict, inputs: Iterable[Path]) -> dict:
    """What may change the rounding of a computation, or its randomness: the arrangement of an attempt, to which stages add their own.

    `settings` are those that the computation reads, `inputs` the files of earlier stages that it starts from. All ranks call
    this together; the answer of the main rank counts.
    """
    return {
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "processors": _of_all_ranks(world, _processor(world.device)),
        "restart": secrets.token_hex(8) if world.device.type == "cuda" else "",  # sums on a GPU need not repeat to the bit: each start is an attempt
        "software": _software(),
        "settings": _digest(json.dumps(settings, sort_keys=True).encode()),
        "inputs": [_digest(path.read_bytes()) for path in inputs],
        "key": root.name,
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _processor(device: torch.device) -> str:
    """The kind of GPU, or of CPU with its instructions: libraries choose their kernels by them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = PROCESSOR.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.platform()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _of_all_ranks(world: Ranks, name: str) -> list[int]:
    numbers = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    numbers[world.rank] = int(_digest(name.encode())[:12], 16)
    return world.all_reduce_(numbers).tolist()


@cache
def _software() -> str:
    """A digest of this package's own source and of the versions of those that compute, draw or clip for it."""
    package = Path(__file__).parents[1]
    sources = [path.read_bytes() for path in sorted(package.rglob("*.py"))]
    versions = [f"{name} {metadata.version(name)}".encode() for name in ("torch", "opacus", "numpy", "randomgen")]
    return _digest(platform.python_version().encode(), *versions, *sources)


def kept_arrangement(path: Path) -> dict:
    """The arrangement of the newest attempt; empty before the first."""
    return read_json(path)["attempts"][-1]["arrangement"] if path.exists() else {}
