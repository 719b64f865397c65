"""Nobody but the owner reads what a run leaves.

Modes of files and folders, core dumps, and what a release is opened to.
"""

import ctypes
import os
import resource
import stat
from collections.abc import Iterable
from pathlib import Path

from privimage.errors import UserError

OTHERS = stat.S_IRWXG | stat.S_IRWXO
PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def close_process() -> None:
    """From here on this process and its children write files of mode 0600, and leave no core.

    It would hold images and the key.

    A limit of 1 byte keeps the kernel from writing a core file and, other than 0, from piping one to a crash
    handler (core(5)). Where the limit may not be raised to it, the process is made not dumpable.
    """
    # Inherited by all children, such as workers that decode images.
    os.umask(OTHERS)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def folder(path: Path, owner: int | None = None) -> Path:
    """Make a folder of mode 0700 where there is none; restrict the one that is there.

    `owner` is one more user whose folder it may be beside this process's. Raises UserError for a symbolic
    link, a folder of another user, or a file system that keeps no modes.
    """
    if path.is_symlink():
        raise UserError(f"{path}: a symbolic link, behind which anybody may read; put the folder itself here")
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from None
    restrict(path, owner)
    return path


def restrict(path: Path, owner: int | None = None) -> None:
    """Take all rights on a file or folder from all but its owner. Raises UserError where that cannot be done.

    See `folder`.
    """
    # lstat, not stat: a link would let its target be read under another name.
    status = path.lstat()
    if status.st_uid not in (os.geteuid(), owner):
        raise UserError(
            f"{path}: belongs to another user (id {status.st_uid}), who could read what is written there"
        )
    if not status.st_mode & OTHERS:
        return
    try:
        # Only rights of others are taken; the owner's own stay as they are.
        path.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS)
    except OSError as error:
        raise UserError(
            f"{path}: may be read by others, and that cannot be changed ({error.strerror})"
        ) from None
    if path.lstat().st_mode & OTHERS:
        raise UserError(
            f"{path}: may be read by others; its file system keeps no modes, choose a folder on another one"
        )


def restrict_all(places: Iterable[Path], owner: int | None = None) -> None:
    """`restrict` files, and folders with all that is below them.

    Raises UserError for a symbolic link there too.
    """
    for place in places:
        # Links are not followed: what they lead to is reported, not changed.
        below = [place, *place.rglob("*")] if place.is_dir() and not place.is_symlink() else [place]
        for path in below:
            if path.is_symlink():
                raise UserError(
                    f"{path}: a symbolic link, behind which anybody may read; put what it leads to here"
                )
            if path.exists():
                restrict(path, owner)


def open_to_all(path: Path) -> None:
    """Let everybody read a folder and all that is in it, whatever the umask: a release."""
    # Explicit modes: the umask of this process is closed.
    for entry in (path, *path.rglob("*")):
        entry.chmod(0o755 if entry.is_dir() else 0o644)
