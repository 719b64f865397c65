"""`privimage rehearse`: the pipeline on public images, as many and of as many classes as the real ones."""

from pathlib import Path

import numpy as np
import pytest
from ranks import TINY

from privimage.commands import rehearse
from privimage.config import load
from privimage.errors import UserError

QUICK = (
    "method=dp-merf",
    "match.steps=2",
    "evaluate.classifiers=[lr]",
    "evaluate.fidelity_samples=10",
    "data.sensitive.kind=npz",
    "data.sensitive.path=no/such/file.npz",  # the sensitive set is not opened
    "data.sensitive.count=300",
    "data.sensitive.classes=10",
)


def test_settings_are_tried_on_other_public_classes_than_those_that_are_left(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config = load(TINY, [f"run.dir={tmp_path / 'run'}", *QUICK])
    assert rehearse.run(config, ["match.learning_rate=1e-3,1e-2"], seeds=1) == 0
    folder = tmp_path / "run-rehearsal"
    train, test, rest = (dict(np.load(folder / f"{name}.npz")) for name in ("train", "test", "rest"))
    # As many images and classes as are stated; 48 classes of 20 images are there, a fifth is held out.
    assert train["images"].shape == (300, 8, 8, 1) and np.unique(train["labels"]).tolist() == [*range(10)]
    assert len(test["labels"]) == 40 and len(rest["labels"]) == 38 * 20
    assert not {one.tobytes() for one in train["images"]} & {one.tobytes() for one in rest["images"]}
    assert not set(train["group"]) & set(test["group"])
    # Nothing of it is in the ledgers of real sets.
    assert len(list((folder / "ledgers").glob("*.jsonl"))) == 1 and not (tmp_path / "ledgers").exists()
    said = capfd.readouterr()
    assert "| 1e-3 |" in said.out and "| 1e-2 |" in said.out
    assert "best by LR" in said.err
    # Again: everything is there, nothing is made anew.
    assert rehearse.run(config, ["match.learning_rate=1e-3,1e-2"], seeds=1) == 0
    assert capfd.readouterr().err.count("done before") == 3


@pytest.mark.parametrize(
    ("settings", "tries", "said"),
    [
        ((), ["match.steps"], "--try match.steps: write section.key=VALUE"),
        ((), ["match.step=1,2"], "match.step"),
        (("data.sensitive.classes=47",), [], "needs 49 classes of at least 10 images, this set has 48"),
        (("data.sensitive.labelled=false",), [], "both sets need labels"),
        (("data.sensitive.count=null",), [], "data.sensitive.count"),
    ],
)
def test_what_cannot_be_rehearsed_is_told_in_one_line(
    tmp_path: Path, settings: tuple[str, ...], tries: list[str], said: str
) -> None:
    config = load(TINY, [f"run.dir={tmp_path / 'run'}", *QUICK, *settings])
    with pytest.raises(UserError, match=said):
        rehearse.run(config, tries, seeds=1)
