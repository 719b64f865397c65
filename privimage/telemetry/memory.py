"""The memory of this process: what the C library keeps, and the peak of its use."""

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import torch


def keep_freed() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the kernel.

    Per-image gradients are large, and fresh pages cost time.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of `peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(
            AttributeError, OSError
        ):  # what was freed before and the C library keeps is not counted
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(
            OSError
        ):  # not allowed in some containers: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`: of the GPU, or resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def available() -> int:
    """Bytes that processes of this node may still take, within the limits of this process's control group."""
    # Every group from this process's own to the root may have a limit; containers see theirs as the root.
    left = (max(0, limit - used) for limit, used in _limits())
    return min([_in_kilobytes("meminfo", "MemAvailable"), *left])


def total() -> int:
    """Bytes of memory of this machine, within the limits of this process's control group."""
    return min([_in_kilobytes("meminfo", "MemTotal"), *(limit for limit, _ in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of memory of this process, and of the control groups (version 2) that it is in."""
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text().strip().split("::")[-1].lstrip("/")
    except OSError:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        yield soft, resident("VmData")
    for folder in (root / own, *(root / own).parents):
        if not folder.is_relative_to(root):
            return
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
            yield int((folder / "memory.max").read_text()), int((folder / "memory.current").read_text())


def resident(key: str = "VmRSS") -> int:
    """Bytes in main memory from /proc/self/status: `VmRSS` current, `VmHWM` peak."""
    return _in_kilobytes("self/status", key)


def _in_kilobytes(file: str, key: str) -> int:
    """Bytes that a line `key: number kB` of a file below /proc says."""
    lines = dict(line.split(":", 1) for line in (Path("/proc") / file).read_text().splitlines())
    return int(lines[key].split()[0]) * 1024
