"""Locks that hold on any file system, and that say who holds them.

Where the file system has flock(2) for all nodes, that is the lock: it ends with its process. Some have none
(Lustre by default), and some have one that other nodes do not see (NFS with `nolock`, Lustre with
`localflock`, FUSE). There the lock is a file that can be created once, beside the one that is locked. It says
who made it, and is touched again and again; it is taken over when its owner has died on this machine, when
the job of its owner has ended, or when it has not been touched for minutes.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

MISSING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # of flock where there is none
BEAT_SECONDS, DEAD_SECONDS = 15.0, 180.0  # between two touches of a lock file; without one it counts as left
POLL_SECONDS = 0.1
MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    machine: str  # of the host as long as it runs, and of the process ids that it can see
    pid: int
    started: str  # of the process, in the kernel's own unit
    job: str  # of SLURM, with the number of its restarts; empty without one

    @classmethod
    def myself(cls) -> Self:
        """This process."""
        job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), f"{job}.{restart}" if job else "")

    def __str__(self) -> str:
        job = f", job {self.job.split('.')[0]}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        if self.machine == _machine() and self.machine:
            return _started(self.pid) != self.started
        me = Owner.myself()
        job, restart = (self.job or ".").split(".")
        if job and me.job and me.job.split(".")[0] == job:
            return me.job.split(".")[1] != restart  # an earlier start of this very job
        return bool(job) and _job_has_ended(job)


class HeldError(Exception):
    """Another process holds the lock; the text says which, as far as it is known."""


class Lock:
    """The lock on a file, from its making to `close`; also a context manager."""

    def __init__(self, path: Path, handle: int, wait: bool):
        """Take the lock on the file at `path`, which is open as `handle` and stays the caller's.

        Raises HeldError where another process has it, unless `wait`; OSError where no lock can be made.
        """
        self.path, self.handle = path, handle
        self.beside = path.with_name(f".{path.name.lstrip('.')}.owner")
        self._closing = threading.Event()
        self._by_file = _is_local(path, MOUNTS)
        if not self._by_file:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise HeldError("") from None
            except OSError as error:
                if error.errno not in MISSING:
                    raise
                self._by_file = True
        if self._by_file:
            self._take(wait)
            threading.Thread(target=self._beat, daemon=True, name="privimage-lock").start()

    def _take(self, wait: bool) -> None:
        while not self._create():
            owner = _read(self.beside)
            if owner is None:
                continue  # given back just now
            if owner.is_gone or _silent(self.beside) > DEAD_SECONDS:
                self._take_over(owner)
            elif not wait:
                raise HeldError(str(owner))
            else:
                time.sleep(POLL_SECONDS)

    def _create(self) -> bool:
        """Make the lock file with its content at once: a link to a whole file is made once or not at all."""
        whole = self.beside.with_name(f"{self.beside.name}.{socket.gethostname()}.{os.getpid()}")
        with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(Owner.myself()), file)
        try:
            os.link(whole, self.beside)
            return True
        except FileExistsError:
            return False
        finally:
            whole.unlink()

    def _take_over(self, owner: Owner) -> None:
        """Remove the lock of an owner that is gone; of several processes that try, one does."""
        guard = self.beside.with_name(f"{self.beside.name}.taken")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            if _silent(guard) > DEAD_SECONDS:
                guard.unlink(missing_ok=True)
            time.sleep(POLL_SECONDS)
            return
        try:
            if _read(self.beside) == owner:  # nobody was faster
                told = f"{self.path}: taken over from {owner}, which has ended without giving it back"
                print(told, file=sys.stderr, flush=True)
                self.beside.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.beside)

    def close(self) -> None:
        """Give the lock back."""
        self._closing.set()
        if not self._by_file:
            fcntl.flock(self.handle, fcntl.LOCK_UN)
        elif _read(self.beside) == Owner.myself():
            self.beside.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: Path) -> Owner | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Owner(**content)
    except (OSError, ValueError, TypeError):
        return None


def _silent(path: Path) -> float:
    """Seconds since a file was touched, by the clock of its file system."""
    probe = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.now")
    try:
        probe.touch(mode=0o600)
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """This boot of this machine, and the process ids that are visible in it (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started; empty where there is none, or it has ended and waits for its parent."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _job_has_ended(job: str) -> bool:
    """Whether SLURM knows that a job no longer runs. False where it cannot be asked."""
    if shutil.which("squeue") is None:
        return False
    answer = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False, timeout=30
    )
    unknown = answer.returncode != 0 and "Invalid job id" in answer.stderr
    return unknown or (
        answer.returncode == 0 and answer.stdout.strip() not in ("RUNNING", "COMPLETING", "SUSPENDED")
    )


@lru_cache(maxsize=64)
def _is_local(path: Path, mounts: Path) -> bool:
    """Whether flock on a file holds on this machine only, although other machines may see the file.

    `mounts` lists the file systems of this machine.
    """
    best, kind, options = "", "", ""
    with contextlib.suppress(OSError):
        for line in mounts.read_text().splitlines():
            _, place, *rest = line.split()
            place = place.encode().decode("unicode_escape")
            if path.absolute().is_relative_to(place) and len(place) >= len(best):
                best, kind, options = place, rest[0], f",{rest[1]},"
    if kind == "lustre":
        return ",localflock," in options
    if kind in ("nfs", "nfs4"):
        return any(word in options for word in (",nolock,", ",local_lock=all,", ",local_lock=flock,"))
    return kind in ("beegfs", "fuse") or kind.startswith("fuse.")
