"""The curves of private steps: what may be shown, and what is for the owner of the data."""

import time
from dataclasses import replace

from privimage.config import Config
from privimage.distributed.world import World
from privimage.privacy.account import Account
from privimage.privacy.accounting import epsilon
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.optimizer import StepStatistics
from privimage.storage.rundir import RunDir
from privimage.telemetry.curves import Curves

FLUSH_SECONDS = 1.0  # between two writes of charges and curves


class PrivateCurves:
    """Public curves, which show what the plan alone determines, and private ones.

    Points wait in memory until `flush` has brought the charges of their steps to the disk.
    """

    def __init__(self, config: Config, run_dir: RunDir, world: World, account: Account, first: int):
        self.account, self.plan, self.learning_rate = (
            account,
            account.plan.the(DPSGD),
            config.finetune.learning_rate,
        )
        self.shown, self.flushed = world.is_main, time.monotonic()
        self.waiting: list[tuple[int, dict[str, float], dict[str, float]]] = []
        self.public = Curves(run_dir.tensorboard, "finetune", first, world.is_main, timed=False)
        self.private = Curves(run_dir.private / "tensorboard", "finetune", first, world.is_main)

    def add(self, step: int, scalars: dict[str, float], sensitive: StepStatistics, rate: float) -> None:
        """Points of all curves after a step.

        `scalars` are computed from the noised weights, `rate` is in steps per second.
        """
        # Epsilon is public at any step: it follows from the plan and the step alone. It is computed coarsely,
        # and only at a twentieth of the steps, since the accountant takes seconds.
        shown = scalars | {"learning rate": self.learning_rate}
        if (
            self.shown
            and self.account.private
            and (step % max(1, self.plan.steps // 20) == 0 or step == self.plan.steps)
        ):
            parts = [
                replace(part.composition, count=step) if part is self.plan else part.composition
                for part in self.account.plan.mechanisms
            ]
            shown["epsilon"] = epsilon(parts, self.account.plan.delta, self.account.plan.accountant, 1e-3)
        # What follows was computed on sensitive images without noise, and goes to private/ only.
        images = max(sensitive.images, 1)
        private = {
            "loss": sensitive.loss_sum / images,
            "clipped": sensitive.clipped / images,
            "non-finite": sensitive.non_finite,
            "images": sensitive.images,
            "mean norm": sensitive.norm_sum / images,
            "images per second": rate * self.plan.logical_batch_size,
        }
        self.waiting.append((step, shown, private))

    @property
    def due(self) -> bool:
        """Whether the last points were written some time ago: one write covers many fast steps."""
        return time.monotonic() - self.flushed >= FLUSH_SECONDS

    def flush(self) -> None:
        """Bring first the charges, then all points to the disk."""
        self.account.settle()
        for step, shown, private in self.waiting:
            self.public.scalars(step, shown)
            self.private.scalars(step, private)
        self.waiting, self.flushed = [], time.monotonic()
        self.public.flush()
        self.private.flush()

    def close(self) -> None:
        """Finish the files."""
        self.flush()
        self.public.close()
        self.private.close()
