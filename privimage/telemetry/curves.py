"""TensorBoard, continued in the same folder after a restart without double points."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from privimage import torchvision_operators

LINES = "scalars.jsonl"  # beside the event files: the same scalars, a line of JSON per step


class Curves:
    """Scalars and pictures of one stage that has done `step` steps.

    Does nothing on ranks other than the main one.

    Where the time of a step depends on sensitive data (`timed` false), points carry the number of their step
    in place of their time.
    """

    def __init__(self, folder: Path, stage: str, step: int, shown: bool, timed: bool = True):
        self.timed = timed
        # What a killed run wrote of later steps is replaced; the point of `step` itself is kept.
        self.writer = SummaryWriter(str(folder / stage), purge_step=step + 1) if shown else None
        self.lines: TextIO | None = _lines_up_to(folder / stage / LINES, step) if shown else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of several curves at `step`."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step, walltime=self._time(step))
        if self.lines:
            self.lines.write(json.dumps({"step": step, **values}) + "\n")

    def images(self, step: int, name: str, images: Tensor) -> None:
        """A grid of uint8 images (N, C, H, W)."""
        if self.writer:
            torchvision_operators.declare()
            from torchvision.utils import make_grid

            self.writer.add_image(
                name,
                make_grid(images.cpu(), nrow=max(1, round(len(images) ** 0.5)), pad_value=64),
                step,
                walltime=self._time(step),
            )

    def _time(self, step: int) -> float | None:
        return None if self.timed else float(step)

    def text(self, name: str, text: str) -> None:
        """A text, shown verbatim."""
        if self.writer:
            self.writer.add_text(name, f"```\n{text}\n```")

    def flush(self) -> None:
        """Write all points to the disk."""
        if self.writer:
            self.writer.flush()
        if self.lines:
            self.lines.flush()

    def close(self) -> None:
        """Finish the file."""
        if self.writer:
            self.writer.close()
        if self.lines:
            self.lines.close()


def _lines_up_to(path: Path, step: int) -> TextIO:
    """The file of JSON lines, open to be continued after `step`."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError):  # a line that a kill has cut off
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    file = path.open("w")
    file.writelines(kept)
    return file


def points(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a curve as written so far, without those that a restart replaced.

    Empty where there is none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return [], []
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it logs each restart
    # 0 means all points; by default it keeps a random sample of them.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Scalars(name) if name in events.Tags()["scalars"] else []
    return [event.step for event in scalars], [event.value for event in scalars]
