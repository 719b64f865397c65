"""Which randomness a training may use after a restart, so that its promise holds whatever happened before.

An *attempt* is a stretch of private steps that is computed by one and the same arrangement (ranks, batch, software, device).
Started again with the same arrangement, an attempt repeats its steps to the bit, with the same samples and the same noise:
nothing new comes out, and its charges count once. With another arrangement, rounding could differ, and the difference of two
outputs with equal noise would show it: a new attempt then begins with fresh samples and fresh noise, every step of it is
charged, and as many steps fewer are made in the end as were charged but lost. The charges of all attempts are at most T.
"""

import platform
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from privimage.privacy.keys import RootKey
from privimage.rundir import read_json, write_json


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


def arranged(ranks: int, device: torch.device, root: RootKey) -> dict:
    """What may change the rounding of a computation, or its randomness: the arrangement of an attempt, to which stages add their own."""
    cuda = device.type == "cuda"
    return {
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "restart": secrets.token_hex(8) if cuda else "",  # sums on a GPU need not repeat to the bit: each start is an attempt of its own
        "torch": torch.__version__,
        "key": root.name,
    }


def kept_arrangement(path: Path) -> dict:
    """The arrangement of the newest attempt; empty before the first."""
    return read_json(path)["attempts"][-1]["arrangement"] if path.exists() else {}
