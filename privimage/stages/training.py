"""The loop of every training that sees no sensitive image: resume, step, curves, checkpoints, stop."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.privacy.account import Behind
from privimage.storage.rundir import RunDir
from privimage.telemetry import flops, memory
from privimage.telemetry.curves import Curves
from privimage.telemetry.profile import Window
from privimage.telemetry.progress import Progress


def weights_of(stage: str | None, run_dir: RunDir, world: World) -> tuple[dict[str, Any] | None, Behind]:
    """The weights that a stage of training has left to begin with, and the charges behind them; (None, {}) of
    no stage.

    Raises UserError for a stage that is not finished.
    """
    if stage is None:
        return None, {}
    run_dir.require(stage)
    weights = checkpoint.required(run_dir.stage(stage) / "weights.pt", stage, world)
    return weights, dict(weights["charges"])


@dataclass(frozen=True)
class Schedule:
    """How long a training goes on and how often it reports and saves."""

    steps: int
    images: int  # per step, over all ranks
    log_every: int
    checkpoint_every: int


class Trained(Protocol):
    """What is trained. All ranks call `scalars`, `state` and `load`; one rank calls `samples` alone."""

    def scalars(self) -> dict[str, float]:
        """Numbers for TensorBoard, of the steps since the last call."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def samples(self) -> Tensor | None:
        """A few images uint8 (N, C, H, W) for TensorBoard; None if it makes none."""


@dataclass(frozen=True)
class Watched:
    """What is shown of a training beside its own scalars."""

    text: str = ""  # shown beside the curves
    profile: tuple[int, int] | None = None  # the steps that are profiled, from the first to the last
    waited: Callable[[], float] = lambda: 0.0  # seconds that were spent on waiting for images
    operations: float = 0.0  # floating-point operations per image; 0: not known


def train(
    stage: str,
    schedule: Schedule,
    trained: Trained,
    steps: Callable[[int], Iterator[None]],
    run: RunDir,
    world: World,
    watched: Watched = Watched(),
) -> None:
    """Go on from the last checkpoint to the last step of the schedule.

    `steps(first)` is an iterator that takes one step each time it is advanced, beginning with the one after
    `first`. Raises Stopped when a stop was requested, with the state saved.
    """
    # Go on from the last checkpoint; curves drop points that a killed run has written beyond it.
    file, first = run.stage(stage) / "checkpoint.pt", 0
    if (state := checkpoint.load(file, world)) is not None:
        trained.load(state)
        first = state["step"]
    curves = Curves(run.tensorboard, stage, first, world.is_main)
    if watched.text:
        curves.text("configuration", watched.text)
    speed = _Speed(schedule, watched, world, first)
    profile = Window(run.tensorboard / stage / "profile", watched.profile if world.is_main else None)
    iterator, step = steps(first), first
    with Progress(stage, schedule.steps, first, world.is_main) as bar:
        for step in range(first + 1, schedule.steps + 1):
            profile.before(step)
            next(iterator)
            profile.after(step)
            bar.advance()
            last, wanted = step == schedule.steps, stop.agreed(world)
            # Scalars come before the checkpoint, which holds what they find: the best network so far.
            if step % schedule.log_every == 0 or last:
                shown = speed.since_last(step) | {"memory": memory.peak(world.device)}
                curves.scalars(step, shown | trained.scalars())
            # All ranks take part in collecting the state; the main rank writes it.
            if step % schedule.checkpoint_every == 0 or wanted or last:
                curves.flush()
                _save(file, trained, step, curves, world)
            # All ranks have agreed to stop, and the state is saved: end here, to be started again.
            if wanted and not last:
                break
    profile.close()
    curves.close()
    if step < schedule.steps:
        raise Stopped(f"{stage}: saved at step {step} of {schedule.steps}")


def _save(file: Path, trained: Trained, step: int, curves: Curves, world: World) -> None:
    """Write a checkpoint, and show samples of what it holds; all ranks call it together."""
    state = trained.state() | {"step": step}
    if world.is_main:
        checkpoint.save(file, state)
        if (samples := trained.samples()) is not None:
            curves.images(step, "samples", samples)


class _Speed:
    """Speed since the last look, over all ranks, and what it is spent on."""

    def __init__(self, schedule: Schedule, watched: Watched, world: World, first: int):
        self.schedule, self.watched = schedule, watched
        self.peak = (flops.peak(world.device) or 0.0) * world.size
        self.step, self.time, self.waited = first, time.monotonic(), watched.waited()

    def since_last(self, step: int) -> dict[str, float]:
        """Scalars for TensorBoard after a step."""
        now, waited = time.monotonic(), self.watched.waited()
        seconds = max(now - self.time, 1e-9)
        rate = (step - self.step) * self.schedule.images / seconds
        shown = {
            "images per second": rate,
            "share of time waiting for data": (waited - self.waited) / seconds,
        }
        if self.watched.operations:
            shown["TFLOP per second"] = rate * self.watched.operations / 1e12
            if self.peak:
                shown["share of peak"] = rate * self.watched.operations / self.peak
        self.step, self.time, self.waited = step, now, waited
        return shown
