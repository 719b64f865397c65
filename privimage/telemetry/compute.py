"""Computing time of this process."""

import resource

import torch


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def gpu_seconds(seconds: float, device: torch.device, ranks: int) -> float:
    """Seconds that the GPUs of all ranks were held for; 0 on CPUs."""
    return seconds * ranks if device.type == "cuda" else 0.0
