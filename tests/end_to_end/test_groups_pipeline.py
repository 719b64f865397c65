"""Persons as the unit of the promise, through the whole pipeline: what is stated, and what leaves."""

import re
from pathlib import Path

import numpy as np
import pytest
from data_sets import save_npz
from ranks import TINY, charges

import privimage
from privimage.config import Config, load
from privimage.data.readers import open_source
from privimage.privacy.mechanisms import NoisyGradients
from privimage.runs import pipeline
from privimage.storage.files import read_json

PERSONS = 200
METHODS = {
    "privimage+g": (),
    "dp-merf": ("match.embedding=network",),
    "private-evolution": (),
    "privimage+d": (
        *("warm.starts=[embedding,central]", "warm.parts=2", "warm.steps=4", "warm.batch_size=16"),
        "classify.use=true",
    ),
}
TRAINING = {  # what trains it, where it is not DP-SGD
    "dp-merf": ("noisy mean embedding", 1),
    "private-evolution": ("nearest-neighbour histogram", 3),
}


def persons_of(split: str, persons: int) -> np.ndarray:
    """Whom the digits of a split belong to: a few have dozens of images, most have some, many have one."""
    count = len(open_source("digits", None, split))
    rng = np.random.default_rng(1)
    who = np.concatenate([np.arange(persons), (persons * rng.random(count - persons) ** 3).astype(int)])
    return np.array([f"{split} {number}" for number in rng.permutation(who)])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.npz and test.npz: digits of persons, none of whom is in both."""
    folder = tmp_path_factory.mktemp("persons")
    for split, persons in (("train", PERSONS), ("test", 40)):
        source, classes = open_source("digits", None, split), np.array(list("0123456789"))
        more = {"classes": classes, "person": persons_of(split, persons)}
        save_npz(folder / f"{split}.npz", np.asarray(source.items), source.labels, **more)
    return folder


def settings(sets: Path, folder: Path, method: str, *more: str) -> Config:
    return load(
        TINY,
        [
            *(f"method={method}", f"run.dir={folder}", "data.sensitive.kind=npz"),
            *(f"data.sensitive.path={sets}", "data.sensitive.group=person", "privacy.unit=group"),
            *("data.sensitive.per_group=3", f"data.sensitive.count={PERSONS}"),
            *("finetune.logical_batch_size=50", "finetune.steps=4", "pretrain.steps=6", "query.steps=6"),
            *METHODS[method],
            *more,
        ],
    )


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of a method, with keys from the operating system."""
    config = settings(sets, tmp_path_factory.mktemp(request.param) / "run", request.param)
    assert pipeline.run(config) == 0
    return config


def test_the_statement_speaks_of_groups(run: Config) -> None:
    release = run.run.dir / "release"
    said, text = read_json(release / "PRIVACY.json"), (release / "PRIVACY.md").read_text()
    assert said["private"] and said["unit"] == "group" and 9 < said["epsilon"] <= 10
    assert said["neighbours"] == "add or remove all images of one group"
    assert "all images of any single group" in text and "image was in the sensitive set" not in text
    used = {one["name"]: one for one in said["mechanisms"]}
    if run.method in TRAINING:
        name, count = TRAINING[run.method]
        assert list(used) == [name] and used[name]["count"] == count
    else:
        steps = used["DP-SGD fine-tuning"]
        assert (steps["count"], steps["sample_rate"], steps["images_per_group"]) == (4, 50 / PERSONS, 3)
    if run.method == "privimage+d":
        assert {"noisy mean embedding for the warm start", "central images", NoisyGradients.name} <= set(used)
    for one in said["mechanisms"]:
        assert "group" in one["claim"], one
        by_network = run.method == "dp-merf"
        assert ("features of a network that was trained on public images" in one["claim"]) is by_network
    # What was charged is what is stated.
    assert sum(one.count for one in charges(run.run.dir)) == sum(one["count"] for one in said["mechanisms"])


def test_the_release_opens(run: Config) -> None:
    found = privimage.open_release(run.run.dir)
    assert found.images.shape == (40, 8, 8, 1)
    if not run.classify.use:
        assert found.labels.tolist() == [i % 10 for i in range(40)]
    if run.method != "private-evolution":
        images, labels = found.sample(20, seed=3)
        assert images.shape[0] == len(labels) == 20


def test_nothing_public_tells_how_many_images_persons_have(run: Config, sets: Path) -> None:
    """N is the number of persons; the number of images is private."""
    count = len(np.load(sets / "train.npz")["labels"])
    report = read_json(run.run.dir / "evaluate" / "report.json")
    assert report["sensitive"]["groups"] == PERSONS and report["sensitive"]["images"] is None
    for path in (run.run.dir / "release").iterdir():
        if path.suffix in (".json", ".md"):
            assert not re.search(rf"\b({count}|{count:,})\b", path.read_text()), path


def test_a_person_in_both_splits_is_told_before_anything_is_drawn(
    sets: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with np.load(sets / "test.npz") as file:
        arrays = dict(file)
    arrays["person"] = np.where(arrays["person"] == "test 7", "train 7", arrays["person"])
    np.savez(tmp_path / "test.npz", **arrays)
    more = f"data.sensitive.path={sets / 'train.npz'}", f"data.sensitive.test_path={tmp_path / 'test.npz'}"
    assert pipeline.run(settings(sets, tmp_path / "run", "dp-merf", *more)) == 2
    assert "1 of the 40 groups of the held-out images are in the training images" in capfd.readouterr().err
    assert not (tmp_path / "ledgers").exists()
