"""The stage measures what is in release/, keeps what it has measured, and leaves sensitive things where they
belong.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import read_sensitive

from privimage.config import Config, load
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.evaluation import benchmark, report, utility
from privimage.models import benchmark as models
from privimage.stages import evaluate
from privimage.storage.files import write_json
from privimage.storage.rundir import RunDir

TINY = Path(__file__).parent.parent / "tiny.yaml"
ALONE = World(0, 0, 1, 1, torch.device("cpu"))
SAID = {
    "private": True,
    "epsilon": 9.9,
    "delta": 1e-4,
    "accountant": "pld",
    "neighbours": "add or remove one image",
    "promised_epsilon": 10.0,
}
USED = {"name": "DP-SGD fine-tuning", "noise_multiplier": 2.0, "sample_rate": 0.3, "count": 10}


def config(tmp_path: Path, *overrides: str) -> Config:
    return load(TINY, [f"run.dir={tmp_path / 'run'}", "method=dpdm", "evaluate.classifiers=[lr]", *overrides])


def release(settings: Config, images: np.ndarray, labels: np.ndarray) -> RunDir:
    """A run that has got as far as its release, with these images (N, C, H, W)."""
    run = RunDir(settings.run.dir)
    run.release.mkdir(parents=True, exist_ok=True)
    np.savez(run.release / "synthetic.npz", images=images.transpose(0, 2, 3, 1), labels=labels)
    write_json(run.release / "PRIVACY.json", SAID | {"mechanisms": [USED]})
    run.finish(
        "synthesize",
        {"images": len(images), "seconds": 1.0, "peak_memory_bytes": 1, "images_per_second": 1.0},
    )
    return run


def noisy_digits(settings: Config, noise: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins for synthetic digits that are as useful as real ones."""
    train = read_sensitive(settings, "train")
    noised = train.images[:600] + np.random.default_rng(0).normal(0, noise, (600, 1, 8, 8))
    return np.clip(noised, 0, 255).astype(np.uint8), train.labels[:600]


def told(run: RunDir) -> dict:
    return json.loads((run.path / "evaluate" / "report.json").read_text())


def test_useful_images_score_high_and_meaningless_ones_do_not(tmp_path: Path) -> None:
    accuracy = []
    for name, shuffle in (("good", False), ("bad", True)):
        settings = config(tmp_path / name)
        images, labels = noisy_digits(settings)
        run = release(settings, images, np.random.default_rng(1).permutation(labels) if shuffle else labels)
        assert evaluate.run(settings, run, ALONE) == {"images": 600}
        accuracy.append(told(run)["accuracy"]["lr"])
    assert accuracy[0] > 85
    assert accuracy[1] < 30


def test_sensitive_things_stay_out_of_the_release(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = release(settings, *noisy_digits(settings))
    before = {path.name: path.read_bytes() for path in run.release.iterdir()}
    evaluate.run(settings, run, ALONE)
    assert {path.name: path.read_bytes() for path in run.release.iterdir()} == before
    assert [path.parent.name for path in run.path.rglob("features-*")] == ["private"]
    drawn = {path.name for path in (run.path / "evaluate" / "figures").iterdir()}
    assert {"samples.png", "sensitive-nearest.png", "sensitive-accuracy.png"} <= drawn


def test_before_and_after_fine_tuning_are_measured_apart(tmp_path: Path) -> None:
    settings = config(tmp_path, "evaluate.before=true")
    images, labels = noisy_digits(settings)
    run = release(settings, images, labels)
    np.savez(
        run.stage("synthesize") / "before.npz",
        images=255 - images[:100].transpose(0, 2, 3, 1),
        labels=labels[:100],
    )
    evaluate.run(settings, run, ALONE)
    report = told(run)
    assert report["accuracy_before"]["lr"] < 50 < report["accuracy"]["lr"]
    assert report["fidelity_before"]["distance"] > 5 * report["fidelity"]["distance"]


def test_a_restart_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    images, labels = noisy_digits(settings)
    run = release(settings, images, labels)
    monkeypatch.setattr(evaluate.report, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(settings, run, ALONE)
    monkeypatch.undo()
    monkeypatch.setitem(utility.SHALLOW, "lr", lambda *_: pytest.fail("measured twice"))
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy"]["lr"] > 85


def test_a_request_to_stop_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, "evaluate.classifiers=[lr,mlp]", "evaluate.ceiling=false")
    run = release(settings, *noisy_digits(settings))

    def asked_meanwhile(training: utility.Labelled, tests: utility.Labelled, _: int) -> np.ndarray:
        monkeypatch.setattr(stop, "requested", True)
        return tests.labels

    monkeypatch.setitem(utility.SHALLOW, "lr", asked_meanwhile)
    monkeypatch.setitem(utility.SHALLOW, "mlp", lambda *_: pytest.fail("went on"))
    with pytest.raises(Stopped):
        evaluate.run(settings, run, ALONE)
    monkeypatch.undo()
    monkeypatch.setitem(utility.SHALLOW, "lr", lambda *_: pytest.fail("measured twice"))
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy"]["lr"] == 100.0
    assert told(run)["accuracy"]["mlp"] > 85


def test_the_ceiling_is_of_real_images_and_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    images, labels = noisy_digits(settings, noise=100)
    run = release(settings, images, labels)
    evaluate.run(settings, run, ALONE)
    first = told(run)
    assert first["accuracy"]["lr"] < first["accuracy_ceiling"]["lr"] > 94
    assert [row["name"] for row in first["classes"]["of"]] == list("0123456789")
    of = first["classes"]["of"]
    total = sum(row["accuracy"] * row["test_images"] for row in of) / sum(row["test_images"] for row in of)
    assert total == pytest.approx(first["accuracy"]["lr"])
    assert {path.name for path in run.private.iterdir()} >= {"ceiling.json"}

    # As many real images as synthetic ones, of which only the synthetic ones are learnt from again.
    assert first["accuracy_ceiling_images"] == 600
    real, learnt = utility.SHALLOW["lr"], []

    def counted(training: utility.Labelled, tests: utility.Labelled, seed: int) -> np.ndarray:
        learnt.append(training)
        return real(training, tests, seed)

    monkeypatch.setitem(utility.SHALLOW, "lr", counted)
    release(settings, *noisy_digits(settings, noise=10))
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy_ceiling"] == first["accuracy_ceiling"]
    assert told(run)["accuracy"]["lr"] > first["accuracy"]["lr"]
    of_synthetic = len(learnt)

    # With more synthetic images than there are real ones, all real ones.
    more = noisy_digits(settings, noise=10)
    release(settings, np.concatenate([more[0]] * 3), np.concatenate([more[1]] * 3))
    evaluate.run(settings, run, ALONE)
    assert len(learnt) == 2 * of_synthetic + 1
    assert told(run)["accuracy_ceiling_images"] == 1437
    settings = config(tmp_path, "evaluate.ceiling=false")
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy_ceiling"] is None and told(run)["accuracy_ceiling_images"] == 0


def test_the_three_of_the_benchmark_with_their_best_and_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"resnet": (1, 8), "wrn": (1, 8), "resnext": (1, 8)}
    monkeypatch.setitem(benchmark.SIZES, "small", sizes)
    monkeypatch.setattr(models, "BOTTLENECK", 4)
    settings = config(tmp_path, "evaluate.classifiers=[lr,resnet,wrn,resnext]", "evaluate.benchmark_epochs=6")
    run = release(settings, *noisy_digits(settings))
    evaluate.run(settings, run, ALONE)
    scores, ceiling = told(run)["accuracy"], told(run)["accuracy_ceiling"]
    three = [scores[key] for key in ("resnet", "wrn", "resnext")]
    assert max(three) > 40 and scores["cnn"] is None  # chance is 10
    assert scores["benchmark_best"] == max(three)
    assert scores["benchmark_mean"] == pytest.approx(sum(three) / 3)
    assert ceiling["benchmark_best"] > 60
    assert told(run)["agreement"]["classifier"] == "lr"  # not one that takes hours
    text = (run.path / "evaluate" / "report.html").read_text()
    assert "WideResNet" in text and "Mean of the three" in text and "no epoch was chosen" in text

    # Two of the three are neither best nor mean of the three.
    settings = config(tmp_path, "evaluate.classifiers=[lr,wrn,resnet]", "evaluate.benchmark_epochs=1")
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy"]["benchmark_best"] is None
    assert "Mean of the three" not in (run.path / "evaluate" / "report.html").read_text()


def test_labels_that_were_shuffled_do_not_agree_with_their_images(tmp_path: Path) -> None:
    found = []
    for name in ("as they are", "shuffled"):
        settings = config(tmp_path / name)
        images, labels = noisy_digits(settings)
        labels = np.random.default_rng(1).permutation(labels) if name == "shuffled" else labels
        run = release(settings, images, labels)
        evaluate.run(settings, run, ALONE)
        found.append(told(run)["agreement"])
    assert found[0]["percent"] > 80 and found[1]["percent"] < 25
    assert found[0].items() >= {"classifier": "lr", "images": 300, "chance": 10}.items()
    assert found[0]["relabelled"] is None  # no classifier gave the labels


@pytest.mark.parametrize("change", ["images", "settings", "figures"])
def test_results_of_something_else_are_not_kept(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    images, labels = noisy_digits(settings)
    run = release(settings, images, labels)
    evaluate.run(settings, run, ALONE)
    if change == "images":
        release(settings, 255 - images, labels)
    elif change == "settings":
        settings = config(tmp_path, "runtime.seed=5")
    else:  # whoever deletes the folder wants it done again
        for path in sorted((run.path / "evaluate").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.setitem(utility.SHALLOW, "lr", lambda _, tests, __: 1 - tests.labels)
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy"]["lr"] == 0


def test_nonpriv_is_the_ceiling_and_makes_no_claim(tmp_path: Path) -> None:
    settings = config(tmp_path, "method=nonpriv")
    run = RunDir(settings.run.dir)
    assert evaluate.run(settings, run, ALONE) == {"images": 1437}
    report = told(run)
    assert report["accuracy"]["lr"] > 94
    assert report["privacy"]["private"] is False
    assert report["privacy"]["epsilon"] is None
    assert set(report["fidelity"].values()) == {None}
    assert not (run.path / "release").exists()


def sensitive_npz(tmp_path: Path, name: str, digits: Config, *keep: int) -> Path:
    train = read_sensitive(digits, "train")
    chosen = np.isin(train.labels, keep)
    labels = np.searchsorted(keep, train.labels[chosen])
    path = tmp_path / name
    np.savez(path, images=train.images[chosen, 0], labels=labels, classes=[f"digit {k}" for k in keep])
    return path


def test_without_held_out_images_there_is_no_accuracy_and_the_report_says_why(tmp_path: Path) -> None:
    digits = config(tmp_path)
    path = sensitive_npz(tmp_path, "train.npz", digits, *range(10))
    settings = config(tmp_path, "data.sensitive.kind=npz", f"data.sensitive.path={path}")
    run = release(settings, *noisy_digits(digits))
    evaluate.run(settings, run, ALONE)
    assert told(run)["accuracy"] == dict.fromkeys(report.SCORES)
    assert told(run)["memorization"] is None
    assert told(run)["fidelity"]["distance"] > 0
    assert (
        "data.sensitive.test_path names no held-out images"
        in (run.path / "evaluate" / "report.html").read_text()
    )


def test_held_out_images_of_other_classes_are_refused(tmp_path: Path) -> None:
    digits = config(tmp_path)
    train, test = (
        sensitive_npz(tmp_path, name, digits, *keep)
        for name, keep in (("train.npz", (1, 2, 3)), ("test.npz", (1, 7)))
    )
    settings = config(
        tmp_path,
        "data.sensitive.kind=npz",
        f"data.sensitive.path={train}",
        f"data.sensitive.test_path={test}",
    )
    with pytest.raises(
        UserError,
        match=r"data\.sensitive\.test_path: .*its class 'digit 7' is no class of the training images",
    ):
        evaluate.run(settings, release(settings, *noisy_digits(digits)), ALONE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "no such file"),
        ("truncated", "damaged"),
        ("shape", r"expected uint8 images of \(8, 8, 1\)"),
        ("floats", "expected uint8 images"),
        ("labels", "labels from 0 to 9"),
    ],
)
def test_a_synthetic_set_that_does_not_fit_is_named(damage: str, message: str, tmp_path: Path) -> None:
    settings = config(tmp_path)
    images, labels = noisy_digits(settings)
    if damage == "shape":
        images = images[:, :, :6, :6]
    elif damage == "floats":
        images = images / 255
    elif damage == "labels":
        labels = labels + 1
    run = release(settings, images, labels)
    path = run.release / "synthetic.npz"
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=rf"synthetic\.npz: .*{message}") as raised:
        evaluate.run(settings, run, ALONE)
    assert "\n" not in str(raised.value)


def test_mistakes_in_the_settings_are_told_before_the_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(utility.SHALLOW, "lr", lambda *_: pytest.fail("began the long work"))
    for setting in ("inception_weights", "word_vectors"):
        settings = config(tmp_path, f"evaluate.{setting}={tmp_path / 'missing'}")
        run = release(settings, *noisy_digits(settings))
        with pytest.raises(UserError, match=rf"evaluate\.{setting}: .*missing"):
            evaluate.run(settings, run, ALONE)


def test_a_class_without_an_image_is_measured_like_any_other(tmp_path: Path) -> None:
    """A class exists because it is named, not because an image has it, in every measure and figure."""
    digits = config(tmp_path)
    train = read_sensitive(digits, "train")
    kept = (train.labels != 9) & (np.arange(len(train.labels)) < 500)
    names, test = [f"digit {k}" for k in range(10)], read_sensitive(digits, "test")
    np.savez(tmp_path / "train.npz", images=train.images[kept, 0], labels=train.labels[kept], classes=names)
    seen = test.labels != 3  # and another one among the held-out images
    np.savez(tmp_path / "test.npz", images=test.images[seen, 0], labels=test.labels[seen], classes=names)
    settings = config(
        tmp_path,
        "data.sensitive.kind=npz",
        f"data.sensitive.path={tmp_path / 'train.npz'}",
        f"data.sensitive.test_path={tmp_path / 'test.npz'}",
        "evaluate.classifiers=[lr,mlp,cnn]",
    )
    run = release(settings, *noisy_digits(digits))
    evaluate.run(settings, run, ALONE)
    report = told(run)
    assert (
        min(report["accuracy"]["lr"], report["accuracy"]["mlp"]) > 50
        and (run.path / "evaluate/figures/sensitive-tsne.png").exists()
    )
    assert report["synthetic"]["classes"] == names
    ceiling = config(
        tmp_path / "ceiling",
        "method=nonpriv",
        *(
            f"data.sensitive.{k}"
            for k in ("kind=npz", f"path={tmp_path / 'train.npz'}", f"test_path={tmp_path / 'test.npz'}")
        ),
    )
    evaluate.run(ceiling, RunDir(ceiling.run.dir), ALONE)
    assert told(RunDir(ceiling.run.dir))["accuracy"]["lr"] > 75
