"""What an owner or administrator may do to the files of a run between two starts, and what must hold after
each of it.

A release states at least what was drawn for it, or there is none; and no noise hides two different things.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import spy
from data_sets import read
from ranks import TINY, run_ranks

from privimage.config import Config, load
from privimage.data.readers import open_source
from privimage.distributed import checkpoint
from privimage.families.denoising import DiffusionPrivate
from privimage.privacy.accounting import epsilon
from privimage.privacy.plan import plan_from_dict
from privimage.runs import pipeline
from privimage.storage.files import read_json

STEPS = 6
METHODS = {"dpdm": "finetune", "dp-merf": "match"}
SMALL = ("finetune.steps=6", "finetune.checkpoint_every=1", "match.steps=2", "synthesize.samples=10")


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[spy.Draw]:
    """All noise that the test draws."""
    found: list[spy.Draw] = []
    spy.install(found.append, monkeypatch.setattr)
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The sensitive set as a file that can be changed: 120 digits."""
    digits = read(open_source("digits", None, "train"), 8, 1, 0)
    keep = np.sort(np.random.default_rng(0).permutation(len(digits.images))[:120])
    write(tmp_path / "set.npz", digits.images[keep, 0], digits.labels[keep])
    return tmp_path / "set.npz"


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.savez(path, images=images, labels=labels, classes=np.array([str(c) for c in range(10)]))


def settings(folder: Path, images: Path, *overrides: str) -> Config:
    data = (
        "data.sensitive.kind=npz",
        f"data.sensitive.path={images}",
        f"privacy.ledger={images.parent / 'ledgers'}",
        "finetune.logical_batch_size=30",
    )
    return load(TINY, ["method=dpdm", *SMALL, *data, f"run.dir={folder}", *overrides])


def go(config: Config, stop_after: int | None = None, stages: tuple[str, ...] | None = None) -> int:
    """Run up to the release; a signal comes in private step number `stop_after`."""
    step = DiffusionPrivate.after_step

    def signalled(self: DiffusionPrivate, number: int) -> dict:
        if number == (stop_after or 0) - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return step(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPrivate, "after_step", signalled)
        return pipeline.run(config, stages or config.stages[:-1])


def stated(folder: Path) -> dict:
    return read_json(folder / "release" / "PRIVACY.json")


def released(folder: Path) -> bool:
    return (folder / "release" / "PRIVACY.json").exists()


def true_epsilon(folder: Path, draws: list[spy.Draw]) -> float:
    """What was spent, from the log of noise draws and the plan's noise."""
    plan = plan_from_dict(read_json(folder / "private" / "account.json")["plan"])
    parts = [(part.composition, spy.uses(draws, part.stage)) for part in plan.mechanisms]
    return epsilon(
        [type(m)(m.noise_multiplier, m.sample_rate, count) for m, count in parts if count],
        plan.delta,
        plan.accountant,
    )


def assert_honest(folder: Path, draws: list[spy.Draw]) -> None:
    assert stated(folder)["epsilon"] >= true_epsilon(folder, draws) - 1e-6
    assert spy.uses(draws, "finetune") <= STEPS and not spy.one_noise_for_two(draws)


# 1. The ledger and the place of a run.


@pytest.mark.parametrize("steps", [1, 5])
def test_a_run_that_moves_goes_on_and_states_all_its_steps(
    tmp_path: Path, images: Path, draws: list, steps: int
) -> None:
    assert go(settings(tmp_path / "a", images), steps + 1) == 75
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "other" / "a")
    assert go(settings(tmp_path / "other" / "a", images)) == 0
    assert stated(tmp_path / "other" / "a")["mechanisms"][0]["count"] == STEPS
    assert_honest(tmp_path / "other" / "a", draws)


def lose(ledgers: Path, before: Path) -> None:
    shutil.rmtree(ledgers)


def restore(ledgers: Path, before: Path) -> None:
    shutil.rmtree(ledgers)
    shutil.copytree(before, ledgers)


def begin_another(ledgers: Path, before: Path) -> None:
    for path in ledgers.iterdir():
        path.write_text('{"ledger": "0123456789abcdef"}\n' + "{}\n" * 100)


@pytest.mark.parametrize("change", [lose, restore, begin_another])
@pytest.mark.parametrize("when", ["finetune", "synthesize"])
def test_a_ledger_that_is_lost_older_or_another_releases_nothing_until_it_is_brought_back(
    tmp_path: Path, images: Path, draws: list, capfd: pytest.CaptureFixture, change: Callable, when: str
) -> None:
    config, ledgers = settings(tmp_path / "a", images), tmp_path / "ledgers"
    assert go(config, 2) == 75
    shutil.copytree(ledgers, tmp_path / "before")
    assert go(config, 5) == 75 if when == "finetune" else go(config, stages=("finetune",)) == 0
    shutil.copytree(ledgers, tmp_path / "true")
    change(ledgers, tmp_path / "before")
    capfd.readouterr()
    assert go(config) == 2 and not released(tmp_path / "a")
    told = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert (
        len(told) == 1
        and "the ledger of the sensitive set is" in told[0]
        and "bring back the file" in told[0]
    )
    shutil.rmtree(ledgers, ignore_errors=True)
    shutil.copytree(tmp_path / "true", ledgers)
    assert go(config) == 0 and stated(tmp_path / "a")["mechanisms"][0]["count"] == STEPS
    assert_honest(tmp_path / "a", draws)


def test_a_run_behind_a_symlink_uses_the_same_ledger(tmp_path: Path, images: Path, draws: list) -> None:
    for name in ("a", "elsewhere"):
        (tmp_path / name).mkdir()
    assert go(settings(tmp_path / "a" / "run", images, "privacy.ledger=null"), 5) == 75
    (tmp_path / "elsewhere" / "run").symlink_to(tmp_path / "a" / "run")
    assert go(settings(tmp_path / "elsewhere" / "run", images, "privacy.ledger=null")) == 0
    assert stated(tmp_path / "a" / "run")["mechanisms"][0]["count"] == STEPS
    assert_honest(tmp_path / "a" / "run", draws)


def test_deleting_what_a_released_run_made_does_not_release_something_else(
    tmp_path: Path, images: Path, draws: list, capfd: pytest.CaptureFixture
) -> None:
    assert go(settings(tmp_path / "a", images)) == 0
    for name in ("finetune", "synthesize", "release"):
        shutil.rmtree(tmp_path / "a" / name)
    assert go(settings(tmp_path / "a", images)) == 2 and not released(tmp_path / "a")
    assert (
        "all private steps of this run were made before, and what they made is lost" in capfd.readouterr().err
    )
    assert spy.uses(draws, "finetune") == STEPS


# 2. The same noise for two computations.


def relabel(images: Path, folder: Path) -> None:
    with np.load(images) as file:
        pixels, labels = file["images"], file["labels"].copy()
    labels[3] = (labels[3] + 1) % 10
    write(images, pixels, labels)


def reorder(images: Path, folder: Path) -> None:
    with np.load(images) as file:
        write(images, file["images"][::-1], file["labels"][::-1])


def without(*names: str) -> Callable[[Path, Path], None]:
    def delete(images: Path, folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return delete


def edit_checkpoint(images: Path, folder: Path) -> None:
    path = folder / "finetune" / "checkpoint.pt"
    state = checkpoint.load(path)
    assert state is not None
    next(value for value in state["module"].values() if value.is_floating_point() and value.dim() > 1)[0] += (
        1e-3
    )
    checkpoint.save(path, state)


CHANGES = {
    "nothing": lambda images, folder: None,
    "relabelled": relabel,
    "reordered": reorder,
    "no account": without("private/account.json"),
    "no key": without("private/root.key"),
    "no private files": without("private"),
    "no checkpoint": without("finetune/checkpoint.pt"),
    "no kernels": without("finetune/kernels.json"),
    "other weights": edit_checkpoint,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_no_noise_hides_two_sums_and_every_step_is_stated(
    tmp_path: Path, images: Path, draws: list, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A crash after step 4 with the checkpoint of step 3: one step was drawn and lost."""
    config = settings(tmp_path / "a", images)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", crash_at_step(4))
        assert go(config) == 1
    assert spy.uses(draws, "finetune") == 4
    CHANGES[change](images, tmp_path / "a")
    status = go(config)
    assert not spy.one_noise_for_two(draws)
    drawn = spy.uses(draws, "finetune")
    assert status == 0 and stated(tmp_path / "a")["mechanisms"][0]["count"] == STEPS
    if change == "no private files":  # a run of its own from then on, which goes on from three steps
        assert drawn == 4 + 3
        return
    assert_honest(tmp_path / "a", draws)
    weights = checkpoint.load(tmp_path / "a" / "finetune" / "weights.pt")
    assert weights is not None
    lost = 1 if change in ("relabelled", "no key", "other weights") else 0  # the step that cannot be repeated
    assert weights["steps"] == STEPS - lost or change == "no kernels"  # which are found anew by the clock


def crash_at_step(step: int) -> Callable:
    save = checkpoint.save

    def crashing(path: Path, state: dict) -> None:
        if state.get("step") == step:
            raise RuntimeError("crash")
        save(path, state)

    return crashing


def test_two_copies_that_go_on_have_noise_and_charges_of_their_own(
    tmp_path: Path, images: Path, draws: list, capfd: pytest.CaptureFixture
) -> None:
    assert go(settings(tmp_path / "a", images), 3) == 75
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = len(draws)
    assert go(settings(tmp_path / "a", images)) == 0
    middle = len(draws)
    capfd.readouterr()
    assert go(settings(tmp_path / "b", images)) == 0
    assert f"{tmp_path / 'b'}: a copy of {tmp_path / 'a'}, now a separate run" in capfd.readouterr().err
    assert not {draw.key for draw in draws[before:middle]} & {draw.key for draw in draws[middle:]}
    for folder in ("a", "b"):
        assert stated(tmp_path / folder)["mechanisms"][0]["count"] == STEPS
    runs = [read_json(tmp_path / folder / "private" / "account.json")["run"] for folder in ("a", "b")]
    assert runs[0] != runs[1]


def test_an_older_snapshot_repeats_what_was_drawn_and_pays_for_what_was_not(
    tmp_path: Path, images: Path, draws: list
) -> None:
    config = settings(tmp_path / "a", images)
    assert go(config, 3) == 75
    shutil.copytree(tmp_path / "a", tmp_path / "snapshot")
    assert go(config, 5) == 75
    drawn = spy.uses(draws, "finetune")
    shutil.rmtree(tmp_path / "a")
    shutil.move(tmp_path / "snapshot", tmp_path / "a")
    assert go(config, 5) == 75 and spy.uses(draws, "finetune") == drawn  # to the bit
    shutil.rmtree(tmp_path / "a" / "release", ignore_errors=True)
    relabel(images, tmp_path / "a")
    assert go(config) == 0
    assert_honest(tmp_path / "a", draws)


def test_a_corrected_label_gives_the_embedding_no_second_draw(
    tmp_path: Path, images: Path, draws: list, capfd: pytest.CaptureFixture
) -> None:
    """Two embeddings under one noise would differ by the features of that image, from which all its pixels
    come back.
    """
    config = settings(tmp_path / "a", images, "method=dp-merf")
    assert go(config) == 0
    for name in ("match", "synthesize", "release"):
        shutil.rmtree(tmp_path / "a" / name)
    relabel(images, tmp_path / "a")
    assert (
        go(config) == 2 and "the noisy mean embedding of this run was drawn before" in capfd.readouterr().err
    )
    assert go(settings(tmp_path / "b", images, "method=dp-merf")) == 0
    assert spy.uses(draws, "match") == 2 and not spy.one_noise_for_two(draws)


@pytest.mark.parametrize("change", [relabel, reorder])
def test_a_histogram_is_asked_for_once(tmp_path: Path, images: Path, draws: list, change: Callable) -> None:
    config = settings(
        tmp_path / "a",
        images,
        "method=privimage+d",
        "pretrain.steps=2",
        "select.per_class=1",
        "query.steps=2",
    )
    assert go(config, stages=("prepare", "query", "select")) == 0
    shutil.rmtree(tmp_path / "a" / "select")
    change(images, tmp_path / "a")
    assert go(config, stages=("select",)) == (2 if change is relabel else 0)  # another order is the same set
    assert spy.uses(draws, "select") == 1 and not spy.one_noise_for_two(draws)


# 2b. Ranks with copies of their own.

RANK = """
import os
import sys
from pathlib import Path
from privimage.runs import pipeline
from privimage.config import load
second = len(sys.argv) > 3 and os.environ["RANK"] == "1"
place = Path(sys.argv[2]) / ("second" if second else "first")
config = load(sys.argv[1], ["method=dpdm", "data.sensitive.kind=folder", f"data.sensitive.path={place}",
    "finetune.logical_batch_size=30",
    "finetune.steps=3", "synthesize.samples=10", f"run.dir={sys.argv[2]}/run", *sys.argv[4:]])
sys.exit(pipeline.run(config, ["finetune", "synthesize"]))
"""


@pytest.fixture
def folders(tmp_path: Path, images: Path) -> Path:
    """The set as two folders, as on two nodes' disks: the same images under names that sort differently."""
    from PIL import Image

    with np.load(images) as file:
        for number, (pixels, label) in enumerate(zip(file["images"], file["labels"], strict=True)):
            for place, name in (("first", number), ("second", 1000 - number)):
                path = tmp_path / place / str(label) / f"{name:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return tmp_path


def test_ranks_whose_folders_list_in_another_order_have_the_same_set(folders: Path) -> None:
    ended = run_ranks(RANK, 2, str(TINY), str(folders), "apart")
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert stated(folders / "run")["mechanisms"][0]["count"] == 3


def stale(folders: Path) -> None:
    next((folders / "second" / "3").iterdir()).unlink()


def moved_to_another_class(folders: Path) -> None:
    image = next((folders / "second" / "3").iterdir())
    image.rename(folders / "second" / "4" / "moved.png")


@pytest.mark.parametrize("change", [stale, moved_to_another_class])
def test_a_rank_whose_copy_differs_is_named_before_anything_is_drawn(folders: Path, change: Callable) -> None:
    change(folders)
    ended = run_ranks(RANK, 2, str(TINY), str(folders), "apart")
    assert [rank.status for rank in ended] == [2, 2]
    told = [line for rank in ended for line in rank.err.splitlines() if "error" in line]
    assert told and all("not the same on all ranks: rank 1 differ from rank 0" in line for line in told)
    assert not (folders / "run" / "private" / "account.json").exists()


def test_on_two_ranks_a_run_that_moves_states_all_its_steps_and_a_lost_ledger_releases_nothing(
    folders: Path,
) -> None:
    assert [rank.status for rank in run_ranks(RANK, 2, str(TINY), str(folders), "apart")] == [0, 0]
    shutil.rmtree(folders / "run" / "synthesize")
    shutil.rmtree(folders / "run" / "release")
    shutil.move(folders / "run", folders / "moved")
    at = (f"run.dir={folders}/moved",)
    shutil.move(folders / "ledgers", folders / "hidden")
    ended = run_ranks(RANK, 2, str(TINY), str(folders), "apart", *at)
    assert [rank.status for rank in ended] == [2, 2] and any(
        "is missing; bring back" in rank.err for rank in ended
    )
    assert not released(folders / "moved")
    ended = run_ranks(RANK, 2, str(TINY), str(folders), "apart", *at, f"privacy.ledger={folders}/hidden")
    assert [rank.status for rank in ended] == [0, 0] and stated(folders / "moved")["mechanisms"][0][
        "count"
    ] == 3


# Statements.


def test_a_fixed_key_of_an_earlier_start_is_told(tmp_path: Path, images: Path) -> None:
    """The settings of the last start do not say with which key the steps were made, the ledger does."""
    assert go(settings(tmp_path / "a", images, "privacy.insecure_fixed_key=3"), 3) == 75
    (tmp_path / "a" / "config.yaml").unlink()
    assert go(settings(tmp_path / "a", images)) == 0
    assert (
        stated(tmp_path / "a")["private"] is False
        and stated(tmp_path / "a")["reason"] == "not private: a fixed key was used"
    )


def test_what_a_budget_refuses_leaves_no_plan_behind(tmp_path: Path, images: Path) -> None:
    budget = ("privacy.budget.epsilon=3", "privacy.budget.delta=1e-4")
    assert go(settings(tmp_path / "a", images, *budget)) == 2
    assert not (tmp_path / "a" / "private" / "account.json").exists()
    assert go(settings(tmp_path / "a", images, *budget, "privacy.epsilon=2")) == 0
    assert 1.9 < stated(tmp_path / "a")["epsilon"] <= 2
    assert go(settings(tmp_path / "b", images)) == 2  # a run that does not name the budget


def test_an_account_of_an_older_version_is_refused_in_one_line(
    tmp_path: Path, images: Path, capfd: pytest.CaptureFixture
) -> None:
    assert go(settings(tmp_path / "a", images), 3) == 75
    path = tmp_path / "a" / "private" / "account.json"
    path.write_text(path.read_text().replace('"version": 4,', ""))
    assert go(settings(tmp_path / "a", images)) == 2
    assert f"{path}: made by another version" in capfd.readouterr().err


def test_weights_without_a_charge_for_each_step_are_not_released(
    tmp_path: Path, images: Path, capfd: pytest.CaptureFixture
) -> None:
    config = settings(tmp_path / "a", images)
    assert go(config, stages=("finetune",)) == 0
    path = tmp_path / "a" / "finetune" / "weights.pt"
    weights = checkpoint.load(path)
    assert weights is not None
    for charges, told in (
        (weights["charges"]["finetune"][1:], "5 of the 6 uses"),
        ([*weights["charges"]["finetune"], "unknown"], "1 of the 7 uses"),
    ):
        checkpoint.save(path, weights | {"charges": {"finetune": charges}})
        assert go(config) == 2 and told in capfd.readouterr().err and not released(tmp_path / "a")


def test_public_curves_hold_no_times_and_no_memory(tmp_path: Path, images: Path) -> None:
    """Both follow the sizes of the Poisson batches."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert go(settings(tmp_path / "a", images), stages=("finetune",)) == 0
    public = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "finetune")).Reload()
    assert set(public.Tags()["scalars"]) == {"learning rate", "epsilon"}
    for name in public.Tags()["scalars"]:
        assert all(event.wall_time == event.step for event in public.Scalars(name))
