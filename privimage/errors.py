"""The three ways in which a run ends early, each with its exit status."""

import os
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake in the configuration or the input, told in one line that names the key or the file (exit status 2)."""

    status = 2


class Stopped(Exception):
    """A stop was requested and the state is saved; running again goes on from there (exit status 75)."""

    status = 75


def status_of(error: BaseException) -> int:
    """The exit status of a run that ends with `error`; 1 for whatever was not foreseen."""
    return getattr(error, "status", 1)


def tell(status: int, message: str) -> None:
    """Tell why a run ends early, on standard error; `leave_status` goes with it."""
    print(f"privimage: {'stopped' if status == Stopped.status else 'error'}: {message}", file=sys.stderr, flush=True)
    leave_status(status)


def leave_status(status: int) -> None:
    """Write the exit status to the file named by PRIVIMAGE_STATUS_FILE, for launchers that pass on a status of their own."""
    if name := os.environ.get("PRIVIMAGE_STATUS_FILE"):
        Path(name).write_text(f"{status}\n")


def settled() -> int | None:
    """The status that these ranks ended with already, where torchrun starts them again and that cannot help: 2 and 75."""
    name = os.environ.get("PRIVIMAGE_STATUS_FILE")
    if not name or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not Path(name).exists():
        return None
    status = Path(name).read_text().strip()
    return int(status) if status in (str(UserError.status), str(Stopped.status)) else None
