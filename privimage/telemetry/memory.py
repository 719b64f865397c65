"""The memory of this process: what the C library keeps, and the peak of its use."""

import contextlib
import ctypes
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


def resident(key: str = "VmRSS") -> int:
    """Bytes in main memory from /proc/self/status: `VmRSS` current, `VmHWM` peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024
