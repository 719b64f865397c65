"""What is missing is told before the first stage.

A line for each mistake, exit status 2, and nothing is begun.
"""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, save_folder, save_npz, source_of
from ranks import TINY, run_ranks

from privimage.config import load
from privimage.data import store
from privimage.data.transforms import Form
from privimage.runs import pipeline, preflight
from privimage.storage.files import write_json
from privimage.storage.rundir import RunDir

LABELS = np.arange(30) % 3
NAMES = np.array(["x", "y", "z"])
BEGINNING = {".lock", "config.yaml", "failed.json"}  # all that a run that was refused leaves


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable:
    """`door(*overrides)` runs the tiny configuration with stages that only note that they ran.

    (status, lines told, stages).
    """

    def call(*overrides: str, stages: tuple[str, ...] = ()) -> tuple[int, list[str], list[str]]:
        ran: list[str] = []
        monkeypatch.setattr(pipeline, "_run_stage", lambda name, *_: ran.append(name))
        status = pipeline.run(load(TINY, [f"run.dir={tmp_path / 'run'}", *overrides]), stages)
        return status, capfd.readouterr().err.splitlines(), ran

    return call


def of_npz(folder: Path, **arrays: np.ndarray) -> tuple[str, ...]:
    np.savez(folder / "set.npz", **arrays)
    return (
        "data.sensitive.kind=npz",
        f"data.sensitive.path={folder / 'set.npz'}",
        "finetune.logical_batch_size=20",
    )


def good(folder: Path, **arrays: np.ndarray) -> tuple[str, ...]:
    return of_npz(folder, **({"images": numbered(30), "labels": LABELS, "classes": NAMES} | arrays))


def with_held_out(folder: Path, **arrays: np.ndarray) -> tuple[str, ...]:
    save_npz(folder / "test.npz", numbered(30), LABELS, **arrays)
    return *good(folder), f"data.sensitive.test_path={folder / 'test.npz'}"


def undecodable(folder: Path) -> tuple[str, ...]:
    (save_folder(folder / "set", numbered(30), LABELS) / "class1" / "0000.png").write_bytes(b"text")
    return (
        "data.sensitive.kind=folder",
        f"data.sensitive.path={folder / 'set'}",
        "finetune.logical_batch_size=20",
    )


def public_npz(folder: Path) -> tuple[str, ...]:
    path = save_npz(folder / "public.npz", numbered(40), np.zeros(40, int))
    return "data.public.kind=npz", f"data.public.path={path}"


def public_store(folder: Path) -> tuple[str, ...]:
    store.write(source_of(numbered(30, 16), LABELS), folder / "public.npy", Form(16, 1), 0)
    return "data.public.kind=beton", f"data.public.path={folder / 'public.npy'}"


def file_of(content: bytes | None, key: str, name: str, *more: str) -> Callable[[Path], tuple[str, ...]]:
    def made(folder: Path) -> tuple[str, ...]:
        if content is not None:
            (folder / name).write_bytes(content)
        return (f"{key}={folder / name}", *more)

    return made


def other_weights(folder: Path) -> tuple[str, ...]:
    torch.save({"layer.weight": torch.ones(3)}, folder / "weights.pth")
    return (f"evaluate.inception_weights={folder / 'weights.pth'}",)


def no_features(folder: Path) -> tuple[str, ...]:
    torch.save({"layer.weight": torch.ones(3)}, folder / "weights.pth")
    return "method=private-evolution", f"evolve.features={folder / 'weights.pth'}"


DEEPSPEED = "pretrain.engine=deepspeed"
# fmt: off
MISTAKES: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "no sensitive file": (file_of(None, "data.sensitive.path", "nowhere.npz", "data.sensitive.kind=npz"),
        "nowhere.npz: no such file"),
    "no sensitive path": (lambda _: ("data.sensitive.kind=folder",),
        "data.sensitive.path: kind folder needs one"),
    "not images": (lambda d: good(d, images=numbered(30).astype(np.float32)),
        "set.npz: image 0: its pixels are float32, not 8 bits; data.window: [low, high]"),
    "a damaged image": (undecodable, "class1/0000.png: not readable as an image"),
    "unnamed classes": (lambda d: of_npz(d, images=numbered(30), labels=LABELS),
        "data.sensitive.classes: needed, since"),
    "another count": (lambda d: (*good(d), "data.sensitive.count=31"),
        "data.sensitive.count: 31 was stated, the data have 30"),
    "other classes": (lambda d: (*good(d), "data.sensitive.classes=4"),
        "data.sensitive.classes: 4 was stated"),
    "no held-out file": (lambda d: (*good(d), f"data.sensitive.test_path={d / 'lost.npz'}"),
        "lost.npz: no such file"),
    "a strange class": (lambda d: with_held_out(d, classes=np.array(["x", "y", "w"])),
        "test.npz: its class 'w' is no class"),
    "no public folder": (lambda _: ("data.public.kind=folder", "data.public.path=lost"),
        "lost: no such file or folder"),
    "no public path": (lambda _: ("data.public.kind=beton",), "data.public.path: kind beton needs one"),
    "no public set for features": (
        lambda _: ("method=dp-merf", "match.embedding=network", "data.public.kind=npz",
            "data.public.path=lost.npz"),
        "lost.npz: no such file or folder",
    ),
    "another shape": (public_store,
        "public.npy: holds images of shape (1, 16, 16), data.channels and data.resolution"),
    "one public class": (lambda d: (*public_npz(d), *good(d)),
        "query.semantics: the public set has one class"),
    "clusters": (lambda _: ("query.semantics=clusters", "query.clusters=2000"),
        "query.clusters: 2000 are more than the 960"),
    "k1": (lambda _: ("select.per_image=49",), "select.per_image: 49 is more than the 48 public classes"),
    "k2": (lambda _: ("select.per_class=5",),
        "select.per_class: 10 sensitive classes times 5 are more than the 48"),
    "k2 by lot": (lambda _: ("method=random+d", "select.per_class=5"),
        "select.per_class: 10 sensitive classes times 5"),
    "batch": (lambda _: ("finetune.logical_batch_size=1438",),
        "finetune.logical_batch_size: 1438 is more than the 1437"),
    "epsilon": (lambda _: ("select.noise_multiplier=0.1",),
        "privacy.epsilon: 10.0 at delta 0.0001 cannot be kept"),
    "levels": (lambda _: ("model.multipliers=[1,2,2,2,2]",),
        "model.multipliers: 5 levels need a data.resolution divisible"),
    "map of a GAN": (lambda _: ("method=dpgan", "data.resolution=22"),
        "data.resolution: the GAN doubles a map"),
    "engine": (lambda _: ("method=privimage+g", DEEPSPEED),
        "pretrain.engine: deepspeed trains one network and a GAN has two"),
    "no DeepSpeed file": (lambda d: (DEEPSPEED, f"pretrain.deepspeed_config={d / 'ds.json'}"),
        "pretrain.deepspeed_config: "),
    "DeepSpeed file": (file_of(b"{", "pretrain.deepspeed_config", "ds.json", DEEPSPEED), "ds.json: "),
    "ZeRO 3": (
        file_of(json.dumps({"zero_optimization": {"stage": 3}}).encode(), "pretrain.deepspeed_config",
            "ds.json", DEEPSPEED),
        "ds.json: zero_optimization.stage: ",
    ),
    "no weights": (file_of(None, "evaluate.inception_weights", "weights.pth"),
        "evaluate.inception_weights: "),
    "no features": (lambda _: ("evaluate.features='2048'",),
        "evaluate.inception_weights: evaluate.features=2048 needs"),
    "damaged weights": (file_of(b"text", "evaluate.inception_weights", "weights.pth"),
        "weights.pth: not a state dict"),
    "weights of no network of features": (no_features,
        "weights.pth: neither DINOv2's nor CLIP's vision transformer, nor Inception"),
    "other weights": (other_weights, "weights.pth: these are not the Inception 2015-12-05 weights"),
    "no vectors": (file_of(None, "evaluate.word_vectors", "words.npz"),
        "words.npz: No such file or directory"),
    "other vectors": (lambda d: (f"evaluate.word_vectors={save_npz(d / 'words.npz', LABELS, LABELS)}",),
        "words.npz: expected"),
    "an array for vectors": (
        lambda d: (np.save(d / "words.npy", LABELS), f"evaluate.word_vectors={d / 'words.npy'}")[1:],
        "evaluate.word_vectors: ",
    ),
    "ledger": (file_of(b"", "privacy.ledger", "file"), "privacy.ledger: "),
    "run directory": (file_of(b"", "run.dir", "file", ""), "run.dir: "),
}
# fmt: on


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_begun(
    mistake: str, door: Callable, tmp_path: Path
) -> None:
    prepare, told = MISTAKES[mistake]
    status, lines, ran = door(*(word for word in prepare(tmp_path) if word))
    errors = [line for line in lines if "held-out images: no accuracy" not in line and "in 0 s" not in line]
    assert (status, ran) == (2, [])
    assert len(errors) == 1 and errors[0].startswith("privimage: error: ") and told in errors[0], errors
    if mistake != "run directory":
        assert {entry.name for entry in (tmp_path / "run").iterdir()} <= BEGINNING


def test_all_mistakes_are_told_at_once_and_the_run_goes_on_when_they_are_mended(
    door: Callable, tmp_path: Path
) -> None:
    wrong = (
        "data.public.kind=npz",
        "data.public.path=lost.npz",
        "finetune.logical_batch_size=9999",
        "evaluate.word_vectors=lost",
    )
    status, lines, ran = door(*wrong)
    assert (status, ran) == (2, [])
    assert [line.split(": ")[2] for line in lines] == [
        "lost.npz",
        "evaluate.word_vectors",
        "finetune.logical_batch_size",
    ]
    assert all(line.startswith("privimage: error: ") for line in lines)
    assert (RunDir(tmp_path / "run").failure or "").endswith("no such file or folder (and 2 more)")
    assert door()[::2] == (0, list(load(TINY, []).stages))


def test_only_what_is_still_to_be_done_is_looked_at(door: Callable, tmp_path: Path) -> None:
    lost = (
        "data.sensitive.kind=npz",
        "data.sensitive.path=lost.npz",
        "data.public.kind=npz",
        "data.public.path=lost.npz",
    )
    assert "lost.npz" in door(*lost, stages=("query", "select"))[1][0]
    assert door(*lost, stages=("query",))[0] == 0  # which needs neither
    for stage in load(TINY, []).stages:
        write_json(
            RunDir(tmp_path / "run").stage(stage) / "done.json", {"images": 1, "count": 1, "classes": ["a"]}
        )
    assert door(*lost)[0] == 0


def test_without_held_out_images_the_run_goes_on_and_says_what_will_be_missing(
    door: Callable, tmp_path: Path
) -> None:
    status, lines, _ = door(*good(tmp_path))
    assert status == 0
    assert lines[:1] == [
        "evaluate: data.sensitive.test_path names no held-out images: no accuracy will be measured"
    ]
    # Thirty images are few, which is said too.
    assert len(lines) == 2 and "times the largest signal that 30 images can give" in lines[1]


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (
            "torch_fidelity",
            "evaluate: needs torch_fidelity, which is not installed; pip install torch-fidelity",
        ),
        ("tensorboard", "query: needs tensorboard, which is not installed; pip install tensorboard"),
        ("deepspeed", "pretrain: needs deepspeed, which is not installed; pip install 'privimage[cluster]'"),
        ("ffcv", "data.store: beton needs FFCV"),
    ],
)
def test_a_package_of_a_later_stage_is_looked_for(
    module: str, told: str, door: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    more = {"deepspeed": (DEEPSPEED,), "ffcv": ("data.store=beton",)}.get(module, ())
    status, lines, ran = door(*more)
    assert (status, ran, len(lines)) == (2, [], 1)
    assert told in lines[0]


def test_a_disk_without_room_is_told_with_the_numbers(
    door: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 << 20))
    status, lines, ran = door("synthesize.samples=500000")
    assert (status, ran, len(lines)) == (2, [], 1)
    assert "run has 3 MiB free and the run will write about " in lines[0]
    assert "synthesize 62 MiB" in lines[0]  # images, and the weights in two files


@pytest.mark.parametrize(
    "method", ["pdp-diffusion", "dpdm", "privimage+g", "dp-merf", "private-evolution", "nonprivd", "nonpriv"]
)
def test_other_methods_pass(method: str, door: Callable) -> None:
    status, lines, ran = door(f"method={method}")
    assert (status, lines, ran) == (0, [], list(load(TINY, [f"method={method}"]).stages))


def test_the_plan_that_was_made_at_the_door_is_not_made_again(
    door: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privimage.privacy import calibration
    from privimage.privacy.plan import make_plan

    made = ("privacy.accountant=rdp", "privacy.epsilon=9.5")
    assert door(*made)[0] == 0
    monkeypatch.setattr(calibration, "_search", lambda *_: pytest.fail("made again"))
    assert make_plan(load(TINY, made), 1437).training.noise_multiplier > 0


SCRIPT = """
import sys
from privimage.runs import pipeline
from privimage.config import load
pipeline._run_stage = lambda name, *_: print("ran", name)
tiny, folder, *overrides = sys.argv[1:]
import os
words = [word.replace("RANK", os.environ["RANK"]) for word in (f"run.dir={folder}", *overrides)]
sys.exit(pipeline.run(load(tiny, words)))
"""


@pytest.mark.parametrize("where", ["every rank", "rank 1", "run directory"])
def test_all_ranks_end_together_with_one_message(where: str, tmp_path: Path) -> None:
    overrides, folder = list(good(tmp_path)), tmp_path / "run"
    if where == "every rank":
        (tmp_path / "set.npz").unlink()
        told = f"privimage: error: {tmp_path / 'set.npz'}: no such file or folder\n"
    elif where == "rank 1":
        shutil.copy(tmp_path / "set.npz", tmp_path / "set0.npz")
        overrides[1] = f"data.sensitive.path={tmp_path}/setRANK.npz"
        told = f"privimage: error: rank 1: {tmp_path}/set1.npz: no such file or folder\n"
    else:
        folder = tmp_path / "runRANK"
        told = f"privimage: error: rank 1: run.dir: {tmp_path}/run1 is not what the main rank sees there"
    ended = run_ranks(SCRIPT, 2, str(TINY), str(folder), *overrides, "data.sensitive.test_path=null")
    assert [rank.status for rank in ended] == [2, 2]
    assert "ran" not in "".join(rank.out for rank in ended)
    errors = [line for rank in ended for line in rank.err.splitlines(keepends=True) if "error" in line]
    assert len(errors) == 1 and errors[0].startswith(told)


def test_the_ranks_that_met_a_mistake_are_named() -> None:
    found = [["shared", "both"], ["both", "local"], ["local"], []]
    assert preflight.together(found) == ["shared", "both", "ranks 1, 2: local"]
