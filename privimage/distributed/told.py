"""Files as the main rank sees them, on all ranks.

On network file systems the nodes do not see a change at the same moment: one may go on seeing "no such
file", or the file from before, for a minute. So where ranks must agree on what a file holds, the main rank
reads it and tells the others.
"""

import io
import time
from pathlib import Path

import numpy as np

from privimage.distributed.world import World
from privimage.errors import UserError

SEEN_SECONDS = 120.0  # how long a node may take to see a file that the main rank sees
POLL_SECONDS = 0.2


def content(path: Path, world: World) -> bytes | None:
    """The bytes of a file; None where there is none. All ranks call it together."""
    return world.broadcast_bytes(path.read_bytes() if world.is_main and path.exists() else None)


def arrays(path: Path, world: World) -> dict[str, np.ndarray]:
    """The arrays of an .npz, by name. All ranks call it together.

    Raises FileNotFoundError, or what NumPy raises for a damaged file.
    """
    data = content(path, world)
    if data is None:
        raise FileNotFoundError(path)
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def exists(path: Path, world: World) -> bool:
    """Whether the main rank sees a file. All ranks call it together."""
    return world.broadcast_object(path.exists() if world.is_main else None)


def wait_until_seen(path: Path, world: World) -> None:
    """Wait until this rank sees the file that the main rank sees: its size and time of modification agree.

    For files that are too large to be told. All ranks call it together. Raises UserError on a rank that does
    not come to see it.
    """
    wanted = world.broadcast_object(_state(path) if world.is_main else None)
    deadline = time.monotonic() + SEEN_SECONDS
    while _state(path) != wanted:
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: is not what the main rank sees there; it must be on a file system that all nodes "
                "share"
            )
        time.sleep(POLL_SECONDS)
        # Listing a folder makes network file systems look at the server again.
        if path.parent.is_dir():
            list(path.parent.iterdir())


def _state(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns
