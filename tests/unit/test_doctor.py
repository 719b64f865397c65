"""`privimage doctor` finds each of the planted mistakes, names it, and leaves nothing behind."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, save_folder, save_npz
from ranks import REPOSITORY, TINY, clean_environment, run_ranks

from privimage import cli
from privimage.cluster import jobs
from privimage.config import load
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.runs import devices
from privimage.runs.doctor import diagnose
from privimage.storage import lock


def mistakes(tmp_path: Path, *overrides: str) -> list[str]:
    """What the doctor finds of the tiny configuration with other settings: the mistakes, with their check."""
    found = diagnose(load(TINY, [f"run.dir={tmp_path / 'run'}", *overrides]), ALONE)
    assert found.mistakes == sum(row.state == "mistake" for row in found.rows)
    assert not (tmp_path / "run").is_dir() and not list(tmp_path.rglob(".privimage-doctor*"))
    return [f"{row.name}: {row.text}" for row in found.rows if row.state == "mistake"]


def beton(path: Path) -> list[str]:
    (path / "public").mkdir()
    return ["data.public.kind=beton", f"data.public.path={path / 'public'}"]


def damaged(path: Path) -> list[str]:
    folder = save_folder(path / "set", numbered(30), np.arange(30) % 3)
    (folder / "class1" / "0001.png").write_bytes(b"no image")
    return ["data.sensitive.kind=folder", f"data.sensitive.path={folder}", "finetune.logical_batch_size=8"]


def few(path: Path) -> list[str]:
    file = save_npz(path / "set.npz", numbered(30), np.arange(30) % 3, classes=np.array(["a", "b", "c"]))
    return ["data.sensitive.kind=npz", f"data.sensitive.path={file}"]


def budget(path: Path) -> list[str]:
    return ["privacy.budget={epsilon: 2, delta: 1.0e-4}", "privacy.epsilon=3"]


def file_in_place(path: Path) -> list[str]:
    (path / "file").write_text("")
    return [f"run.dir={path / 'file'}"]


def weights(path: Path) -> list[str]:
    torch.save({"wrong": torch.zeros(1)}, path / "weights.pth")
    return [f"evaluate.inception_weights={path / 'weights.pth'}"]


def deepspeed(path: Path) -> list[str]:
    (path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return ["pretrain.engine=deepspeed", f"pretrain.deepspeed_config={path / 'zero.json'}"]


PLANTED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no public set": (
        lambda path: ["data.public.kind=folder", f"data.public.path={path / 'none'}"],
        "public set: .*none: no such file or folder",
    ),
    "a folder as a store": (
        beton,
        "public set: .*public: a folder, not a prepared store; kind folder reads it",
    ),
    "no sensitive set": (
        lambda path: ["data.sensitive.kind=npz", f"data.sensitive.path={path / 'x.npz'}"],
        "sensitive set: .*x.npz: no such file",
    ),
    "a damaged image": (damaged, "sensitive set: .*0001.png: not readable as an image"),
    "another N": (lambda _: ["data.sensitive.count=9"], "sensitive set: data.sensitive.count: 9 was stated"),
    "a batch beyond N": (few, "privacy plan: finetune.logical_batch_size: 64 is more than the 30"),
    "an impossible promise": (
        lambda _: ["privacy.epsilon=0.0001", "select.noise_multiplier=0.5"],
        "privacy plan: privacy.epsilon: 0.0001 at delta .* cannot be kept",
    ),
    "more than the budget": (budget, "privacy plan: privacy.budget: this run alone needs epsilon"),
    "a file as the run directory": (file_in_place, "run directory: run.dir: .* is a file"),
    "foreign weights": (weights, "feature weights: evaluate.inception_weights: .*not the Inception"),
    "ZeRO 3": (deepspeed, "DeepSpeed settings: .*zero_optimization.stage"),
    "too many public classes": (
        lambda _: ["select.per_class=20"],
        "votes: select.per_class: 10 sensitive classes",
    ),
    "no memory": (
        lambda _: ["slurm.memory=1G"],
        "memory: .*ranks of a node need 2.0 GiB, more than slurm.memory of 1G",
    ),
    "no GPU asked for": (
        lambda _: ["runtime.device=cuda", "slurm.gpus=0"],
        r"jobs: slurm\.stages\.\w+: no GPU is asked for",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(tmp_path: Path, name: str) -> None:
    plant, expected = PLANTED[name]
    found = mistakes(tmp_path, *plant(tmp_path))
    assert any(re.match(expected, line) for line in found), found


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    found = mistakes(tmp_path, "select.per_class=20", "data.sensitive.count=9", "slurm.memory=1G")
    assert {line.split(":")[0] for line in found} >= {"sensitive set", "memory"}


@pytest.fixture
def small_disk(tmp_path: Path, root: None) -> Iterator[Path]:
    """A disk of one mebibyte."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_found(tmp_path: Path, small_disk: Path) -> None:
    found = mistakes(tmp_path, f"run.dir={small_disk / 'run'}")
    assert any("has 1 MiB free and the run will write about" in line for line in found)


def test_the_shipped_configuration_is_in_good_health(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Typed as the README has it."""
    command = [
        "privimage",
        "doctor",
        str(REPOSITORY / "configs" / "quickstart.yaml"),
        f"run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("ready"), done.stdout + done.stderr
    assert "1,437 images, 10 classes" in done.stdout and not (tmp_path / "run").exists()


def test_a_missing_gpu_is_a_row_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(SystemExit) as ended:
        cli.doctor(TINY, [f"run.dir={tmp_path / 'run'}", "runtime.device=cuda"])
    assert ended.value.code == 2
    assert "torch sees no GPU" in capsys.readouterr().out.replace("\n", " ")


def test_a_job_without_a_gpu_does_not_train_a_large_network(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(TINY, ["query.network=resnet50"])
    assert devices.devices(config, ALONE, ["query"]).state == "warning"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    row = devices.devices(config, ALONE, ["query"])
    assert row.state == "mistake" and "no GPU is visible in this job" in row.text
    assert devices.devices(config, ALONE, ["pretrain"]).state == "ok"


def test_a_file_system_without_global_locks_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text("x / lustre rw,localflock 0 0\n")
    monkeypatch.setattr(lock, "MOUNTS", tmp_path / "mounts")
    assert mistakes(tmp_path) == []


def test_ranks_measure_their_connection_and_tell_what_only_one_of_them_sees(tmp_path: Path) -> None:
    script = f"""
import os
from privimage.config import load
from privimage.config.settings import Runtime
from privimage.distributed.world import connect
from privimage.runs.doctor import diagnose
world = connect(Runtime(device="cpu"))
settings = ["run.dir={tmp_path}/run", f"evaluate.inception_weights={tmp_path}/weights-{{world.rank}}.pth"]
found = diagnose(load({str(TINY)!r}, settings), world)
if world.is_main:
    for row in found.rows:
        print(row.name, row.state, row.text, sep=": ")
world.close()
"""
    ended = run_ranks(script, 2)
    assert [rank.status for rank in ended] == [0, 0], ended
    lines = ended[0].out.splitlines()
    assert any(line.startswith("connection: ok: all-reduce of 64 MiB:") for line in lines)
    for rank in (0, 1):
        assert any(f"weights-{rank}.pth" in line for line in lines)


def test_nothing_is_submitted_while_something_is_amiss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="nothing was submitted"):
        jobs.submit([str(TINY), f"run.dir={tmp_path / 'run'}", "data.sensitive.count=9"])
    assert "9 was stated" in capsys.readouterr().out
