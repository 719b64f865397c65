"""Requests to stop: signals set a flag, the ranks agree on it, save the same step and end with status 75."""

import signal
from types import FrameType

import torch

from privimage.distributed.world import World
from privimage.telemetry.progress import say

SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR2,
    signal.SIGINT,
)  # SLURM's end of time and preemption; --signal=USR2; Ctrl-C


class StopFlag:
    """Whether this rank was asked to stop. Work that takes long looks at it at each step."""

    def __init__(self) -> None:
        self.requested, self.announced = False, False

    def install(self, announced: bool = True) -> None:
        """Let the signals set the flag, from now on in this process (main thread only).

        `announced`: print a line when one arrives.
        """
        self.requested, self.announced = False, announced
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the user insists
        if self.announced and not self.requested:
            say(f"{signal.Signals(number).name}: stopping at the end of this step; the state will be saved")
        self.requested = True

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks, which must call this together."""
        if world.size == 1:
            return self.requested
        return bool(world.all_reduce_(torch.tensor(float(self.requested), device=world.device)) > 0)


stop = StopFlag()
