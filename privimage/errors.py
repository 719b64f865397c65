"""The exceptions of this package, the ways in which a run ends early, and the exit status of each."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


class PrivImageError(Exception):
    """Base class of all exceptions that this package raises on purpose; their text is for the user."""

    status = 1


class UserError(PrivImageError):
    """A mistake in the configuration or the input; the message is one line that names the key or the file.

    Exit status 2.
    """

    status = 2


class Mistakes(UserError):
    """Several mistakes at once, each told in a line of its own."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class Stopped(PrivImageError):
    """A stop was requested and the state is saved; running again goes on from there. Exit status 75."""

    status = 75


def status_of(error: BaseException) -> int:
    """The exit status of a run that ends with `error`; 1 for whatever was not foreseen."""
    return getattr(error, "status", 1)


def tell(message: str, status: int | None) -> None:
    """Tell why a run ends early, on standard error, and leave its status; None where starting again may help.

    Of several mistakes (status 2) each has a line of its own.
    """
    head = f"privimage: {'stopped' if status == Stopped.status else 'error'}: "
    # What was not foreseen has a traceback, which is told as it is.
    lines = message.splitlines() if status == UserError.status else [message]
    print("\n".join(head + line for line in lines), file=sys.stderr, flush=True)
    if status is not None:
        leave_status(status)


def leave_status(status: int) -> None:
    """Write a final exit status to the file named by PRIVIMAGE_STATUS_FILE, for launchers that end with one
    of their own.

    Ranks that vanish leave none: launchers start all ranks again then.
    """
    if name := os.environ.get("PRIVIMAGE_STATUS_FILE"):
        Path(name).write_text(f"{status}\n")


def settled() -> int | None:
    """The final status that these ranks have left already, where torchrun starts them again all the same."""
    name = os.environ.get("PRIVIMAGE_STATUS_FILE")
    if not name or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not Path(name).exists():
        return None
    status = Path(name).read_text().strip()
    return int(status) if status else None
