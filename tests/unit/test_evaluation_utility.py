"""Classifiers learn what can be learnt from the training images alone."""

import numpy as np
import pytest
import torch

from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.evaluation import benchmark, utility
from privimage.evaluation.utility import Labelled, Training
from privimage.models import benchmark as models

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def bars(count: int, seed: int, noise: float = 20.0) -> Labelled:
    """Three classes that are easy to tell apart: a bright bar at the left, in the middle, at the right."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    images = random.normal(60, noise, (count, 1, 8, 8))
    for column in range(2):
        images[np.arange(count), 0, :, 1 + 2 * labels + column] += 130
    return Labelled(np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64))


def cnn(train: Labelled, **changes: object) -> torch.nn.Module:
    settings: dict = {"epochs": 3, "batch_size": 32, "flip": False, "seed": 0, "world": ALONE} | changes
    return utility.train_cnn(train, 3, Training(**settings))


@pytest.mark.parametrize("name", ["lr", "mlp"])
def test_separable_classes_are_learnt(name: str) -> None:
    test = bars(200, 1)
    assert utility.percent(utility.SHALLOW[name](bars(300, 0), test, 0), test.labels) >= 99


@pytest.mark.parametrize("name", ["lr", "mlp"])
def test_labels_without_meaning_give_chance(name: str) -> None:
    train, test = bars(300, 0), bars(3000, 1)
    shuffled = Labelled(train.images, np.random.default_rng(2).permutation(train.labels))
    assert 20 < utility.percent(utility.SHALLOW[name](shuffled, test, 0), test.labels) < 47


@pytest.mark.parametrize("name", ["lr", "mlp"])
def test_a_training_set_of_one_class_gives_its_share(name: str) -> None:
    train, test = bars(300, 0), bars(200, 1)
    only = Labelled(train.images[train.labels == 1], train.labels[train.labels == 1])
    assert (utility.SHALLOW[name](only, test, 0) == 1).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cnn_learns_separable_classes(precision: str) -> None:
    test = bars(200, 1)
    predictions = utility.predict(cnn(bars(300, 0), precision=precision), test.images, ALONE.device)
    assert utility.percent(predictions.labels, test.labels) >= 99
    assert predictions.features.shape == (200, 256)


def gratings(count: int, seed: int) -> Labelled:
    """Four classes of 32x32: faint waves of any length and colour in four directions, under noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    y, x = np.mgrid[:32, :32]
    angle, length, phase = (
        values[:, None, None]
        for values in (np.pi * labels / 4, random.uniform(4, 10, count), random.uniform(0, 2 * np.pi, count))
    )
    waves = np.sin(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    colours = random.normal(0, 25, (count, 3, 1, 1))
    images = 127 + waves[:, None] * colours + random.normal(0, 30, (count, 3, 32, 32))
    return Labelled(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def test_the_cnn_learns_from_few_images_in_few_steps() -> None:
    """With whole features in the logits, and a rate without a rise, 42 % are right after these 26 steps."""
    train, test = gratings(400, 0), gratings(200, 1)
    network = utility.train_cnn(train, 4, Training(2, 32, False, 0, ALONE))
    assert utility.percent(utility.predict(network, test.images, ALONE.device).labels, test.labels) >= 60


def test_the_cnn_is_the_same_each_time() -> None:
    train = bars(100, 0)
    first, second = cnn(train, epochs=1), cnn(train, epochs=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_mirrored_images_are_seen_only_where_images_may_be_mirrored() -> None:
    # classes that are each other's mirror image cannot be told apart once training mirrors them
    train, test = bars(400, 0), bars(400, 1)
    sides = {
        name: Labelled(s.images[s.labels != 1], s.labels[s.labels != 1])
        for name, s in (("train", train), ("test", test))
    }
    accuracy = {}
    for flip in (False, True):
        predicted = utility.predict(
            cnn(sides["train"], flip=flip, epochs=4), sides["test"].images, ALONE.device
        ).labels
        accuracy[flip] = utility.percent(predicted, sides["test"].labels)
    assert accuracy[False] >= 99
    assert accuracy[True] < 80


def test_a_request_to_stop_ends_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "requested", True)
    with pytest.raises(Stopped, match="cnn begins again"):
        cnn(bars(100, 0), epochs=2)


@pytest.fixture
def tiny_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's networks with one block in each group, and few channels."""
    sizes = {size: {"resnet": (1, 8), "wrn": (1, 8), "resnext": (1, 8)} for size in ("small", "large")}
    monkeypatch.setattr(benchmark, "SIZES", sizes)
    monkeypatch.setattr(models, "BOTTLENECK", 2)


def judged(name: str, train: Labelled, size: str = "small", epochs: int = 12) -> torch.nn.Module:
    return benchmark.train(name, size, train, 3, epochs=epochs, seed=0, world=ALONE, label=name)


@pytest.mark.usefixtures("tiny_benchmark")
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", ["resnet", "wrn", "resnext"])
def test_the_benchmarks_networks_learn_separable_classes(name: str, size: str) -> None:
    test = bars(100, 1)
    predictions = utility.predict(judged(name, bars(400, 0), size), test.images, ALONE.device)
    assert utility.percent(predictions.labels, test.labels) >= 95


@pytest.mark.usefixtures("tiny_benchmark")
def test_a_network_with_dropout_is_the_same_each_time() -> None:
    train = bars(100, 0)
    torch.manual_seed(1)
    first = judged("wrn", train, epochs=1)
    torch.manual_seed(2)
    again = judged("wrn", train, epochs=1)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("tiny_benchmark")
def test_the_averaged_weights_are_judged_and_the_rate_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, networks = [], []
    real = torch.optim.Adam.step

    def watched(self: torch.optim.Adam) -> None:
        rates.append(self.param_groups[0]["lr"])
        real(self)
        networks.append([p.detach().clone() for p in self.param_groups[0]["params"]])

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    network = judged("resnet", bars(257, 0), epochs=5)  # two steps an epoch
    assert rates == pytest.approx([0.01] * 4 + [0.002] * 4 + [0.0004] * 2)
    assert not any(torch.equal(a, b) for a, b in zip(network.parameters(), networks[-1], strict=True))


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [("resnet", 1.73e6, 2.61e6), ("wrn", 8.95e6, 36.48e6), ("resnext", 34.43e6, 40.56e6)],
)
def test_the_benchmarks_networks_have_their_published_sizes(name: str, small: float, large: float) -> None:
    with torch.device("meta"):
        for size, expected in (("small", small), ("large", large)):
            network = models.benchmark_classifier(name, models.SIZES[size][name], 3, 10)
            count = sum(parameter.numel() for parameter in network.parameters())
            assert count == pytest.approx(expected, rel=2e-3)
            assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_training_pixels_are_centred_and_test_pixels_follow_them() -> None:
    train, test = bars(300, 0).images, bars(50, 1).images
    inputs, tests = utility.pixels(train, test)
    assert inputs.mean(0) == pytest.approx(0, abs=1e-4)
    assert inputs.std() == pytest.approx(1, abs=1e-4)
    again, _ = utility.pixels(train, 255 - test)
    assert np.array_equal(inputs, again)  # the test images have no say
    assert tests.shape == (50, 64)


def test_pixels_that_never_change_stay_small() -> None:
    train = bars(100, 0).images.copy()
    train[..., 0, 0] = 0
    test = train[:1].copy()
    test[..., 0, 0] = 255
    assert abs(utility.pixels(train, test)[1][0, 0]) < 10


def test_confusion_counts_rows_by_truth() -> None:
    counts = utility.confusion(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert utility.percent(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2])) == 75
