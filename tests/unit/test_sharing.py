"""Public stages are done once for all runs that need the same.

Nothing that saw the sensitive set is ever shared.
"""

import importlib
import itertools
import os
from pathlib import Path

import pytest
import torch
from ranks import TINY

from privimage.config import Config, load
from privimage.config.effects import effects
from privimage.config.methods import METHODS
from privimage.config.section import Section
from privimage.distributed.world import World
from privimage.runs import pipeline, sharing
from privimage.stages import prepare, query
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
QUICK = (
    "pretrain.steps=3",
    "query.steps=3",
    "query.checkpoint_every=3",
    "finetune.steps=2",
    "evaluate.fidelity_samples=10",
    "synthesize.samples=20",
)


def config(tmp_path: Path, name: str, *overrides: str) -> Config:
    return load(TINY, [f"run.dir={tmp_path / name}", f"run.shared={tmp_path / 'shared'}", *QUICK, *overrides])


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (tmp_path / "shared").iterdir())


class Watched:
    """A configuration that notes which of its settings are read."""

    def __init__(self, section: Section, read: set[str], prefix: str = ""):
        self._section, self._read, self._prefix = section, read, prefix

    def __getattr__(self, name: str):
        value = getattr(self._section, name)
        if isinstance(value, Section):
            return Watched(value, self._read, f"{self._prefix}{name}.")
        if name in type(self._section).model_fields:
            self._read.add(f"{self._prefix}{name}")
        return value


@pytest.mark.parametrize(
    "more",
    [
        ("method=privimage+d",),
        ("method=random+d",),
        ("method=privimage+g",),
        ("method=nonprivd",),
        ("method=dp-merf", "match.embedding=network"),
        ("method=private-evolution",),
        ("method=nonpriv",),
        (
            "warm.starts=[embedding,central]",
            "match.embedding=network",
            "warm.steps=4",
            "warm.max_rise=0.1",
            "method=pdp-diffusion",
        ),
        ("classify.use=true", "classify.max_rise=0.1"),  # by the features of the query network
        ("data.public.labelled=false", "query.semantics=clusters", "query.clusters=20"),
    ],
    ids=lambda more: more[0],
)
def test_every_setting_that_a_stage_reads_is_declared_for_it(tmp_path: Path, more: tuple[str, ...]) -> None:
    """By `on`, from which resuming, sharing, caches and the identity of charges are derived."""
    settings, table = config(tmp_path, "run", *more), effects()
    run, reads = RunDir(settings.run.dir), {}
    run.path.mkdir()
    run.reconcile(settings)
    for name in settings.stages:
        read: set[str] = set()
        stage = importlib.import_module(f"privimage.stages.{name}")
        run.finish(name, stage.run(Watched(settings, read), run, ALONE))
        reads[name] = read
        undeclared = {
            key
            for key in read
            if name not in table[key].stages and not table[key].planned and table[key].stages
        }
        assert not undeclared, name
    assert "data.resolution" in reads["evaluate"]  # the watching works
    if "query" in reads:
        assert {"query.learning_rate", "data.flip", "runtime.seed"} <= reads["query"]
        assert {"data.public.kind", "data.public.images_per_class"} <= reads["prepare"]


def test_public_stages_are_taken_from_another_run_and_private_ones_never_are(tmp_path: Path) -> None:
    first, second = (
        config(tmp_path, name, f"privacy.epsilon={epsilon}")
        for name, epsilon in (("first", 10), ("second", 1))
    )
    assert pipeline.run(first) == 0
    assert kept(tmp_path) == ["prepare", "query"]
    assert pipeline.run(second) == 0
    assert kept(tmp_path) == ["prepare", "query"]
    for stage in first.stages:
        taken = [
            ("shared" in read_json(settings.run.dir / stage / "done.json")) for settings in (first, second)
        ]
        assert taken == [False, stage in ("prepare", "query")]
    inodes = {path.stat().st_ino for path in files(tmp_path / "shared").values()}
    private = [stage for stage in first.stages if stage not in ("prepare", "query")]
    for settings in (first, second):
        for folder in (*private, "private", "release", *(f"tensorboard/{stage}" for stage in private)):
            assert not [
                path for path in files(settings.run.dir / folder).values() if path.stat().st_ino in inodes
            ], folder
    votes = [(settings.run.dir / "select" / "selection.npz").read_bytes() for settings in (first, second)]
    assert votes[0] != votes[1]
    # the second run stands alone
    for path in files(tmp_path / "shared").values():
        path.unlink()
    weights = [
        torch.load(settings.run.dir / "release" / "model.pt", weights_only=True)["weights"]
        for settings in (first, second)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert (second.run.dir / "prepare" / "public.npy").stat().st_size > 1000


def test_no_method_shares_a_stage_that_follows_from_the_sensitive_set() -> None:
    asked = "warm.starts=[embedding]", "match.embedding=network"
    for name, more in itertools.product(METHODS, ((), asked)):
        one = load(TINY, [f"method={name}", *more])
        seen = {"select", "warm", "finetune", "match", "evolve", "synthesize", "evaluate"}
        assert not seen & set(one.public_stages), name
        assert ("pretrain" in one.public_stages) == (one.spec.pretraining == "all"), name
        assert set(one.public_stages) <= set(one.stages)
        if more and {"match", "warm"} & set(one.stages):
            assert {"prepare", "query"} <= set(one.public_stages), name


def test_a_stage_that_is_not_public_is_neither_kept_nor_taken(tmp_path: Path) -> None:
    settings = config(tmp_path, "run")
    run = RunDir(settings.run.dir)
    run.finish("prepare", prepare.run(settings, run, ALONE))
    for stage in ("select", "pretrain", "finetune", "synthesize", "evaluate"):
        run.finish(stage, {"images": 1})
        sharing.keep(stage, settings, run, ALONE)
        assert not sharing.adopt(stage, settings, RunDir(tmp_path / "other"), ALONE)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    "change",
    [
        "query.steps=4",
        "query.semantics=clusters",
        "runtime.seed=5",
        "data.public.images_per_class=5",
        "data.resolution=16",
    ],
)
def test_other_settings_are_another_stage(change: str, tmp_path: Path) -> None:
    settings, other = config(tmp_path, "run"), config(tmp_path, "other", change)
    stage = "prepare" if change.startswith("data") else "query"
    run = RunDir(settings.run.dir)
    run.finish("prepare", prepare.run(settings, run, ALONE))
    if stage == "query":
        run.finish("query", query.run(settings, run, ALONE))
    sharing.keep(stage, settings, run, ALONE)
    taker = RunDir(other.run.dir)
    if stage == "query":
        taker.finish("prepare", prepare.run(other, taker, ALONE))
    assert not sharing.adopt(stage, other, taker, ALONE)
    same = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"epsilon": 0.5})})
    another = RunDir(tmp_path / "another")
    if stage == "query":
        another.finish("prepare", prepare.run(same, another, ALONE))
    assert sharing.adopt(stage, same, another, ALONE)


def test_a_public_set_that_changed_is_another_one(tmp_path: Path) -> None:
    from data_sets import numbered, save_npz

    path = save_npz(tmp_path / "public.npz", numbered(40), torch.arange(40).numpy() % 2)
    settings = config(tmp_path, "run", "data.public.kind=npz", f"data.public.path={path}")
    run = RunDir(settings.run.dir)
    run.finish("prepare", prepare.run(settings, run, ALONE))
    sharing.keep("prepare", settings, run, ALONE)
    assert sharing.adopt("prepare", settings, RunDir(tmp_path / "before"), ALONE)
    os.utime(path, ns=(1, 1))
    assert not sharing.adopt("prepare", settings, RunDir(tmp_path / "after"), ALONE)


def test_a_stage_that_has_begun_goes_on_by_itself(tmp_path: Path) -> None:
    settings = config(tmp_path, "run")
    run, begun = RunDir(settings.run.dir), RunDir(tmp_path / "begun")
    run.finish("prepare", prepare.run(settings, run, ALONE))
    sharing.keep("prepare", settings, run, ALONE)
    (begun.stage("prepare") / "half").touch()
    assert not sharing.adopt("prepare", settings, begun, ALONE)
    assert not begun.record("prepare")


def test_without_a_shared_folder_each_run_does_its_own(tmp_path: Path) -> None:
    settings = load(TINY, [f"run.dir={tmp_path / 'run'}", *QUICK])
    run = RunDir(settings.run.dir)
    run.finish("prepare", prepare.run(settings, run, ALONE))
    sharing.keep("prepare", settings, run, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_in_the_shared_folder_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = config(tmp_path, "run")
    run = RunDir(settings.run.dir)
    run.finish("prepare", prepare.run(settings, run, ALONE))
    (tmp_path / "shared").write_text("a file in the way")
    sharing.keep("prepare", settings, run, ALONE)
    assert "could not be kept" in capsys.readouterr().err
