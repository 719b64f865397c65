"""Moments of a network's features: their length, their scale, and the way back to the images."""

import pytest
import torch

from privimage.models.network_moments import NetworkMoments, Scales, moments_length, pooled
from privimage.models.resnet import Classifier, classifier

CPU = torch.device("cpu")


def network() -> Classifier:
    torch.manual_seed(0)
    return classifier("resnet-small", 1, 5).eval()


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("name", "channels", "resolution"), [("resnet-small", 1, 8), ("resnet50", 3, 16)])
def test_the_length_is_known_without_weights(name: str, channels: int, resolution: int) -> None:
    found = pooled(classifier(name, channels, 5).eval(), torch.zeros(1, channels, resolution, resolution))
    assert moments_length(name, channels, resolution) == 2 * found.shape[1]


def test_all_blocks_count_and_where_something_is() -> None:
    """One pixel in a corner and in another one: the same features would not tell them apart."""
    shown = torch.full((2, 1, 8, 8), -1.0)
    shown[0, 0, 0, 0] = shown[1, 0, 7, 7] = 1
    maps = network().maps(shown)
    assert [found.shape[1] for found in maps] == [32, 64, 64, 128, 128, 192]
    torch.testing.assert_close(network().features(shown), maps[-1].mean((2, 3)))
    first, second = pooled(network(), shown)
    assert (first - second).norm() > 0.1 * first.norm()


def test_over_public_images_moments_have_mean_0_and_about_norm_1() -> None:
    seen = images(300)
    scales = Scales.of(pooled(network(), seen))
    features = pooled(network(), seen).double()
    second = (features - features.mean(0)).square()
    moments = (torch.cat([features, second], 1) - scales.mean) * scales.factor
    assert moments.mean(0).abs().max() < 1e-6
    assert moments.square().sum(1).mean().sqrt().item() == pytest.approx(1, rel=1e-6)
    vectors = NetworkMoments(network(), scales, CPU, torch.float64)(seen)
    expected = moments / moments.norm(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
    # Whatever features are constant there, others are not drowned by them.
    assert scales.factor.isfinite().all() and scales.factor.max() <= 20 * scales.factor.chunk(2)[1].max()


def test_gradients_reach_the_images_and_not_the_network() -> None:
    made, shown = NetworkMoments(network(), Scales.of(pooled(network(), images(50))), CPU), images(3, 2)
    shown.requires_grad_(True)
    made(shown)[0].sum().backward()
    assert shown.grad is not None and shown.grad[0].abs().max() > 0 and not shown.grad[1:].any()
    assert all(value.grad is None for value in made.network.parameters())
