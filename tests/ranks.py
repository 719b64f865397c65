"""Real processes as ranks: a Python script started once a rank, with torchrun's variables.

The processes are forked from a server that has torch and privimage loaded, which makes a rank start in no
time; so is the command (`privimage`). Launchers and other commands are started as they are, by `subprocess`
with `clean_environment`.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from privimage.distributed.launch import free_port
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.ledger import read
from privimage.storage.files import read_json

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "tests" / "tiny.yaml"
# Few steps, and fixed noise, so that results can be compared.
SMALL = (
    "pretrain.steps=8",
    "pretrain.checkpoint_every=4",
    "finetune.steps=20",
    "finetune.checkpoint_every=1",
    "synthesize.samples=20",
    "privacy.insecure_fixed_key=7",
)
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PRIVIMAGE_STATUS_FILE",
)

# The script that is the command `privimage`.
COMMAND = "import sys; sys.argv[0] = 'privimage'; from privimage.cli import main; main()"

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "privimage.distributed.world",
        "privimage.privacy.optimizer",
        "privimage.privacy.gradients",
        # What the stages of a run load, some of it when they first train.
        "torch._dynamo",
        "privimage.runs.pipeline",
        "privimage.stages.evaluate",
        "privimage.commands.plan",
        "sklearn.linear_model",
        "sklearn.neural_network",
        "tensorboard.compat.proto.event_pb2",
    ]
)


@dataclass
class Ended:
    """How one rank ended."""

    status: int
    out: str
    err: str


class Rank:
    """One running rank; its output goes to files."""

    def __init__(self, process: BaseProcess, folder: Path):
        self.process, self.folder = process, folder

    @property
    def pid(self) -> int:
        """The process id."""
        assert self.process.pid is not None
        return self.process.pid

    def wait_until_it_says(self, text: str, seconds: float = 60) -> None:
        """Wait until `text` is in the rank's output."""
        self.wait_until(lambda: text in (self.folder / "out").read_text(), seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for something that the rank does."""
        wait_until(condition, seconds, self.process.is_alive, lambda: (self.folder / "err").read_text())


def wait_until(
    condition: Callable[[], Any],
    seconds: float,
    alive: Callable[[], bool] = lambda: True,
    said: Callable[[], str] = str,
) -> Any:
    """What `condition` answers once that is true. AssertionError with what `said` answers after `seconds`, or
    once what is waited for is not `alive`.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert alive() and time.monotonic() < deadline, said()
        time.sleep(0.02)
    return found


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher would set, one thread a process, the package and its
    commands at hand.
    """
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile the package anew
    path = f"{Path(sys.executable).parent}:{env.get('PATH', '')}"
    return (
        env
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "PATH": path}
        | more
    )


def privimage(
    *arguments: str | Path, seconds: float = 900, umask: int = 0o022
) -> subprocess.CompletedProcess:
    """The command `privimage` with its arguments, in a process of its own, and how it ended.

    What it loads is there already: otherwise that would be half the time of many tests.
    """
    words = tuple(map(str, arguments))
    (ended,) = wait_ranks([_start(COMMAND, words, clean_environment(), umask)], seconds)
    return subprocess.CompletedProcess(["privimage", *words], ended.status, ended.out, ended.err)


def run_stages(folder: Path, stages: Iterable[str], *overrides: str) -> None:
    """Run stages of the tiny configuration in `folder` through the command; all must succeed."""
    for stage in stages:
        done = privimage(stage, TINY, f"run.dir={folder}", *overrides)
        assert done.returncode == 0, done.stderr


def charges(folder: Path) -> tuple[SampledGaussian, ...]:
    """What the run in `folder` was charged for, from its ledger."""
    account = read_json(folder / "private" / "account.json")
    return read(Path(account["ledger"]["path"])).mechanisms(account["run"])


def _be_a_rank(
    script: str, arguments: tuple[str, ...], env: dict[str, str], folder: Path, cwd: Path, umask: int | None
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if umask is not None:
        os.umask(umask)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "rank", "exec"), {"__name__": "__main__"})


def _start(script: str, arguments: tuple[str, ...], env: dict[str, str], umask: int | None = None) -> Rank:
    """A Python script (its text) in a process of its own, where this one is."""
    folder = Path(tempfile.mkdtemp(prefix="rank"))
    for name in ("out", "err"):
        (folder / name).touch()
    process = server.Process(target=_be_a_rank, args=(script, arguments, env, folder, Path.cwd(), umask))
    process.start()
    return Rank(process, folder)


def start_ranks(script: str, size: int, *arguments: str, **env: str) -> list[Rank]:
    """Start a Python script (its text) once a rank on this machine; the caller waits with `wait_ranks`."""
    port, ranks = str(free_port()), []
    for rank in range(size):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
        }
        ranks.append(_start(script, arguments, clean_environment(**place, MASTER_PORT=port, **env)))
    return ranks


def wait_ranks(ranks: list[Rank], seconds: float = 120) -> list[Ended]:
    """Wait for all ranks; those that are still there after `seconds` are killed, and the test fails."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    late = [number for number, rank in enumerate(ranks) if rank.process.is_alive()]
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
    ended = [
        Ended(
            rank.process.exitcode or 0, (rank.folder / "out").read_text(), (rank.folder / "err").read_text()
        )
        for rank in ranks
    ]
    for rank in ranks:
        shutil.rmtree(rank.folder)
    assert not late, f"ranks {late} did not end within {seconds} s: {ended}"
    return ended


def run_ranks(script: str, size: int, *arguments: str, seconds: float = 120, **env: str) -> list[Ended]:
    """Run a Python script (its text) on `size` ranks and return how each ended.

    The script usually begins with ``world = connect(Runtime(device="cpu"))`` and prints what the test looks
    at.
    """
    return wait_ranks(start_ranks(script, size, *arguments, **env), seconds)
