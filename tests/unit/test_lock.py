"""A run directory has one run and a ledger one writer, also where flock is missing or holds on one node."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import clean_environment, wait_until

from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.ledger import Ledger
from privimage.storage import lock
from privimage.storage.lock import Owner
from privimage.storage.rundir import RunDir

WITHOUT_FLOCK = """
#include <errno.h>
int flock(int fd, int operation) { errno = ENOSYS; return -1; }
"""
HOLDER = """
import sys
from pathlib import Path
from privimage.storage.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""
TRIER = """
import sys
from pathlib import Path
from privimage.errors import UserError
from privimage.storage.rundir import RunDir
try:
    with RunDir(Path(sys.argv[1])).lock():
        print("held")
except UserError as error:
    print(error)
"""
CHARGES = """
import sys
from pathlib import Path
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.ledger import Ledger
for number in range(30):
    name = f"{sys.argv[2]}-{number}"
    assert Ledger(Path(sys.argv[1]), "f" * 64).charge(sys.argv[2], "a", SampledGaussian(1.0), name, 1000)
"""


@pytest.fixture(scope="module")
def no_flock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in whose processes flock is answered as by a file system that has none."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(WITHOUT_FLOCK)
    try:
        command = ["gcc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"]
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs gcc, for a C library without flock")
    return clean_environment(LD_PRELOAD=str(folder / "shim.so"))


def python(script: str, *arguments: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env=env, **pipes)  # type: ignore[call-overload]


@pytest.fixture
def holder(tmp_path: Path, no_flock: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A process without flock that holds the run directory."""
    process = python(HOLDER, str(tmp_path / "run"), env=no_flock)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def tried(path: Path, env: dict[str, str]) -> tuple[str, str]:
    """What a second run says, on standard output and error."""
    return python(TRIER, str(path), env=env).communicate(timeout=60)


def test_without_flock_two_runs_exclude_each_other_and_say_who_holds(
    tmp_path: Path, no_flock: dict[str, str], holder: "subprocess.Popen[str]"
) -> None:
    said, _ = tried(tmp_path / "run", no_flock)
    assert f"another run is using this directory (process {holder.pid} on " in said
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait()
    assert not list((tmp_path / "run").glob("*.owner*"))
    assert tried(tmp_path / "run", no_flock) == ("held\n", "")


def test_without_flock_the_lock_of_a_killed_run_is_taken_over_with_a_line(
    tmp_path: Path, no_flock: dict[str, str], holder: "subprocess.Popen[str]"
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said, told = tried(tmp_path / "run", no_flock)
    assert said == "held\n" and f"taken over from process {holder.pid} on" in told.replace("\n", " ")
    assert not list((tmp_path / "run").glob(".lock.owner*"))


def test_without_flock_charges_of_two_processes_are_all_in_the_ledger(
    tmp_path: Path, no_flock: dict[str, str]
) -> None:
    writers = [python(CHARGES, str(tmp_path / "ledgers"), name, env=no_flock) for name in ("x", "y", "z")]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    spent = Ledger(tmp_path / "ledgers", "f" * 64).spent
    assert len(spent.charges) == 90 and spent.torn == 0


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file system whose flock other nodes do not see."""
    (tmp_path / "mounts").write_text(f"x / ext4 rw 0 0\nx {tmp_path} lustre rw,localflock,user_xattr 0 0\n")
    monkeypatch.setattr(lock, "MOUNTS", tmp_path / "mounts")


def hold_by(path: Path, **changed: str | int) -> Path:
    """A lock file that this process, but for what is `changed`, has made."""
    path.mkdir()
    owner = dataclasses.replace(Owner.myself(), **changed)  # type: ignore[arg-type]
    (path / ".lock.owner").write_text(json.dumps(dataclasses.asdict(owner)))
    return path


@pytest.mark.parametrize(
    ("changed", "gone"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),
        ({"started": "1"}, True),  # another process with the number of one that has ended
        ({"machine": "elsewhere", "pid": 2**22 + 1}, False),
        ({"machine": "elsewhere", "job": "77.0"}, True),  # an earlier start of this job
        ({"machine": "elsewhere", "job": "77.1"}, False),
        ({"machine": "elsewhere", "job": "78.0"}, True),
        ({"machine": "elsewhere", "job": "79.0"}, False),
    ],
)
def test_who_is_gone(
    tmp_path: Path, local: None, monkeypatch: pytest.MonkeyPatch, changed: dict, gone: bool
) -> None:
    """squeue answers as it does for a job that is over (78) and for one that runs (79)."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    answers = (
        "#!/bin/sh",
        '[ "$3" = 79 ] && echo RUNNING && exit 0',
        'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
    )
    (tmp_path / "squeue").write_text("\n".join(answers))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = RunDir(hold_by(tmp_path / "run", **changed))
    if gone:
        with run.lock():
            assert json.loads((run.path / ".lock.owner").read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match="another run is using this directory"), run.lock():
            pass


def test_an_owner_that_is_silent_for_minutes_is_gone(tmp_path: Path, local: None) -> None:
    run = RunDir(hold_by(tmp_path / "run", machine="elsewhere"))
    os.utime(run.path / ".lock.owner", (1, 1))
    with run.lock():
        pass


def test_a_lock_is_touched_while_it_is_held(
    tmp_path: Path, local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    run = RunDir(tmp_path / "run")
    with run.lock():
        os.utime(run.path / ".lock.owner", (1, 1))
        wait_until(lambda: (run.path / ".lock.owner").stat().st_mtime != 1, 30)


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        ("x / ext4 rw 0 0", False),
        ("x / ext4 rw 0 0\nx /data nfs4 rw,vers=4.2 0 0", False),
        ("x / ext4 rw 0 0\nx /data nfs rw,nolock,vers=3 0 0", True),
        ("x / ext4 rw 0 0\nx /data nfs rw,local_lock=flock 0 0", True),
        ("x / ext4 rw 0 0\nx /data lustre rw,flock 0 0", False),
        ("x / ext4 rw 0 0\nx /data lustre rw,localflock 0 0", True),
        ("x /data/runs fuse.sshfs rw 0 0\nx / ext4 rw 0 0", True),
        ("x /data ext4 rw 0 0\nx / lustre localflock 0 0", False),
    ],
)
def test_which_file_systems_have_locks_of_one_machine_only(
    tmp_path: Path, mounts: str, expected: bool
) -> None:
    (tmp_path / "mounts").write_text(mounts)
    assert lock._is_local(Path("/data/runs/a/.lock"), tmp_path / "mounts") is expected


def test_charges_under_a_lock_file_leave_nothing_behind(tmp_path: Path, local: None) -> None:
    ledger = Ledger(tmp_path / "ledgers", "f" * 64)
    assert ledger.charge("run", "a", SampledGaussian(1.0), "name", 5)
    assert [path.name for path in (tmp_path / "ledgers").iterdir()] == [f"{'f' * 32}.jsonl"]
