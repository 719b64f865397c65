"""The loop of every training that sees no sensitive image: resume, step, curves, checkpoints, stop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.storage.rundir import RunDir
from privimage.telemetry import memory
from privimage.telemetry.curves import Curves
from privimage.telemetry.progress import Progress


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


def train(
    stage: str,
    schedule: Schedule,
    trained: Trained,
    steps: Callable[[int], Iterator[None]],
    run: RunDir,
    world: World,
    text: str = "",
) -> None:
    """Go on from the last checkpoint to the last step of the schedule.

    `steps(first)` is an iterator that takes one step each time it is advanced, beginning with the one after
    `first`. `text` is shown beside the curves. Raises Stopped when a stop was requested, with the state
    saved.
    """
    # Go on from the last checkpoint; curves drop points that a killed run has written beyond it.
    file, first = run.stage(stage) / "checkpoint.pt", 0
    if (state := checkpoint.load(file, world)) is not None:
        trained.load(state)
        first = state["step"]
    curves = Curves(run.tensorboard, stage, first, world.is_main)
    if text:
        curves.text("configuration", text)
    with Progress(stage, schedule.steps, first, world.is_main) as bar:
        for step, _ in zip(range(first + 1, schedule.steps + 1), steps(first), strict=False):
            bar.advance()
            last, wanted = step == schedule.steps, stop.agreed(world)
            # Figures come before the checkpoint, which holds what they find: the best network so far.
            if step % schedule.log_every == 0 or last:
                shown = {"images per second": bar.rate * schedule.images, "memory": memory.peak(world.device)}
                curves.scalars(step, shown | trained.scalars())
            # All ranks take part in collecting the state; the main rank writes it.
            if step % schedule.checkpoint_every == 0 or wanted or last:
                state = trained.state() | {"step": step}
                curves.flush()
                if world.is_main:
                    checkpoint.save(file, state)
                    if (samples := trained.samples()) is not None:
                        curves.images(step, "samples", samples)
            # All ranks have agreed to stop, and the state is saved: end here, to be started again.
            if wanted and not last:
                curves.close()
                raise Stopped(f"{stage}: saved at step {step} of {schedule.steps}")
    curves.close()
