"""Synthetic labels in the proportions of the sensitive ones: one noisy count, planned, charged, stated."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_sets import numbered, save_npz
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import TINY, charges

from privimage.config import load
from privimage.errors import UserError
from privimage.privacy.mechanisms import LabelCounts
from privimage.privacy.plan import make_plan
from privimage.runs import pipeline
from privimage.stages.label_counts import labels_by, labels_in_turn


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-50, 1000), min_size=1, max_size=9), st.integers(1, 500))
def test_labels_have_the_proportions_of_the_counts(counts: list[float], count: int) -> None:
    labels, weights = labels_by(np.array(counts), count), np.array(counts).clip(min=0)
    found = np.bincount(labels, minlength=len(counts))
    assert len(labels) == count and len(found) == len(counts)
    if weights.sum() > 0:
        assert (abs(found - count * weights / weights.sum()) < 1 + 1e-6).all()
    else:
        assert (labels == labels_in_turn(count, len(counts))).all()


def test_any_beginning_of_the_set_has_the_same_proportions() -> None:
    labels = labels_by(np.array([600.0, 300.0, 100.0, -4.0]), 1000)
    for part in (50, 100, 500):
        assert np.bincount(labels[:part], minlength=4) / part == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.03)
    assert (labels_by(np.array([1.0, 1.0]), 10) == labels_in_turn(10, 2)).all()


def test_counts_need_labels_and_are_in_the_plan() -> None:
    with pytest.raises(UserError, match=r"synthesize\.labels: noisy counts labels"):
        load(TINY, ["synthesize.labels=noisy", "data.sensitive.labelled=false"])
    options = ["method=dpdm", "finetune.steps=4"]
    without, plan = (
        make_plan(load(TINY, [*options, f"synthesize.labels={labels}"]), 1437)
        for labels in ("uniform", "noisy")
    )
    assert plan.the(LabelCounts).sensitivity == 1 and plan.spent() <= plan.epsilon
    rise = plan.training.noise_multiplier / without.training.noise_multiplier
    assert 1 < rise <= 1.0051
    with pytest.raises(UserError, match="not by label counts"):
        without.the(LabelCounts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on persons with two images each, three quarters of them of one class."""
    folder = tmp_path_factory.mktemp("counted")
    labels = np.repeat([0, 1, 0, 0], 100)
    path = save_npz(
        folder / "set.npz", numbered(400), labels, classes=np.array(["a", "b"]), person=np.arange(400) // 2
    )
    options = [
        *("method=dpdm", "privacy.unit=group", "data.sensitive.group=person", "data.sensitive.kind=npz"),
        *(f"data.sensitive.path={path}", "data.sensitive.per_group=2", "finetune.steps=2"),
        *("synthesize.labels=noisy", "synthesize.max_rise=0.05", f"run.dir={folder / 'run'}"),
    ]
    assert pipeline.run(load(TINY, options), ["finetune", "synthesize"]) == 0
    return folder / "run"


def test_the_release_has_the_proportions_and_states_what_they_cost(finished: Path) -> None:
    labels = np.load(finished / "release" / "synthetic.npz")["labels"]
    assert np.bincount(labels) / len(labels) == pytest.approx([0.75, 0.25], abs=0.1)
    said = json.loads((finished / "release" / "PRIVACY.json").read_text())
    parts = {part["name"]: part for part in said["mechanisms"]}
    assert parts["label counts"]["count"] == 1 and parts["label counts"]["sensitivity"] == 1
    assert said["unit"] == "group" and said["epsilon"] <= 10
    assert sum(part.sample_rate == 1 for part in charges(finished)) == 1
    people = (finished / "release" / "PRIVACY.md").read_text()
    assert "all images of any single group" in people and "label counts: Gaussian" in people


def test_counts_are_not_drawn_again(finished: Path, capsys: pytest.CaptureFixture) -> None:
    """Deleted with what followed from them: another draw would cost more than was promised."""
    import shutil

    before = charges(finished)
    shutil.rmtree(finished / "synthesize")
    shutil.rmtree(finished / "release")
    config = load(finished / "config.yaml")
    assert pipeline.run(config, ["synthesize"]) == 2
    assert "the label counts of this run was drawn before" in capsys.readouterr().err
    assert charges(finished) == before
