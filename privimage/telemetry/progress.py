"""Progress of a run: a bar on a terminal, plain lines elsewhere, and points in TensorBoard."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_SECONDS = 15.0  # between plain lines, without a terminal


def say(message: str) -> None:
    """One plain line for the user, on standard error."""
    console.print(message, markup=False)


class Progress:
    """Progress of long work, a context manager.

    ``with Progress("pretrain", total=steps, start=done) as bar: bar.advance(loss="0.31")``. `shown` is true
    on the main rank only. Values given to `advance` are shown beside the bar and in the lines.
    """

    def __init__(self, label: str, total: int, start: int = 0, shown: bool = True):
        self.label, self.total, self.done, self.shown = label, total, start, shown
        self.terminal = shown and sys.stderr.isatty()
        self.started, self.start, self.last_line = time.monotonic(), start, time.monotonic()

    def __enter__(self) -> "Progress":
        if self.terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[extra]}"),
            )
            self.bar = RichProgress(*columns, console=console)
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, completed=self.done, extra="")
        return self

    def __exit__(self, error_type, *_) -> None:
        if self.terminal:
            self.bar.stop()
        elif self.shown and error_type is None:
            say(f"{self.label}: {self.done}/{self.total} in {time.monotonic() - self.started:.0f} s")

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.start) / max(time.monotonic() - self.started, 1e-9)

    def advance(self, count: int = 1, **extra: str) -> None:
        """Count `count` more units as done."""
        self.done += count
        text = "  ".join(f"{name} {value}" for name, value in extra.items())
        if self.terminal:
            self.bar.update(self.task, completed=self.done, extra=text)
        elif self.shown and time.monotonic() - self.last_line >= LINE_SECONDS:
            self.last_line = time.monotonic()
            # Logs of jobs are read later: a line each quarter of a minute is enough.
            left = (self.total - self.done) / self.rate
            say(f"{self.label}: {self.done}/{self.total}  {left:.0f} s left  {text}".rstrip())
