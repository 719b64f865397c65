"""The whole pipeline on real images, small: what leaves, what stays, what is said, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY, privimage

from privimage.config import Config, load


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One finished run with a key from the operating system."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"run.dir={folder / 'run'}", "privacy.accountant=pld"]
    ended = privimage("run", str(TINY), *settings)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load(TINY, settings)


def test_the_release_is_the_allow_list_and_nothing_else(finished: Config) -> None:
    release = finished.run.dir / "release"
    assert sorted(p.relative_to(release).as_posix() for p in release.rglob("*")) == [
        "PRIVACY.json",
        "PRIVACY.md",
        "README.md",
        "config.json",
        "model.pt",
        "model.safetensors",
        "samples.png",
        "synthetic.npz",
    ]


def test_the_synthetic_set_has_the_stated_form_and_labels_in_turn(finished: Config) -> None:
    with np.load(finished.run.dir / "release" / "synthetic.npz") as file:
        assert sorted(file.files) == ["images", "labels"]
        assert (file["images"].dtype, file["images"].shape) == (np.uint8, (40, 8, 8, 1))
        assert file["labels"].dtype == np.int64 and np.bincount(file["labels"]).tolist() == [4] * 10


def test_the_model_holds_weights_and_public_facts_only(finished: Config) -> None:
    model = torch.load(finished.run.dir / "release" / "model.pt", weights_only=True)
    assert sorted(model) == [
        "channels",
        "classes",
        "generator",
        "method",
        "model",
        "n_classes",
        "resolution",
        "synthesize",
        "weights",
    ]


def test_the_statement_is_that_of_the_ledger(finished: Config) -> None:
    said = json.loads((finished.run.dir / "release" / "PRIVACY.json").read_text())
    assert said["private"] and said["neighbours"] == "add or remove one image" and said["delta"] == 1e-4
    assert 9.9 < said["epsilon"] <= 10.0
    assert sorted((m["name"], m["count"]) for m in said["mechanisms"]) == [
        ("DP-SGD fine-tuning", 8),
        ("semantic distribution query", 1),
    ]
    assert (
        f"({said['epsilon']}, {said['delta']})-differential"
        in (finished.run.dir / "release" / "PRIVACY.md").read_text()
    )


def test_more_images_are_drawn_by_the_command(finished: Config, tmp_path: Path) -> None:
    drawn = privimage("sample", str(finished.run.dir), "--count", "12", "--out", str(tmp_path / "more"))
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert "12 images, seed 1" in drawn.stdout and "nothing was charged" in drawn.stdout
    with np.load(tmp_path / "more" / "synthetic.npz") as file:
        assert file["images"].shape == (12, 8, 8, 1)
    again = privimage("sample", str(finished.run.dir), "--count", "12", "--out", str(tmp_path / "more"))
    assert again.returncode == 2 and "exists already" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_the_key_is_destroyed_and_private_is_closed(finished: Config) -> None:
    private = finished.run.dir / "private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert not (private / "root.key").exists()


def test_no_key_or_loss_of_fine_tuning_is_outside_private(finished: Config) -> None:
    """Public TensorBoard of fine-tuning: nothing that was computed on sensitive data."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    public = EventAccumulator(str(finished.run.dir / "tensorboard" / "finetune")).Reload().Tags()["scalars"]
    private = (
        EventAccumulator(str(finished.run.dir / "private" / "tensorboard" / "finetune"))
        .Reload()
        .Tags()["scalars"]
    )
    assert set(public) == {"epsilon", "learning rate"}
    assert {"loss", "clipped", "images"} <= set(private)


def test_running_again_does_nothing(finished: Config) -> None:
    before = (finished.run.dir / "release" / "synthetic.npz").stat().st_mtime_ns
    ended = privimage("run", str(TINY), f"run.dir={finished.run.dir}", "privacy.accountant=pld")
    assert ended.returncode == 0 and "finetune: done before" in ended.stderr
    assert (finished.run.dir / "release" / "synthetic.npz").stat().st_mtime_ns == before


def test_other_settings_for_a_finished_run_are_refused_in_one_line(finished: Config) -> None:
    ended = privimage(
        "run", str(TINY), f"run.dir={finished.run.dir}", "privacy.accountant=pld", "privacy.epsilon=3"
    )
    assert ended.returncode == 2
    assert "privacy.epsilon was 10.0, now 3.0" in ended.stderr and len(ended.stderr.strip().splitlines()) == 1


def test_privacy_of_a_run_and_of_its_ledger(finished: Config) -> None:
    shown = privimage("privacy", str(finished.run.dir))
    assert shown.returncode == 0 and "Poisson-sampled Gaussian" in shown.stdout and "(RDP)" in shown.stdout
    ledger = next((finished.run.dir.parent / "ledgers").glob("*.jsonl"))
    assert privimage("privacy", str(ledger)).returncode == 0
    nothing = privimage("privacy", str(finished.run.dir / "nothing"))
    assert nothing.returncode == 2 and "no such run directory or ledger" in nothing.stderr


def test_a_budget_refuses_the_next_run_before_it_draws_anything(finished: Config) -> None:
    run = finished.run.dir.parent / "second"
    ended = privimage(
        "run",
        str(TINY),
        f"run.dir={run}",
        "privacy.budget.epsilon=12",
        "privacy.budget.delta=1e-4",
        "query.steps=1",
    )
    assert (
        ended.returncode == 2
        and "privacy.budget: with this run epsilon on the sensitive set would be" in ended.stderr
    )
    assert not (run / "select" / "selection.npz").exists()


def test_a_selection_that_was_never_charged_is_not_released(finished: Config, tmp_path: Path) -> None:
    """A cached query put beside a new ledger is refused before fine-tuning."""
    import shutil

    run = tmp_path / "run"
    for stage in ("prepare", "query", "select", "pretrain"):
        shutil.copytree(finished.run.dir / stage, run / stage)
    ended = privimage("run", str(TINY), f"run.dir={run}", "finetune.steps=1")
    assert (
        ended.returncode == 2
        and "1 of the charges that made it are not in the ledger of the sensitive set" in ended.stderr
    )
    assert not (run / "finetune" / "checkpoint.pt").exists() and not (run / "release").exists()


def test_a_fixed_key_is_called_not_private(tmp_path: Path) -> None:
    fast = ["query.steps=1", "pretrain.steps=1", "finetune.steps=1"]
    ended = privimage("run", str(TINY), f"run.dir={tmp_path / 'run'}", "privacy.insecure_fixed_key=3", *fast)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = json.loads((tmp_path / "run" / "release" / "PRIVACY.json").read_text())
    assert said["private"] is False and said["epsilon"] is None
    assert (tmp_path / "run" / "release" / "PRIVACY.md").read_text().startswith("# Not private")


def test_a_release_holds_nothing_beyond_the_allow_list_also_under_python_o(tmp_path: Path) -> None:
    """`python -O` drops assertions: the check is none."""
    check = (
        "import sys, pathlib; from privimage.releases.assemble import require_allowed as f;"
        "f(pathlib.Path(sys.argv[1]))"
    )
    for name, status in (("PRIVACY.json", 0), ("root.key", 1)):
        (tmp_path / name).touch()
        ended = subprocess.run(
            [sys.executable, "-O", "-c", check, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert ended.returncode == status, ended.stderr
    assert "['root.key'] are not on the allow-list" in ended.stderr
