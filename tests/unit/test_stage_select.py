"""The selection stage: what it writes, and the lot that a selection is compared with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY

from privimage.config import Config, load
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.privacy.ledger import Ledger
from privimage.runs import pipeline
from privimage.stages import prepare, query, select
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
QUICK = ("pretrain.steps=3", "finetune.steps=2", "evaluate.fidelity_samples=10", "synthesize.samples=20")


def config(tmp_path: Path, *overrides: str) -> Config:
    return load(TINY, [f"run.dir={tmp_path / 'run'}", *QUICK, *overrides])


def by_lot(settings: Config) -> np.ndarray:
    """The assignment that a run of Random+D writes."""
    run = RunDir(settings.run.dir)
    if run.record("prepare") is None:
        run.finish("prepare", prepare.run(settings, run, ALONE))
    select.run(settings, run, ALONE)
    with np.load(run.stage("select") / "selection.npz") as file:
        assert not file["counts"].any()
        return file["assignment"]


def test_a_lot_gives_each_row_its_share_by_the_public_seed_and_asks_no_sensitive_image(
    tmp_path: Path,
) -> None:
    drawn = {
        seed: by_lot(config(tmp_path, "method=random+d", "select.per_class=3", f"runtime.seed={seed}"))
        for seed in (0, 1, 2)
    }
    for assignment in drawn.values():
        assert np.bincount(assignment[assignment >= 0], minlength=10).tolist() == [3] * 10
    assert len({assignment.tobytes() for assignment in drawn.values()}) == 3
    assert not (tmp_path / "ledgers").exists()
    assert not (tmp_path / "run" / "private" / "account.json").exists()


def test_a_lot_favours_no_class(tmp_path: Path) -> None:
    """Each of 48 characters is drawn by 10 rows in 60 trials.

    Chi-squared, false-alarm rate 1e-3, fixed seeds.
    """
    from scipy import stats

    drawn = np.stack(
        [by_lot(config(tmp_path, "method=random+d", f"runtime.seed={seed}")) >= 0 for seed in range(60)]
    )
    counts = drawn.sum(0)
    assert counts.sum() == 600
    # without replacement the variance of a count is that of a binomial with (1 - 10/48)
    statistic = ((counts - 600 / len(counts)) ** 2 / (600 / len(counts) * (1 - 10 / len(counts)))).sum()
    assert stats.chi2.sf(statistic, len(counts) - 1) > 1e-3


def test_a_run_by_lot_pays_for_no_query(tmp_path: Path) -> None:
    settings = config(tmp_path, "method=random+d")
    assert settings.stages == ("prepare", "select", "pretrain", "finetune", "synthesize", "evaluate")
    assert pipeline.run(settings) == 0
    said = read_json(settings.run.dir / "release" / "PRIVACY.json")
    assert [m["name"] for m in said["mechanisms"]] == ["DP-SGD fine-tuning"]
    report = read_json(settings.run.dir / "evaluate" / "report.json")
    assert report["selection"]["by_vote"] is False
    assert report["selection"]["images"] == 10 * 20
    page = (settings.run.dir / "evaluate" / "report.html").read_text()
    assert "drawn by lot" in page and "noisy vote" not in page


@pytest.mark.parametrize("semantics", ["labels", "clusters"])
def test_asking_again_tells_nothing_and_asking_otherwise_is_refused(tmp_path: Path, semantics: str) -> None:
    """Whoever trains another query network and asks again gets noise of its own.

    Equal noise would show the difference of the votes.
    """

    def asked(seed: int) -> tuple[np.ndarray, int]:
        settings = config(
            tmp_path,
            "privacy.insecure_fixed_key=3",
            f"query.semantics={semantics}",
            "query.clusters=20",
            f"runtime.seed={seed}",
        )
        run = RunDir(settings.run.dir)
        if run.record("prepare") is None:
            run.finish("prepare", prepare.run(settings, run, ALONE))
        if not (run.path / "query").exists():
            run.finish("query", query.run(settings, run, ALONE))
        select.run(settings, run, ALONE)
        fingerprint = read_json(run.private / "account.json")["fingerprint"]
        with np.load(run.path / "select" / "selection.npz") as file:
            return file["counts"], len(Ledger(tmp_path / "ledgers", fingerprint).spent.charges)

    first, again = asked(0), asked(0)
    assert np.array_equal(first[0], again[0]) and first[1] == again[1] == 1
    shutil.rmtree(tmp_path / "run" / "query")
    with pytest.raises(UserError, match="the semantic distribution query of this run was drawn before"):
        asked(1)
    assert (
        len(
            Ledger(
                tmp_path / "ledgers", read_json(tmp_path / "run" / "private" / "account.json")["fingerprint"]
            ).spent.charges
        )
        == 1
    )
    shutil.rmtree(tmp_path / "run" / "private")  # another run: it pays, and has noise of its own
    other, charges = asked(1)
    assert charges == 2
    difference = other - first[0]
    assert np.abs(difference - np.rint(difference)).max() > 0.1  # of equal noise whole numbers would be left


@pytest.mark.parametrize("method", ["random+d", "privimage+d"])
def test_more_public_classes_than_there_are_cannot_be_kept(tmp_path: Path, method: str) -> None:
    with pytest.raises(
        UserError,
        match=r"select\.per_class: 10 sensitive classes times 9 are more than the 48 public classes",
    ):
        by_lot(config(tmp_path, f"method={method}", "select.per_class=9"))
