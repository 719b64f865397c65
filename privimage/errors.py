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
    """Several mistakes at once, one line each."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class Stopped(PrivImageError):
    """A stop was requested and the state is saved; running again goes on from there. Exit status 75."""

    status = 75


def status_of(error: BaseException) -> int:
    """The exit status of a run that ends with `error`; 1 for an unexpected error."""
    return getattr(error, "status", 1)


def tell(message: str, status: int | None) -> None:
    """Print why a run ends early to standard error, and leave its status; None if a restart may help.

    Several mistakes (status 2) are printed one per line.
    """
    head = f"privimage: {'stopped' if status == Stopped.status else 'error'}: "
    # An unexpected error is printed with its traceback, as it is.
    lines = message.splitlines() if status == UserError.status else [message]
    print("\n".join(head + line for line in lines), file=sys.stderr, flush=True)
    if status is not None:
        leave_status(status)


def leave_status(status: int) -> None:
    """Write the final exit status to the file named by PRIVIMAGE_STATUS_FILE, for launchers that return
    another one.

    Ranks that are killed write none: launchers then restart all ranks.
    """
    if name := os.environ.get("PRIVIMAGE_STATUS_FILE"):
        Path(name).write_text(f"{status}\n")


def earlier_status() -> int | None:
    """The final status that these ranks left before torchrun restarted them; None if there is none."""
    name = os.environ.get("PRIVIMAGE_STATUS_FILE")
    if not name or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not Path(name).exists():
        return None
    status = Path(name).read_text().strip()
    return int(status) if status else None
