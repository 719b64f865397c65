"""The stage `warm`: each noisy statistic is charged and drawn once; training sees nothing else."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import read_sensitive
from ranks import TINY, charges, run_ranks
from scipy import stats

from privimage.config import Config, load
from privimage.distributed import checkpoint
from privimage.families.denoising import DiffusionWarm
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import CentralImages
from privimage.privacy.mechanisms.central import central_sum, random_parts
from privimage.privacy.noise import bit_generator
from privimage.runs import pipeline
from privimage.stages import noisy_statistic
from privimage.storage.files import read_json

WARM = (
    "method=dpdm",
    "warm.starts=[moments,embedding,central]",
    "warm.parts=3",
    "warm.steps=8",
    "warm.batch_size=16",
)
FIXED = (*WARM, "warm.checkpoint_every=4", "privacy.insecure_fixed_key=7")
STATISTICS = ("warm-means", "warm-covariance", "warm-embedding", "warm-central")
FILES = ("means.npz", "covariance.npz", "embedding.npz", "central.npz")


def settings(folder: Path, *overrides: str) -> Config:
    return load(TINY, [*FIXED, f"run.dir={folder}", *overrides])


def values(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / "warm" / name)["values"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "warm" / "weights.pt")
    assert state is not None
    return state["ema"]


def planned(folder: Path) -> dict[str, dict]:
    plan = read_json(folder / "private" / "account.json")["plan"]
    return {one["stage"]: one for one in plan["mechanisms"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the stage from the beginning to the end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert pipeline.run(settings(folder), ["warm"]) == 0
    return folder


def test_the_ledger_holds_one_use_of_each_statistic(undisturbed: Path) -> None:
    plan = planned(undisturbed)
    assert list(plan) == [*STATISTICS, "finetune"]
    # The ledger counts uses of the same noise together.
    used = [one.noise_multiplier for one in charges(undisturbed) for _ in range(one.count)]
    assert sorted(used) == sorted(plan[stage]["noise_multiplier"] for stage in STATISTICS)


def test_the_central_means_are_those_of_the_images_and_noise_of_the_plan(
    tmp_path: Path, fixed_noise: None
) -> None:
    """What is left without the images is Gaussian: Kolmogorov-Smirnov, false-alarm rate 1e-3, fixed key."""
    folder = tmp_path / "run"
    config = settings(folder, "warm.starts=[central]", "warm.steps=1")
    assert pipeline.run(config, ["warm"]) == 0
    images, central = read_sensitive(config, "train"), planned(folder)["warm-central"]
    plan = CentralImages(
        **{name: value for name, value in central.items() if name not in ("stage", "relation")}
    )
    name = str(np.load(folder / "warm" / "central.npz")["charge"])
    bits = bit_generator("aes-ctr", insecure_fixed(7).derive("central parts", name)).random_raw(1437)
    places = torch.from_numpy(random_parts(bits, 3) * 10 + images.labels)
    tensors = torch.from_numpy(images.images), places, torch.arange(1437)
    clean = central_sum(*tensors, 30, plan).numpy() / plan.one
    noise = values(folder, "central.npz") * (1437 / 30) - clean
    assert plan.values == 16 and stats.kstest(noise.ravel() / plan.standard_deviation, "norm").pvalue > 1e-3


def test_a_crash_after_the_charge_is_repeated_to_the_bit_and_charged_once(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "run", noisy_statistic.write_arrays
    for file in FILES:

        def crash(path: Path, arrays: dict, at: str = file) -> None:
            if path.name == at:
                raise RuntimeError("crash")
            write(path, arrays)

        with monkeypatch.context() as patch:
            patch.setattr(noisy_statistic, "write_arrays", crash)
            assert pipeline.run(settings(folder), ["warm"]) == 1
        assert not (folder / "warm" / file).exists()
    assert pipeline.run(settings(folder), ["warm"]) == 0
    assert all(np.array_equal(values(folder, file), values(undisturbed, file)) for file in FILES)
    assert charges(folder) == charges(undisturbed)


@pytest.mark.parametrize("file", FILES)
def test_a_lost_statistic_is_not_drawn_again_otherwise(
    tmp_path: Path, file: str, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert pipeline.run(settings(folder), ["warm"]) == 0
    before = charges(folder)
    (folder / "warm" / "done.json").unlink()
    (folder / "warm" / file).unlink()
    capfd.readouterr()
    # Another number of threads may round otherwise: the same noise must not hide another sum.
    assert pipeline.run(settings(folder, "runtime.threads=2"), ["warm"]) == 2
    torch.set_num_threads(1)
    assert "of this run was drawn before, and what came out of it is lost" in capfd.readouterr().err
    assert charges(folder) == before


def test_a_stopped_training_goes_on_to_the_same_weights_and_draws_nothing(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step = tmp_path / "run", DiffusionWarm.step

    def signalled(self: DiffusionWarm, *arguments: Any) -> None:
        if arguments[2] == 5:
            os.kill(os.getpid(), signal.SIGUSR2)
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionWarm, "step", signalled)
        assert pipeline.run(settings(folder), ["warm"]) == 75
    assert pipeline.run(settings(folder), ["warm"]) == 0
    assert all(torch.equal(value, weights(undisturbed)[name]) for name, value in weights(folder).items())
    assert charges(folder) == charges(undisturbed)


RANK = """
import sys
from privimage.runs import pipeline
from privimage.config import load
config = load(sys.argv[1], sys.argv[2:])
sys.exit(pipeline.run(config, config.stages[: config.stages.index("warm") + 1]))
"""


def test_two_ranks_draw_the_statistics_of_one_to_the_bit(tmp_path: Path, undisturbed: Path) -> None:
    folder = tmp_path / "run"
    for ended in run_ranks(RANK, 2, str(TINY), *FIXED, f"run.dir={folder}"):
        assert ended.status == 0, ended.err
    assert all(np.array_equal(values(folder, file), values(undisturbed, file)) for file in FILES)
    assert charges(folder) == charges(undisturbed)


def test_ranks_compare_with_the_same_public_images(tmp_path: Path) -> None:
    words = (*FIXED, "method=privimage+d", "warm.starts=[moments]")
    for ended in run_ranks(RANK, 2, str(TINY), *words, f"run.dir={tmp_path / 'two'}"):
        assert ended.status == 0, ended.err
    config = settings(tmp_path / "one", *words[-2:])
    assert pipeline.run(config, config.stages[: config.stages.index("warm") + 1]) == 0
    # The covariance is about means that follow from the public selection, whose query rounds otherwise.
    one, two = (values(tmp_path / name, "means.npz") for name in ("one", "two"))
    assert np.array_equal(one, two) and values(tmp_path / "two", "covariance.npz").shape == (2081,)


@pytest.mark.parametrize("method", ["dpdm", "privimage+d", "pdp-diffusion"])
def test_a_release_states_the_warm_start_and_is_refused_without_its_charge(
    tmp_path: Path, method: str, capfd: pytest.CaptureFixture
) -> None:
    folder, overrides = tmp_path / "run", (*WARM[1:], f"method={method}", f"run.dir={tmp_path / 'run'}")
    config = load(TINY, list(overrides))
    assert config.stages[-4:] == ("warm", "finetune", "synthesize", "evaluate")
    assert pipeline.run(config, config.stages[:-1]) == 0
    said = read_json(folder / "release" / "PRIVACY.json")
    named = [one["name"] for one in said["mechanisms"]]
    assert {"noisy mean embedding for the warm start", "central images"} <= set(named)
    assert len(named) == len(planned(folder)) and 9 < said["epsilon"] <= 10
    # Without the names of its charges, what made the weights cannot be proven.
    path = folder / "finetune" / "weights.pt"
    state = checkpoint.load(path)
    assert state is not None
    del state["charges"]["warm-central"]
    checkpoint.save(path, state)
    (folder / "synthesize" / "done.json").unlink()
    capfd.readouterr()
    assert pipeline.run(config, ["synthesize"]) == 2
    assert "0 of the 1 uses of the central images that made these weights are known" in capfd.readouterr().err


def test_an_unlabelled_set_is_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = settings(folder, "data.sensitive.labelled=false")
    assert pipeline.run(config, ["warm", "finetune", "synthesize"]) == 0
    shapes = [values(folder, file).shape for file in FILES]
    assert shapes == [(66,), (2081,), (61,), (3, 16)]


def test_methods_without_a_diffusion_model_have_no_warm_start(tmp_path: Path) -> None:
    for method in ("dpgan", "dp-merf", "private-evolution", "nonpriv"):
        assert "warm" not in settings(tmp_path, f"method={method}").stages


def test_fine_tuning_starts_from_the_warm_weights(tmp_path: Path, undisturbed: Path) -> None:
    """With a learning rate that changes nothing, what is released are the weights of the warm start."""
    folder = tmp_path / "run"
    config = settings(folder, "finetune.learning_rate=1e-30", "finetune.steps=1", "privacy.epsilon=20")
    assert pipeline.run(config, ["warm", "finetune"]) == 0
    state = checkpoint.load(folder / "finetune" / "weights.pt")
    assert state is not None
    for name, value in weights(folder).items():
        torch.testing.assert_close(state["ema"][name], value, rtol=1e-5, atol=1e-7)
