"""Fidelity measures equal their closed forms, and are never called by a name that they do not deserve."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.evaluation import fidelity
from privimage.evaluation.extractor import choose

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def gaussian(count: int, seed: int, shift: float = 0.0, scale: float = 1.0, size: int = 8) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).normal(shift, scale, (count, size)).astype(np.float32)
    )


def images(count: int, seed: int, channels: int = 3, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


@pytest.fixture(scope="module")
def partial_weights(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Inception weights that are good up to the 768 features and zero beyond."""
    folder = tmp_path_factory.mktemp("inception")
    subprocess.run(
        [sys.executable, str(shared_data / "unpack.py"), "inception", str(folder)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.pth"))


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    assert fidelity.frechet_distance(gaussian(500, 0), gaussian(500, 0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_frechet_distance_is_the_closed_form_for_gaussians(shift: float) -> None:
    # ||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for means 0 and shift, deviations 1 and 2, in 8
    # dimensions
    expected = 8 * shift**2 + 8 * (1 - 2) ** 2
    found = fidelity.frechet_distance(gaussian(40_000, 1, shift, 2.0), gaussian(40_000, 2))
    assert found == pytest.approx(expected, rel=0.03)


def test_moments_taken_block_by_block_are_those_of_all_features() -> None:
    features = gaussian(2 * fidelity.BLOCK + 37, 3, shift=50.0)
    found = fidelity._moments(features)
    assert found["mu"] == pytest.approx(features.double().mean(0).numpy(), rel=1e-12)
    assert found["sigma"] == pytest.approx(np.cov(features.double().numpy(), rowvar=False), rel=1e-9)


def test_the_memory_of_a_distance_does_not_grow_with_the_images() -> None:
    # In double precision at once these features would be 60 MB, and centred as much again.
    script = (
        "import resource, torch; from privimage.evaluation import fidelity\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "features = torch.ones(60_000, 128); fidelity._moments(features[:2000]); before = peak()\n"
        "fidelity._moments(features); print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20_000  # KiB


def test_the_inception_score_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    features, head = gaussian(203, 0), gaussian(30, 1)
    expected = isc_features_to_metric(features @ head.T)
    found = fidelity.inception_score(features, head)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-6)


def test_the_inception_score_is_the_number_of_classes_that_are_surely_seen() -> None:
    classes = torch.eye(5).repeat(200, 1)
    assert fidelity.inception_score(classes, 100 * torch.eye(5))[0] == pytest.approx(5, rel=0.02)
    assert fidelity.inception_score(classes[:1].repeat(100, 1), 100 * torch.eye(5))[0] == pytest.approx(1)


def test_kernel_distance_is_unbiased_where_the_distributions_are_equal() -> None:
    # over independent pairs of sets the mean is 0: a biased estimate would be positive every time
    means = [
        fidelity.kernel_distance(gaussian(120, 2 * seed), gaussian(120, 2 * seed + 1))[0]
        for seed in range(12)
    ]
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means)) < 4 * error
    assert min(means) < 0 < max(means)


def test_kernel_distance_grows_with_the_shift() -> None:
    real = gaussian(400, 0)
    distances = [fidelity.kernel_distance(gaussian(400, 1, shift), real)[0] for shift in (0.0, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


def test_precision_and_recall_are_one_for_equal_sets_and_zero_for_distant_ones() -> None:
    real = gaussian(200, 0)
    assert fidelity.precision_recall(real, real) == (1.0, 1.0)
    assert fidelity.precision_recall(gaussian(200, 1, shift=100.0), real) == (0.0, 0.0)


def test_a_synthetic_set_without_variety_has_precision_but_no_recall() -> None:
    real = gaussian(400, 0)
    one_place = real[:1] + 0.01 * gaussian(400, 1)
    precision, recall = fidelity.precision_recall(one_place, real)
    assert precision > 0.95
    assert recall < 0.05


def test_without_weights_there_is_a_stand_in_that_is_not_called_fid(tmp_path: Path) -> None:
    extractor = choose("auto", None, tmp_path)
    features = [
        fidelity.extract(extractor, images(60, seed, channels=1), ALONE, "features") for seed in (0, 1)
    ]
    told = fidelity.described(extractor, *features)
    assert (told["name"], told["kernel_name"], told["features"]) == ("stand-in FD", "stand-in KD", "stand-in")
    assert told["fid"] is None
    assert told["kid"] is None
    assert "not comparable" in told["note"]


def test_the_stand_in_ranks_noisier_images_as_further_away(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = (load_digits().images * 15.9).astype(np.uint8)[:, None]
    extractor = choose("stand-in", None, tmp_path)
    real = fidelity.extract(extractor, digits[:800], ALONE, "real")
    noise = np.random.default_rng(0).normal(size=digits[800:1600].shape)
    distances = [
        fidelity.frechet_distance(
            fidelity.extract(
                extractor,
                np.clip(digits[800:1600] + level * noise, 0, 255).astype(np.uint8),
                ALONE,
                "synthetic",
            ),
            real,
        )
        for level in (0, 10, 30, 90)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0]


def test_the_stand_in_is_the_same_on_every_machine(tmp_path: Path) -> None:
    checker = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)[None, None].repeat(2, 0)
    features = fidelity.extract(choose("stand-in", None, tmp_path), checker, ALONE, "features")
    assert features.shape == (2, 288)
    assert features[0, [0, 40, 120, 160]].numpy() == pytest.approx([0.3970, 0.9725, 0.2500, 0.4710], abs=1e-4)


@pytest.mark.parametrize(
    "wrong", [images(2, 0).astype(np.float32), images(2, 0).transpose(0, 2, 3, 1), images(2, 0)[0]]
)
def test_only_uint8_images_in_channel_order_are_accepted(wrong: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="uint8 images N,C,H,W"):
        fidelity.extract(choose("stand-in", None, tmp_path), wrong, ALONE, "features")


def test_partial_weights_give_fd_768_and_never_fid(partial_weights: Path, tmp_path: Path) -> None:
    extractor = choose("auto", partial_weights, tmp_path)
    assert (extractor.name, extractor.features) == ("FD-768", "768")
    assert len(extractor.sha256 or "") == 64
    features = fidelity.extract(extractor, images(2, 0), ALONE, "features")
    assert features.shape == (2, 768)
    told = fidelity.described(extractor, gaussian(20, 0), gaussian(20, 1))
    assert told["fid"] is None and told["inception_score"] is None


def test_partial_weights_are_refused_for_fid(partial_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zero beyond the 768 features.*use evaluate\.features=768"):
        choose("2048", partial_weights, tmp_path)


def test_whole_weights_give_fid_and_say_when_they_are_not_the_published_file(
    partial_weights: Path, tmp_path: Path
) -> None:
    state = torch.load(partial_weights, weights_only=True)
    for name, value in state.items():
        if name.startswith("Mixed_7") and value.is_floating_point():
            value.fill_(0.01)
    torch.save(state, tmp_path / "whole.pth")
    extractor = choose("auto", tmp_path / "whole.pth", tmp_path)
    assert (extractor.name, extractor.features) == ("FID", "2048")
    assert "another weights file" in extractor.note
    assert extractor.head is None  # the last layer of this file is zero
    state["fc.weight"].fill_(0.01)
    torch.save(state, tmp_path / "whole.pth")
    extractor = choose("auto", tmp_path / "whole.pth", tmp_path)
    assert extractor.head is not None and extractor.head.shape == (1008, 2048)
    told = fidelity.described(extractor, gaussian(20, 0, size=2048), gaussian(20, 1, size=2048))
    assert told["inception_score"] == pytest.approx(1)  # all classes alike


@pytest.mark.parametrize("content", ["absent", "garbage", "code", "other"])
def test_bad_weights_end_in_one_line_and_run_nothing(content: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"

    class Touch:
        def __reduce__(self) -> tuple:
            return (Path.touch, (trace,))

    if content == "garbage":
        path.write_bytes(b"not a state dict")
    elif content == "code":
        torch.save({"Mixed_7c.conv.weight": Touch()}, path)
    elif content == "other":
        torch.save({"layer.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"evaluate\.inception_weights: .*weights\.pth: ") as raised:
        choose("auto", path, tmp_path)
    assert "\n" not in str(raised.value)
    assert not trace.exists()


def test_named_features_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluate\.inception_weights: evaluate\.features=2048 needs the weights file"
    ):
        choose("2048", None, tmp_path)


def test_features_of_the_sensitive_set_are_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    first = fidelity.cached(path, lambda: gaussian(5, 0), ALONE)
    again = fidelity.cached(path, lambda: pytest.fail("computed twice"), ALONE)
    assert torch.equal(first, again)
