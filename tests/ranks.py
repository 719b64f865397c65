"""Real processes as ranks: a Python script, or any command, started once a rank with torchrun's variables."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from privimage.distributed.launch import free_port

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "PRIVIMAGE_STATUS_FILE")


@dataclass
class Ended:
    """How one rank ended."""

    status: int
    out: str
    err: str


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher would set, one thread a process, the package importable."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = f"{Path(sys.executable).parent}:{env.get('PATH', '')}"
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "PATH": path} | more


def start_ranks(command: list[str], size: int, **env: str) -> list[subprocess.Popen]:
    """Start `command` once a rank on this machine; the caller waits with `wait_ranks`."""
    port = str(free_port())
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        full = clean_environment(**place, MASTER_PORT=port, **env)
        ranks.append(subprocess.Popen(command, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return ranks


def wait_ranks(ranks: list[subprocess.Popen], seconds: float = 120) -> list[Ended]:
    """Wait for all ranks; those that are still there after `seconds` are killed, and the test fails."""
    try:
        texts = [rank.communicate(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [Ended(rank.returncode, out, err) for rank, (out, err) in zip(ranks, texts, strict=True)]


def run_ranks(script: str, size: int, *arguments: str, seconds: float = 120, **env: str) -> list[Ended]:
    """Run a Python script (its text) on `size` ranks and return how each ended.

    The script usually begins with ``world = connect(Runtime(device="cpu"))`` and prints what the test looks at.
    """
    return wait_ranks(start_ranks([sys.executable, "-c", script, *arguments], size, **env), seconds)
