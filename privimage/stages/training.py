"""The loop of every training that sees no sensitive image.

Resume, step, curves, checkpoints, and a stop that loses nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from privimage.config.settings import Match, Pretrain
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.storage.rundir import RunDir
from privimage.telemetry import memory
from privimage.telemetry.curves import Curves
from privimage.telemetry.progress import Progress


class Trained(Protocol):
    """What is trained. All ranks call `losses`, `state` and `load`; one rank calls `samples` alone."""

    def losses(self) -> dict[str, float]:
        """Figures for TensorBoard."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def samples(self) -> Tensor:
        """A few images uint8 (N, C, H, W)."""


def train(
    stage: str,
    settings: Pretrain | Match,
    images: int,
    trained: Trained,
    steps: Callable[[int], Iterator[None]],
    run: RunDir,
    world: World,
    text: str = "",
) -> None:
    """Take `settings.steps` steps of `images` images over all ranks, from the last checkpoint on.

    `steps(first)` takes one step each time that it is asked for the next, the first being number `first`.
    `text` is shown beside the curves. Raises Stopped when a stop was requested, with the state saved.
    """
    file, first = run.stage(stage) / "checkpoint.pt", 0
    if (state := checkpoint.load(file, world.device)) is not None:
        trained.load(state)
        first = state["step"]
    step, curves = first, Curves(run.tensorboard, stage, first, world.is_main)
    if text:
        curves.text("configuration", text)
    with Progress(stage, settings.steps, first, world.is_main) as bar:
        for step, _ in zip(range(first + 1, settings.steps + 1), steps(first), strict=False):
            bar.advance()
            wanted = stop.agreed(world)
            if step % settings.log_every == 0:
                shown = {
                    "images per second": bar.rate * images,
                    "memory": memory.peak(world.device),
                    "learning rate": settings.learning_rate,
                }
                curves.scalars(step, trained.losses() | shown)
            if step % settings.checkpoint_every == 0 or wanted:
                state = trained.state() | {"step": step}
                curves.flush()
                if world.is_main:
                    checkpoint.save(file, state)
                    curves.images(step, "samples", trained.samples())
            if wanted and step < settings.steps:
                curves.close()
                raise Stopped(f"{stage}: saved at step {step} of {settings.steps}")
    if world.is_main:
        curves.images(step, "samples", trained.samples())
    curves.close()
