"""The classifiers take small images, and their features feed their heads."""

from collections.abc import Callable

import pytest
import torch

from privimage.models import parameters
from privimage.models.resnet import Classifier, classifier, resnet9


def check(network: Classifier, channels: int, resolution: int, width: int, n_classes: int) -> None:
    network.eval()
    images = torch.randn(2, channels, resolution, resolution)
    features = network.features(images)
    assert features.shape == (2, width)
    assert network(images).shape == (2, n_classes)
    assert torch.equal(network(images), network.head(features))


@pytest.mark.parametrize(("resolution", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_the_small_query_network_takes_all_small_images(resolution: int, channels: int) -> None:
    network = classifier("resnet-small", channels, 34)
    assert 300_000 < parameters(network) < 1_000_000
    check(network, channels, resolution, 192, 34)


def test_resnet50_has_the_stem_for_small_images() -> None:
    network = classifier("resnet50", 3, 200)
    check(network, 3, 32, 2048, 200)
    # torchvision's has 25,557,032: less its head of 1,000 classes and its 7x7 stem, plus ours of 200 and 3x3.
    assert parameters(network) == 25_557_032 - 800 * 2049 - 64 * 3 * (49 - 9)
    shapes: list[torch.Size] = []
    network.trunk.layer1.register_forward_hook(
        lambda _module, _inputs, output: shapes.append(output.shape[-2:])
    )
    network(torch.randn(1, 3, 32, 32))
    assert shapes == [(32, 32)]


@pytest.mark.parametrize(
    ("resolution", "channels", "width"), [(8, 1, 256), (28, 1, 256), (32, 3, 512), (64, 3, 512)]
)
def test_resnet9_takes_every_resolution(resolution: int, channels: int, width: int) -> None:
    check(resnet9(channels, 10, resolution), channels, resolution, width, 10)


def test_resnet9_has_the_known_size_on_cifar10() -> None:
    assert parameters(resnet9(3, 10, 32)) == 6_573_130


@pytest.mark.parametrize(
    "build",
    [lambda: classifier("resnet-small", 1, 3), lambda: resnet9(1, 3, 8)],
    ids=["resnet-small", "resnet9"],
)
def test_it_learns_three_images_by_heart(build: Callable[[], Classifier]) -> None:
    torch.manual_seed(0)
    network, images, labels = build(), torch.randn(3, 1, 8, 8), torch.arange(3)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
