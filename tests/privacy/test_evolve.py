"""Private Evolution's stage.

Each histogram charged once, none drawn again with other noise, the same on any number of ranks.
"""

import os
import shutil
import signal
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY, charges, run_ranks, run_stages

from privimage.config import Config, load
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.families.evolution import Population
from privimage.models import vit
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.identity import settings_read
from privimage.privacy.mechanisms.histogram import ONE, noisy_histogram, vote_counts
from privimage.runs import pipeline
from privimage.stages import evolve
from privimage.stages.nearest import Features
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

FIXED = (
    "method=private-evolution",
    "privacy.insecure_fixed_key=7",
    "pretrain.steps=8",
    "query.steps=6",
    "evolve.lookahead=2",
)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with all public stages finished."""
    folder = tmp_path_factory.mktemp("public") / "run"
    run_stages(folder, ("prepare", "query", "pretrain"), *FIXED)
    return folder


@pytest.fixture
def folder(public: Path, tmp_path: Path) -> Path:
    """A copy of it, with a ledger of its own."""
    return shutil.copytree(public, tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the stage from the beginning to the end."""
    folder = shutil.copytree(public, tmp_path_factory.mktemp("undisturbed") / "run")
    assert pipeline.run(settings(folder), ["evolve"]) == 0
    return folder


def settings(folder: Path, *overrides: str) -> Config:
    return load(TINY, [*FIXED, f"run.dir={folder}", *overrides])


def population(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "evolve" / "weights.pt")
    assert state is not None
    return {name: state["ema"][name] for name in ("images", "traits", "chances")}


def same(one: Path, other: Path) -> bool:
    return all(torch.equal(value, population(other)[name]) for name, value in population(one).items())


def crash_at(number: int) -> Callable:
    """In place of the function that keeps a checkpoint: the `number`-th call fails."""
    calls = []

    def save(path: Path, state: dict) -> None:
        calls.append(path)
        if len(calls) == number:
            raise RuntimeError("crash")
        checkpoint.save(path, state)

    return save


class Checkpoints:
    """The module `checkpoint` with another `save`."""

    def __init__(self, save: Callable):
        self.save, self.load, self.required = save, checkpoint.load, checkpoint.required


def test_the_ledger_holds_the_planned_uses_and_nothing_else(undisturbed: Path) -> None:
    plan = read_json(undisturbed / "private" / "account.json")["plan"]
    (used,) = plan["mechanisms"]
    assert sorted(used) == ["iterations", "noise_multiplier", "per_image", "relation", "stage"]
    assert charges(undisturbed) == (SampledGaussian(used["noise_multiplier"], 1.0, 3),)


def test_the_population_has_the_planned_form(undisturbed: Path) -> None:
    found = population(undisturbed)
    assert found["images"].shape == (10, 7, 1, 8, 8) and found["images"].dtype == torch.uint8
    classes = read_json(undisturbed / "prepare" / "done.json")["classes"]
    assert found["traits"].shape == (10, 7, 1) and found["traits"].min() >= 0
    assert found["traits"].max() < len(classes) and found["traits"].frac().eq(0).all()
    torch.testing.assert_close(found["chances"].sum(1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_crash_after_a_charge_is_repeated_to_the_bit_and_charged_once(
    folder: Path, undisturbed: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evolve, "checkpoint", Checkpoints(crash_at(number)))
        assert pipeline.run(settings(folder), ["evolve"]) == 1
    assert charges(folder)[0].count == number
    assert pipeline.run(settings(folder), ["evolve"]) == 0
    assert same(folder, undisturbed) and charges(folder) == charges(undisturbed)


def test_in_another_arrangement_a_lost_histogram_is_charged_and_one_fewer_is_drawn(
    folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding could differ there: fresh noise, and the charges stay those of the plan."""
    noises = []

    def histogram(votes: np.ndarray, labels: np.ndarray, groups: np.ndarray, shape, *rest) -> np.ndarray:
        found = noisy_histogram(votes, labels, groups, shape, *rest)
        noises.append(found - vote_counts(votes, labels, groups, shape, 1) / ONE)
        return found

    monkeypatch.setattr(evolve, "noisy_histogram", histogram)
    with monkeypatch.context() as patch:
        patch.setattr(evolve, "checkpoint", Checkpoints(crash_at(2)))
        assert pipeline.run(settings(folder), ["evolve"]) == 1
    assert pipeline.run(settings(folder, "runtime.threads=2"), ["evolve"]) == 0
    torch.set_num_threads(1)
    record = read_json(folder / "evolve" / "done.json")
    assert record["iterations"] == 2
    assert charges(folder) == charges(undisturbed)
    assert len(noises) == 3
    assert all(not np.isclose(one, other).any() for one, other in combinations(noises, 2))


def test_where_all_histograms_were_lost_the_run_ends_with_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evolve, "checkpoint", Checkpoints(crash_at(1)))
        assert pipeline.run(settings(folder, "evolve.iterations=1"), ["evolve"]) == 1
    capfd.readouterr()
    assert pipeline.run(settings(folder, "evolve.iterations=1", "runtime.threads=2"), ["evolve"]) == 2
    torch.set_num_threads(1)
    assert (
        "all histograms of this run were drawn before, and what they made is lost; choose another run.dir"
        in capfd.readouterr().err
    )
    assert charges(folder)[0].count == 1


@pytest.mark.parametrize(("made", "counted"), [("offspring", 1), ("ahead", 0)])
def test_a_stopped_evolution_goes_on_to_the_same_population(
    folder: Path, undisturbed: Path, made: str, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request comes while the second generation is made, or in the look-ahead of the first.

    What was begun is made again, and no vote is lost or repeated.
    """
    make = getattr(Population, made)

    def signalled(self: Population, *arguments) -> tuple:
        os.kill(os.getpid(), signal.SIGUSR2)
        return make(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Population, made, signalled)
        assert pipeline.run(settings(folder), ["evolve"]) == 75
    assert sum(charge.count for charge in charges(folder)) == counted
    assert pipeline.run(settings(folder), ["evolve"]) == 0
    assert same(folder, undisturbed) and charges(folder) == charges(undisturbed)


def vision_weights(path: Path, seed: int = 0) -> Path:
    """The weights of a DINOv2 of one layer and four patches."""
    torch.manual_seed(seed)
    torch.save(vit.VisionTransformer(vit.Size(64, 1, 112, 2, 0, clip=False)).state_dict(), path)
    return path


def test_a_simulator_and_a_given_network_need_no_public_stage(tmp_path: Path) -> None:
    """Each takes the place of the network that a stage trains."""
    own, rest = f"evolve.features={vision_weights(tmp_path / 'w.pth')}", ("evolve", "synthesize", "evaluate")
    folder, simulated = tmp_path / "run", "evolve.api=glyphs"
    assert settings(folder, own).stages == ("prepare", "pretrain", *rest)
    assert settings(folder, simulated).stages == ("prepare", "query", *rest)
    config = settings(folder, own, simulated, "evolve.iterations=1")
    assert config.stages == rest
    assert pipeline.run(config, ["evolve", "synthesize"]) == 0
    found = population(folder)
    assert found["traits"].shape == (10, 7, 41) and (found["images"].flatten(2).max(2).values > 100).all()
    assert "A renderer of characters, in place of a model" in (folder / "release" / "README.md").read_text()


def test_computations_are_named_by_the_weights_of_a_given_network_not_by_their_place(tmp_path: Path) -> None:
    digests, alone = [], World(0, 0, 1, 1, torch.device("cpu"))
    (tmp_path / "elsewhere").mkdir()
    for name, seed in (("a.pth", 0), ("elsewhere/b.pth", 0), ("c.pth", 1)):
        config = settings(tmp_path / "run", f"evolve.features={vision_weights(tmp_path / name, seed)}")
        features = Features(config, RunDir(tmp_path / "run"), alone)
        assert features(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, features.width) == (3, 64)
        assert "evolve.features" not in settings_read(config, "evolve")
        digests.append(features.digest)
    assert digests[0] == digests[1] != digests[2]


RANK = """
import sys
from privimage.runs import pipeline
from privimage.config import load
sys.exit(pipeline.run(load(sys.argv[1], sys.argv[2:]), ["evolve", "synthesize"]))
"""


def test_two_ranks_come_to_the_population_of_one_to_the_bit(folder: Path, undisturbed: Path) -> None:
    for ended in run_ranks(RANK, 2, str(TINY), *FIXED, f"run.dir={folder}"):
        assert ended.status == 0, ended.err
    assert read_json(folder / "evolve" / "done.json")["ranks"] == 2
    assert same(folder, undisturbed) and charges(folder) == charges(undisturbed)


def test_an_unlabelled_set_is_one_class(folder: Path) -> None:
    shutil.rmtree(folder / "private", ignore_errors=True)
    (folder / "config.yaml").unlink()
    assert (
        pipeline.run(
            settings(folder, "data.sensitive.labelled=false", "evolve.iterations=1"), ["evolve", "synthesize"]
        )
        == 0
    )
    assert population(folder)["images"].shape == (1, 7, 1, 8, 8)
    assert (folder / "release" / "synthetic.npz").exists()


def test_what_is_computed_on_sensitive_images_without_noise_is_in_private_only(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    public, private = (
        EventAccumulator(str(path / "evolve")).Reload().Tags()["scalars"]
        for path in (undisturbed / "tensorboard", undisturbed / "private" / "tensorboard")
    )
    assert set(public) == {"images with votes"}  # and epsilon, where the key is not a fixed one
    assert set(private) == {"mean distance of a vote"}


def test_a_public_set_without_labels_serves_too(tmp_path: Path) -> None:
    """The query network has then learnt from views of images, not from labels."""
    config = settings(tmp_path / "run", "data.public.labelled=false", "evolve.iterations=1")
    assert pipeline.run(config, ["prepare", "query", "pretrain", "evolve"]) == 0
    assert population(tmp_path / "run")["traits"].max() == 0
