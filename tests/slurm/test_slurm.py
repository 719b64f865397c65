"""A real SLURM of two nodes: chained jobs, sweeps, and what clusters do to jobs.

Needs root and network namespaces.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import linked_folder
from ranks import REPOSITORY, SMALL, TINY, clean_environment, wait_until

from privimage.data import store
from privimage.data.readers import open_source
from privimage.data.transforms import Form
from privimage.distributed import checkpoint, launch
from privimage.distributed.launch import free_port
from privimage.storage.files import read_json
from privimage.telemetry import curves

HERE = Path(__file__).parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """The emulated cluster and the commands of its user."""

    def __init__(self, folder: Path):
        self.folder, self.env = folder, clean_environment(SLURM_CONF=str(folder / "etc" / "slurm.conf"))

    def call(self, *command: str | Path, **env: str) -> str:
        """Run a command as a user of the cluster and return what it prints."""
        answer = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, check=False, cwd=self.folder
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number).split("\n\n")[0]))

    def wait(self, number: str, seconds: float = 600) -> dict[str, str]:
        """Wait for the end of a job."""
        return self.wait_until(lambda: (job := self.job(number))["JobState"] in ENDED and job, seconds)

    def wait_until(self, condition: Callable, seconds: float = 300):
        """Wait for something that the cluster or a run does, and return it."""
        return wait_until(condition, seconds, said=lambda: self.call("squeue", "--long") + self.logs())

    def logs(self) -> str:
        """All logs of jobs, for a test that fails."""
        return "".join(
            f"\n== {path}\n{path.read_text()}" for path in sorted(self.folder.parents[1].glob("**/*.out"))
        )

    def link(self, node: int, state: str) -> None:
        """Take the network of a node up or down."""
        self.call("ip", "link", "set", f"piveth{node}", state)

    def kill_node(self, node: int) -> None:
        """All processes of a node at once, as when its power fails."""
        for pid in self.call("ip", "netns", "pids", f"pinode{node}").split():
            os.kill(int(pid), signal.SIGKILL)

    def start_node(self, node: int) -> None:
        """Power on."""
        self.call(HERE / "slurm_node.sh", self.folder, str(node))

    def restart_controller(self) -> None:
        """End slurmctld and start it again, as an update of it does: jobs run on.

        What it could not tell a node that is away is forgotten. Otherwise it would tell it a minute later, an
        order at a time, and end whatever start of the job is there by then.
        """
        self.call("scontrol", "shutdown", "slurmctld")
        self.wait_until(lambda: not (self.folder / "run" / "slurmctld.pid").exists())
        self.call("slurmctld", "-f", self.env["SLURM_CONF"])


@pytest.fixture(scope="module")
def cluster(root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with fake GPUs, or a visible skip where this machine has no network namespaces."""
    folder = tmp_path_factory.mktemp("cluster") / "slurm"
    alone = (Path(tempfile.gettempdir()) / "privimage-test-cluster.lock").open("w")
    fcntl.flock(
        alone, fcntl.LOCK_EX
    )  # names of nodes and ports are those of the machine: one cluster at a time
    up = subprocess.run([HERE / "slurm_up.sh", folder], capture_output=True, text=True, check=False)
    if up.returncode and re.search("not permitted|not supported|Cannot open network namespace", up.stderr):
        pytest.skip(f"no SLURM on this machine: {up.stderr.splitlines()[-1]}")
    assert up.returncode == 0, up.stderr
    yield Cluster(folder)
    subprocess.run([HERE / "slurm_down.sh", folder], check=True)


def weights(folder: Path, stage: str = "finetune") -> dict[str, torch.Tensor]:
    """The averaged weights of a finished stage."""
    state = checkpoint.load(folder / stage / "weights.pt")
    assert state is not None
    return state["ema"]


def submitted(text: str) -> dict[str, str]:
    """Stage to job id, from what pipeline.sh prints."""
    return dict(re.findall(r"^(\w+) +job (\d+)", text, re.MULTILINE))


def test_the_pipeline_runs_as_chained_jobs_on_two_nodes_with_gpus(cluster: Cluster, tmp_path: Path):
    folder = tmp_path / "run"
    first = cluster.call(
        REPOSITORY / "slurm" / "pipeline.sh",
        TINY,
        f"run.dir={folder}",
        *SMALL,
        NODES="2",
        GPUS="2",
        RANKS="1",
        PREPARE_NODES="1",
        MEMORY="4G",
    )
    jobs = submitted(first)
    assert list(jobs) == [
        "prepare",
        "query",
        "select",
        "pretrain",
        "finetune",
        "synthesize",
        "evaluate",
        "summary",
    ]
    cluster.wait(jobs["summary"])
    for stage in list(jobs)[:-1]:
        assert read_json(folder / stage / "done.json")["ranks"] == (1 if stage == "prepare" else 2)
    job = cluster.job(jobs["finetune"])
    assert (job["NumNodes"], job["TresPerNode"], job["MinMemoryNode"], job["Requeue"]) == (
        "2",
        "gres:gpu:2",
        "4G",
        "1",
    )
    assert (folder / "slurm" / f"summary-{jobs['summary']}.out").read_text() == f"{folder}: finished\n"
    assert (folder / "evaluate" / "report.html").exists()
    assert len(np.load(folder / "release" / "synthetic.npz")["images"]) == 20
    again = cluster.call(REPOSITORY / "slurm" / "pipeline.sh", TINY, f"run.dir={folder}", *SMALL)
    assert again.count("done before") == 7
    assert not submitted(again)


def test_a_sweep_over_two_epsilons_is_an_array_with_a_run_for_each(cluster: Cluster, tmp_path: Path):
    settings = ("method=dpdm", "evaluate.before=false", f"run.dir={tmp_path}/sweep", "synthesize.samples=20")
    text = cluster.call(REPOSITORY / "slurm" / "sweep.sh", TINY, "privacy.epsilon=1,10", *settings, CPUS="1")
    summary = submitted(text)["summary"]
    cluster.wait(summary)
    told = "".join(f"{tmp_path}/sweep-epsilon{epsilon}: finished\n" for epsilon in (1, 10))
    assert (tmp_path / "slurm" / f"summary-{summary}.out").read_text() == told, cluster.logs()
    promised = [
        read_json(tmp_path / f"sweep-epsilon{epsilon}" / "release" / "PRIVACY.json")["epsilon"]
        for epsilon in (1, 10)
    ]
    assert promised[0] <= 1 < promised[1] <= 10


def test_a_failed_stage_cancels_what_waits_for_it_and_says_what_to_do(cluster: Cluster, tmp_path: Path):
    folder, missing = tmp_path / "run", tmp_path / "missing.npz"
    settings = (
        "method=dpdm",
        "data.sensitive.kind=npz",
        f"data.sensitive.path={missing}",
        f"run.dir={folder}",
    )
    # `doctor` would have found it: what is submitted all the same fails in its job.
    command = (REPOSITORY / "slurm" / "pipeline.sh", "--unchecked", TINY, *settings)
    jobs = submitted(cluster.call(*command))
    cluster.wait(jobs["summary"])
    states = {stage: cluster.job(number)["JobState"] for stage, number in jobs.items()}
    assert states == {
        "finetune": "FAILED",
        "synthesize": "CANCELLED",
        "evaluate": "CANCELLED",
        "summary": "FAILED",
    }
    assert cluster.job(jobs["finetune"])["ExitCode"] == "2:0"
    log = (folder / "slurm" / f"finetune-{jobs['finetune']}.out").read_text()
    assert (
        log.count("privimage: error: ") == log.count(str(missing)) - 1 == 1
    )  # the first line repeats the command
    assert "When that is fixed, submit again" in log
    summary = (folder / "slurm" / f"summary-{jobs['summary']}.out").read_text()
    assert "ended before finetune was finished" in summary
    assert "submit again" in summary


@pytest.fixture(scope="module")
def undisturbed(selected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks that nobody disturbs, under torchrun."""
    folder = tmp_path_factory.mktemp("undisturbed") / "copy" / "run"
    shutil.copytree(selected.parent, folder.parent)
    command = [REPOSITORY / "launchers" / "torchrun.sh", "run", TINY, f"run.dir={folder}", *SMALL]
    done = subprocess.run(
        command, env=clean_environment(RANKS="2"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_job_that_is_stopped_preempted_and_loses_a_node_and_the_network_ends_like_an_undisturbed_one(
    cluster: Cluster, a_copy: Callable[[str], Path], undisturbed: Path
):
    folder = a_copy("disturbed")
    file, log = folder / "finetune" / "checkpoint.pt", folder.parent / "job.out"
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={log}"]
    settings = (f"run.dir={folder}", *SMALL, "runtime.timeout_minutes=0.5")
    job = cluster.call(
        "sbatch",
        *options,
        REPOSITORY / "slurm" / "stage.sbatch",
        "run",
        str(TINY),
        *settings,
        PRIVIMAGE_HOME=str(REPOSITORY),
    ).strip()

    def last_start() -> int:
        starts = re.findall(r", restart (\d+)$", log.read_text() if log.exists() else "", re.MULTILINE)
        return int(starts[-1]) if starts else -1

    def wait_for_a_step_after(start: int) -> int:
        """Wait until the next start has saved a step, and return that start."""
        cluster.wait_until(lambda: last_start() > start)
        before = file.stat().st_mtime_ns if file.exists() else 0
        cluster.wait_until(lambda: file.exists() and file.stat().st_mtime_ns > before)
        return last_start()

    first = wait_for_a_step_after(-1)
    cluster.call("scancel", "--signal=USR2", job)
    second = wait_for_a_step_after(first)
    assert "SIGUSR2: stopping at the end of this step" in log.read_text()
    cluster.call(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    third = wait_for_a_step_after(second)
    assert "DUE TO PREEMPTION" in log.read_text()
    assert log.read_text().count("privimage: stopped: finetune: saved at step") == 2
    cluster.kill_node(2)
    cluster.wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING")
    cluster.restart_controller()
    cluster.start_node(2)
    fourth = wait_for_a_step_after(third)
    assert "lost contact with the others" in log.read_text()
    cluster.link(2, "down")
    cluster.wait_until(lambda: cluster.job(job)["JobState"] != "RUNNING")
    cluster.restart_controller()
    cluster.link(2, "up")
    fifth = wait_for_a_step_after(fourth)
    # On a slow machine SLURM may kill the script of a start before it comes to this line; never each time.
    assert "taken off its nodes by SLURM, which queues it again" in log.read_text()
    cluster.link(2, "down")
    time.sleep(5)  # a cut of five seconds is what happens here, not a wait for something
    cluster.link(2, "up")
    ended, text = cluster.wait(job), log.read_text()
    assert ended["JobState"] == "COMPLETED", text
    # The short cut ends nothing.
    assert "privimage: error" not in text.split(f", restart {fifth}\n")[1], text
    assert int(ended["Restarts"]) == fifth == 4, text

    expected = weights(undisturbed)
    for name, value in weights(folder).items():
        assert torch.equal(value, expected[name]), name
    images = [np.load(path / "release" / "synthetic.npz")["images"] for path in (folder, undisturbed)]
    assert np.array_equal(*images)
    assert_curves_have_each_point_once(folder, undisturbed)


def assert_curves_have_each_point_once(folder: Path, undisturbed: Path) -> None:
    """Ask TensorBoard itself, through its web interface, for the curves of both runs."""
    port = free_port()
    server = subprocess.Popen(
        ["tensorboard", "--logdir", folder.parent, "--port", str(port), "--load_fast=false"],
        env=clean_environment(),
        stderr=subprocess.DEVNULL,
    )

    def ask(path: str) -> list | dict:
        def answer() -> list | dict | None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{path}") as answered:
                    return json.load(answered)
            except OSError:
                return None

        return wait_until(answer, 90, said=lambda: f"TensorBoard does not answer {path}")

    try:
        for run, tag in (
            ("run/private/tensorboard/finetune", "loss"),
            ("run/tensorboard/finetune", "learning rate"),
        ):
            query = urllib.parse.urlencode({"run": run, "tag": tag})
            points = ask(f"plugin/scalars/scalars?{query}")
            steps, values = curves.points(undisturbed.parent / run, tag)
            assert [step for _, step, _ in points] == steps == list(range(1, 21)), (run, tag)
            assert [value for _, _, value in points] == pytest.approx(values)
    finally:
        server.terminate()
        server.wait()


def marked(mark: str) -> dict[int, list[str]]:
    """Process ids and command lines of all processes with `mark` (NAME=value) in their environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
    return found


def test_the_main_rank_is_killed_while_images_are_decoded(cluster: Cluster, tmp_path: Path):
    folder, log, mark = tmp_path / "run", tmp_path / "job.out", f"PRIVIMAGE_TRIAL={tmp_path}"
    images = linked_folder(tmp_path)
    data = ("data.public.kind=folder", f"data.public.path={images}", "data.workers=1")
    job = cluster.call(
        "sbatch",
        *("--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"),
        *(REPOSITORY / "slurm" / "stage.sbatch", "prepare", TINY, f"run.dir={folder}", *data),
        PRIVIMAGE_HOME=str(REPOSITORY),
        PRIVIMAGE_TRIAL=str(tmp_path),
    ).strip()

    def parts() -> int:
        return len(list(folder.glob("prepare/.public.npy.parts/*.npz")))

    cluster.wait_until(lambda: parts() > 1)
    words = {pid: " ".join(command) for pid, command in marked(mark).items()}
    before = {pid for pid in words if "forkserver" in words[pid] or "bin/privimage" in words[pid].split()[1]}
    (main,) = {pid for pid in before & marked("SLURM_PROCID=0").keys() if "forkserver" not in words[pid]}
    done = parts()
    killed = time.monotonic()
    os.kill(main, signal.SIGKILL)
    cluster.wait_until(
        lambda: not before & set(marked(mark)), 60
    )  # no rank and no decoder is left of this start
    cluster.wait_until(lambda: parts() > done or (folder / "prepare" / "done.json").exists(), 60)
    assert time.monotonic() - killed < 60, log.read_text()
    assert cluster.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert "no reason of their own; starting them again" in log.read_text()
    assert not marked(mark)
    source = open_source("folder", images, "train")
    alone = store.write(source, tmp_path / "alone.npy", Form(8, 1), 2)
    assert store.verify(folder / "prepare" / "public.npy") == alone


def test_a_port_that_is_taken_is_no_end(cluster: Cluster, tmp_path: Path):
    log = tmp_path / "job.out"
    job = cluster.call(
        "sbatch",
        *("--parsable", "--hold", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"),
        *(REPOSITORY / "slurm" / "stage.sbatch", "prepare", TINY, f"run.dir={tmp_path}/run"),
        PRIVIMAGE_HOME=str(REPOSITORY),
    ).strip()
    # Somebody else on the first node listens where the first start of the ranks would meet.
    port = launch._port_of(f"{job}.0.0")
    listen = f"import socket; s = socket.create_server(('', {port})); print('on', flush=True); input()"
    command = ["ip", "netns", "exec", "pinode1", sys.executable, "-c", listen]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "on\n"
        try:
            cluster.call("scontrol", "release", job)
            ended = cluster.wait(job)
        finally:
            other.kill()
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert f":{port} is in use; the ranks must be started again" in log.read_text()
    assert log.read_text().count("no reason of their own; starting them again") == 1
