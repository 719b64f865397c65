"""The launchers on real processes: the results of all of them agree, and each passes on how the ranks end."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import REPOSITORY, SMALL, TINY, clean_environment, wait_until

from privimage.distributed import checkpoint
from privimage.storage.files import read_json


class Running:
    """`launchers/NAME.sh run` on some ranks, its output in a file."""

    def __init__(self, name: str, folder: Path, ranks: int, **env: str):
        self.log = folder.parent / f"{name}.log"
        command = [
            str(REPOSITORY / "launchers" / f"{name}.sh"),
            "run",
            str(TINY),
            f"run.dir={folder}",
            *SMALL,
        ]
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                env=clean_environment(RANKS=str(ranks), **env),
                stdout=file,
                stderr=file,
                cwd=folder.parent,
            )

    def wait(self, seconds: float = 240) -> tuple[int, str]:
        """Exit status and output."""
        try:
            return self.process.wait(seconds), self.log.read_text()
        finally:
            self.process.kill()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something that the run does."""
        wait_until(condition, seconds, lambda: self.process.poll() is None, self.log.read_text)


def results(folder: Path) -> dict[str, torch.Tensor]:
    """What must not depend on the launcher: the weights of both trainings and the synthetic images."""
    found = {"images": torch.from_numpy(np.load(folder / "release" / "synthetic.npz")["images"])}
    for stage in ("pretrain", "finetune"):
        state = checkpoint.load(folder / stage / "weights.pt")
        assert state is not None
        found |= {f"{stage} {name}": value for name, value in state["ema"].items()}
    return found


def assert_identical(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    for name, value in results(folder).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture(scope="module")
def undisturbed(selected: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Results of two ranks under torchrun."""
    folder = tmp_path_factory.mktemp("undisturbed") / "copy" / "run"
    shutil.copytree(selected.parent, folder.parent)
    status, output = Running("torchrun", folder, 2).wait()
    assert status == 0, output
    assert read_json(folder / "finetune" / "done.json")["ranks"] == 2
    return results(folder)


def test_a_run_killed_and_stopped_under_each_launcher_ends_with_the_same_results(
    a_copy: Callable[[str], Path], undisturbed: dict
):
    folder = a_copy("disturbed")
    saved = folder / "finetune" / "checkpoint.pt"

    def another_step(running: Running) -> None:
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        running.wait_until(lambda: saved.exists() and saved.stat().st_mtime_ns > before)

    for name, number in (
        ("torchrun", signal.SIGUSR2),
        ("deepspeed", signal.SIGTERM),
        ("mpirun", signal.SIGTERM),
    ):
        running = Running(name, folder, 2)
        another_step(running)
        if name == "torchrun":  # which starts the ranks again
            os.kill(rank_of(folder), signal.SIGKILL)
            another_step(running)
        running.process.send_signal(number)
        status, output = running.wait()
        assert status == 75, output
        assert "privimage: stopped: finetune: saved at step" in output
        assert not (folder / "release").exists()
    status, output = Running("deepspeed", folder, 2).wait()
    assert status == 0, output
    assert_identical(folder, undisturbed)


def rank_of(folder: Path, rank: int = 1) -> int:
    """The process id of one rank of the run in `folder`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environ = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            f"run.dir={folder}".encode() in words
            and f"RANK={rank}".encode() in environ
            and words[1].endswith(b"bin/privimage")
        ):
            return int(path.name)
    raise AssertionError(f"no rank {rank} of {folder} is running")


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "mpirun"])
def test_a_mistake_ends_with_status_2_and_one_line(name: str, a_copy: Callable[[str], Path]):
    folder = a_copy(name)
    (folder / "prepare" / "done.json").write_text("{")
    status, output = Running(name, folder, 2, RESTARTS="1").wait()
    assert status == 2, output
    assert re.findall("privimage: error: .*", output) == [
        f"privimage: error: {folder / 'prepare' / 'done.json'}: damaged, not readable as JSON"
    ]


def test_a_launcher_without_a_configuration_says_how_it_is_used():
    answer = subprocess.run(
        [REPOSITORY / "launchers" / "torchrun.sh", "run", "nothing.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert "nothing.yaml: no such configuration file" in answer.stderr
    assert "NODE_RANK" in answer.stderr


def test_several_nodes_need_a_master():
    answer = subprocess.run(
        [REPOSITORY / "launchers" / "torchrun.sh", "run", str(TINY)],
        env=clean_environment(NODES="2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "MASTER_ADDR" in answer.stderr
