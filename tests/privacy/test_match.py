"""DP-MERF's stage: one embedding, charged once, never drawn again.

What follows sees nothing else of the sensitive images.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, read_sensitive, save_npz
from ranks import TINY, charges, run_ranks
from scipy import stats

from privimage.config import Config, load
from privimage.config.seeds import public_seed
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.families.matching import MatchedGenerator
from privimage.models.edm import to_unit
from privimage.models.network_moments import NetworkMoments, Scales, pooled
from privimage.models.random_features import RandomFeatures
from privimage.models.resnet import classifier
from privimage.privacy.accounting import SampledGaussian
from privimage.runs import pipeline
from privimage.stages import noisy_statistic
from privimage.storage.files import read_json

FIXED = ("method=dp-merf", "privacy.insecure_fixed_key=7")


def settings(folder: Path, *overrides: str) -> Config:
    return load(TINY, [*FIXED, f"run.dir={folder}", *overrides])


def embedding(folder: Path) -> np.ndarray:
    return np.load(folder / "match" / "embedding.npz")["values"][:-1].reshape(-1, 60)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "match" / "weights.pt")
    assert state is not None
    return state["ema"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the stage from the beginning to the end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert pipeline.run(settings(folder), ["match"]) == 0
    return folder


def test_the_ledger_holds_one_use_of_the_plan_and_nothing_else(undisturbed: Path) -> None:
    plan = read_json(undisturbed / "private" / "account.json")["plan"]
    (used,) = plan["mechanisms"]
    assert sorted(used) == ["count", "features", "network", "noise_multiplier", "relation", "stage"]
    assert used["count"] == 1437
    assert charges(undisturbed) == (SampledGaussian(used["noise_multiplier"]),)


def test_the_embedding_is_that_of_the_images_and_noise_of_the_plan(tmp_path: Path, fixed_noise: None) -> None:
    """What is left without the features of the images is Gaussian.

    Kolmogorov-Smirnov and variance, false-alarm rate 1e-3 each, fixed key.
    """
    folder = tmp_path / "run"
    config = settings(folder, "match.steps=1")
    assert pipeline.run(config, ["match"]) == 0
    (plan,) = read_json(folder / "private" / "account.json")["plan"]["mechanisms"]
    images = read_sensitive(config, "train")
    features = RandomFeatures(
        64,
        60,
        config.match.bandwidth,
        public_seed(config, "random features"),
        torch.device("cpu"),
        torch.float64,
    )
    clean = np.zeros((10, 60))
    np.add.at(clean, images.labels, features(to_unit(torch.from_numpy(images.images))).numpy())
    noise = (embedding(folder) - clean).ravel() / plan["noise_multiplier"]
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert 5e-4 < stats.chi2.cdf((noise**2).sum(), noise.size) < 1 - 5e-4


def test_a_crash_after_the_charge_is_repeated_to_the_bit_and_charged_once(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(noisy_statistic, "write_arrays", crash)
        assert pipeline.run(settings(folder), ["match"]) == 1
    assert charges(folder) == charges(undisturbed) and not (folder / "match" / "embedding.npz").exists()
    assert pipeline.run(settings(folder), ["match"]) == 0
    assert np.array_equal(embedding(folder), embedding(undisturbed))
    assert charges(folder) == charges(undisturbed)


def crash(*_) -> None:
    raise RuntimeError("crash")


def test_in_another_arrangement_it_is_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Rounding could differ there, and the same noise on two outputs would show by how much.

    Other noise would be a second use.
    """
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(noisy_statistic, "write_arrays", crash)
        assert pipeline.run(settings(folder), ["match"]) == 1
    before = charges(folder)
    capfd.readouterr()
    assert pipeline.run(settings(folder, "runtime.threads=2"), ["match"]) == 2
    torch.set_num_threads(1)
    assert (
        f"{folder}: the noisy mean embedding of this run was drawn before, and what came out of it is lost"
        in capfd.readouterr().err
    )
    assert charges(folder) == before


def test_a_stopped_training_goes_on_to_the_same_weights_and_draws_nothing(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    step: Callable = MatchedGenerator.step

    def signalled(self: MatchedGenerator, number: int) -> torch.Tensor:
        if number == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(MatchedGenerator, "step", signalled)
        assert pipeline.run(settings(folder), ["match"]) == 75
    state = checkpoint.load(folder / "match" / "checkpoint.pt")
    assert state is not None and state["step"] == 6
    written = (folder / "match" / "embedding.npz").stat().st_mtime_ns
    assert pipeline.run(settings(folder, "runtime.threads=1"), ["match"]) == 0
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(folder).items())
    assert (folder / "match" / "embedding.npz").stat().st_mtime_ns == written and charges(folder) == charges(
        undisturbed
    )


RANK = """
import sys
from privimage.runs import pipeline
from privimage.config import load
sys.exit(pipeline.run(load(sys.argv[1], sys.argv[2:]), ["match"]))
"""


def test_two_ranks_draw_the_embedding_of_one_to_the_bit(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    for ended in run_ranks(RANK, 2, str(TINY), *FIXED, f"run.dir={folder}"):
        assert ended.status == 0, ended.err
    assert read_json(folder / "match" / "done.json")["ranks"] == 2
    assert np.array_equal(embedding(folder), embedding(undisturbed)) and charges(folder) == charges(
        undisturbed
    )


def test_features_of_a_network_need_the_query(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    config = settings(tmp_path / "run", "match.embedding=network")
    assert config.stages == ("prepare", "query", "match", "synthesize", "evaluate")
    assert config.public_stages == ("prepare", "query")
    assert pipeline.run(config, ["match"]) == 2
    assert "stage query is not finished; run `privimage query` first" in capfd.readouterr().err
    assert not (tmp_path / "run" / "match" / "embedding.npz").exists()


def test_another_network_does_not_draw_under_the_charge_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The embedding was charged and lost; with the same network it would be the same to the bit."""
    folder = tmp_path / "run"
    public = save_npz(tmp_path / "public.npz", numbered(40), np.arange(40) % 2)
    few = "query.steps=2", "query.checkpoint_every=2", "match.steps=1"
    files = "data.public.kind=npz", f"data.public.path={public}"
    config = settings(folder, "match.embedding=network", *few, *files)
    with monkeypatch.context() as patch:
        patch.setattr(noisy_statistic, "write_arrays", crash)
        assert pipeline.run(config, ["prepare", "query", "match"]) == 1
    before, file = charges(folder), folder / "query" / "network.pt"
    state = checkpoint.load(file)
    assert len(before) == 1 and state is not None
    state["network"]["trunk.0.0.weight"][0, 0, 0, 0] += 1e-3
    checkpoint.save(file, state)
    capfd.readouterr()
    assert pipeline.run(config, ["match"]) == 2
    assert "of this run was drawn before, and what came out of it is lost" in capfd.readouterr().err
    assert charges(folder) == before


GRADIENT = """
import sys, torch
from pathlib import Path
from privimage.config import load
from privimage.distributed.world import connect
from privimage.families.matching import MatchedGenerator
from privimage.models.network_moments import NetworkMoments, Scales, pooled
from privimage.models.random_features import RandomFeatures
from privimage.models.resnet import classifier
config = load(sys.argv[1], ["method=dp-merf", "run.dir=unused"])
world = connect(config.runtime)
torch.manual_seed(1)
network = classifier("resnet-small", 1, 5).eval()
scales = Scales.of(pooled(network, torch.rand(50, 1, 8, 8)))
features = {
    "random": RandomFeatures(64, 60, 0.5, 0, world.device),
    "network": NetworkMoments(network, scales, world.device),
}
found = {}
for name, each in features.items():
    width = each(torch.zeros(1, 1, 8, 8)).shape[1]
    target = torch.randn(10, width, generator=torch.Generator().manual_seed(0)) / 30
    trained = MatchedGenerator(config, 10, world, each, target)
    images, labels = trained.batch(0)
    mean = torch.stack([each(images)[labels == c].sum(0) for c in range(10)]) / 40
    squares = (mean - target).square().sum()
    parameters = list(trained.network.parameters())
    whole = torch.autograd.grad(squares, parameters) if world.size == 1 else []
    trained = MatchedGenerator(config, 10, world, each, target)
    trained.at_once = 7 if name == "network" else trained.at_once
    trained.step(0)
    found[name] = {
        "gradient": torch.cat([p.grad.flatten() for p in trained.network.parameters()]),
        "distance": trained.distance,
        "expected": torch.cat([g.flatten() for g in whole]) if whole else None, "squares": squares.detach(),
    }
torch.save(found, Path(sys.argv[2]) / f"{world.size}-{world.rank}.pt")
world.close()
"""


def test_a_step_follows_the_gradient_of_the_squared_distance_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Of random features and of a network's, whose batch goes through it in pieces of 7."""
    found = {}
    for size in (1, 2):
        for ended in run_ranks(GRADIENT, size, str(TINY), str(tmp_path)):
            assert ended.status == 0, ended.err
        for rank in range(size):
            found[size, rank] = torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True)
    for name in ("random", "network"):
        gradient, squares = (found[1, 0][name][key] for key in ("expected", "squares"))
        assert gradient.norm() > 0
        for own in found.values():
            torch.testing.assert_close(own[name]["distance"], squares, rtol=1e-5, atol=0)
            # As a whole: the ranks sum in another order, and a rectifier whose input is almost zero may turn
            # with that.
            assert (own[name]["gradient"] - gradient).norm() < 0.01 * gradient.norm()


def test_steps_bring_the_features_of_a_network_closer(tmp_path: Path) -> None:
    """Towards the embedding of images of two kinds, from far away, in 30 steps."""
    torch.manual_seed(1)
    network, cpu = classifier("resnet-small", 1, 5).eval(), torch.device("cpu")
    features = NetworkMoments(network, Scales.of(pooled(network, torch.rand(50, 1, 8, 8) * 2 - 1)), cpu)
    images = torch.full((10, 1, 8, 8), -1.0)
    images[0, :, :, :4] = images[1:, :, :, 4:] = 1
    config = settings(tmp_path, "match.learning_rate=0.01")
    trained = MatchedGenerator(config, 10, World(0, 0, 1, 1, cpu), features, features(images) / 10)
    trained.step(0)
    before = trained.distance.item()
    for number in range(1, 30):
        trained.step(number)
    assert trained.distance.item() < 0.3 * before


def test_an_unlabelled_set_is_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert (
        pipeline.run(
            settings(folder, "data.sensitive.labelled=false", "match.steps=2"), ["match", "synthesize"]
        )
        == 0
    )
    assert embedding(folder).shape == (1, 60)
    with np.load(folder / "release" / "synthetic.npz") as released:
        assert released["labels"].tolist() == [0] * 40


def test_a_damaged_embedding_is_named_and_not_drawn_again(
    tmp_path: Path, undisturbed: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert pipeline.run(settings(folder, "match.steps=1"), ["match"]) == 0
    (folder / "match" / "done.json").unlink()
    (folder / "match" / "embedding.npz").write_bytes(b"\x93NUMPY, half of it")
    capfd.readouterr()
    assert pipeline.run(settings(folder, "match.steps=1"), ["match"]) == 2
    assert (
        f"privimage: error: {folder / 'match' / 'embedding.npz'}: damaged, and charged already; choose "
        "another run.dir\n" in capfd.readouterr().err
    )
    assert charges(folder) == charges(undisturbed)
