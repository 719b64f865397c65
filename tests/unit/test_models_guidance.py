"""Guidance by a private classifier: the slope of what it says, and images that follow it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privimage.models import edm
from privimage.models.guidance import HIGHEST, LOWEST, ClassifierGuided, guided_levels
from privimage.models.label_features import (
    TEMPERATURE,
    LabelClassifier,
    LabelFeatures,
    PublicFeatures,
    body_of,
)

HERE = torch.device("cpu")


class Gaussian(nn.Module):
    """The best denoiser of pixels from N(0, 1/3)."""

    def forward(self, images: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float = 0.0) -> Tensor:
        return images / (1 + 3 * sigma[:, None, None, None] ** 2)


def classifier(
    shape: tuple[int, int, int], network: str | None = None, mirrored: bool = False
) -> LabelClassifier:
    """Three classes with weights at random; with `network`, on features of one with fresh weights too."""
    torch.manual_seed(0)
    public = None
    if network is not None:
        body = body_of(network, shape[0])
        state = {name: value.clone() for name, value in body.state_dict().items()}
        public = PublicFeatures(network, state, torch.zeros(128), torch.ones(128)).to_dict()
    weights = torch.randn(3, LabelFeatures.count(shape, network), dtype=torch.float64) / 5
    return LabelClassifier({"weights": weights, "public": public, "mirrored": mirrored}, shape, HERE)


def said(seen: LabelClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """The logarithms of the probabilities (B,) of the labels, written out."""
    features = seen.features(images).double()
    logits = TEMPERATURE * (features / features.norm(dim=1, keepdim=True)) @ seen.weights.T
    return logits.log_softmax(1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize(
    ("shape", "network"), [((1, 8, 8), None), ((3, 16, 16), "resnet-small"), ((1, 28, 28), "resnet-small")]
)
def test_the_slope_is_that_of_the_probability(shape: tuple[int, int, int], network: str | None) -> None:
    seen = classifier(shape, network)
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    labels = torch.tensor([0, 1, 2, 1, 0])
    slope = seen.slope(images, labels)
    # Along the slope itself, where a difference is largest.
    step = 1e-3 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        differences = said(seen, images + step, labels) - said(seen, images - step, labels)
    expected = 2e-3 * slope.flatten(1).norm(dim=1).double()
    assert torch.allclose(differences, expected, rtol=0.05)


def test_the_slope_of_a_moved_image_is_by_the_image_as_it_was() -> None:
    seen = classifier((1, 16, 16))
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    labels = torch.tensor([0, 1, 2, 1])

    def shown(images: Tensor) -> Tensor:
        """Two pixels down and one to the left, written out: rows and columns at the border are repeated."""
        rows, columns = (torch.arange(16) - 2).clamp(min=0), (torch.arange(16) + 1).clamp(max=15)
        return images[:, :, rows][..., columns]

    slope = seen.slope(images, labels, (2, -1))
    step = 1e-3 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        ahead, behind = (said(seen, shown(images + sign * step), labels) for sign in (1, -1))
    expected = 2e-3 * slope.flatten(1).norm(dim=1).double()
    assert torch.allclose(ahead - behind, expected, rtol=0.05)
    assert not torch.allclose(slope, seen.slope(images, labels), rtol=0.1)


@pytest.mark.parametrize(("shape", "network"), [((1, 8, 8), None), ((3, 16, 16), "resnet-small")])
def test_slopes_by_both_sides_of_an_image_are_together_that_of_mirrored_features(
    shape: tuple[int, int, int], network: str | None
) -> None:
    seen = classifier(shape, network, mirrored=True)
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    labels = torch.tensor([0, 1, 2, 1, 0])
    assert torch.allclose(seen.features(images), seen.features(images.flip(3)), atol=1e-5)
    assert not torch.allclose(classifier(shape, network).features(images), seen.features(images), atol=1e-2)
    slope = (seen.slope(images, labels) + seen.slope(images.flip(3), labels).flip(3)) / 2
    step = 1e-3 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        differences = said(seen, images + step, labels) - said(seen, images - step, labels)
    expected = 2e-3 * slope.flatten(1).norm(dim=1).double()
    assert torch.allclose(differences, expected, rtol=0.05)


@pytest.mark.parametrize("mirrored", [False, True])
def test_images_are_turned_over_at_some_levels_where_features_are_mirrored(mirrored: bool) -> None:
    seen = classifier((1, 8, 8), mirrored=mirrored)
    images, labels, over = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]), set()
    guided, plain = ClassifierGuided(Gaussian(), seen, 1.0), Gaussian()
    for level in (level for level in edm.noise_levels(18) if LOWEST <= level <= HIGHEST):
        sigma = torch.full((3,), level)
        denoised = plain(images, sigma, labels)
        change = (guided(images, sigma, labels) - denoised) * (3 + 1 / level**2)
        sides = seen.slope(denoised, labels), seen.slope(denoised.flip(3), labels).flip(3)
        followed = [torch.allclose(change, side, rtol=1e-3, atol=1e-4) for side in sides]
        assert any(followed)
        over.add(followed.index(True))
    assert over == ({0, 1} if mirrored else {0})


def test_all_images_are_moved_alike_and_each_level_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, asked = classifier((1, 32, 32)), []

    def slope(images: Tensor, labels: Tensor, moved: tuple[int, int]) -> Tensor:
        asked.append(moved)
        return torch.zeros_like(images)

    monkeypatch.setattr(seen, "slope", slope)
    guided = ClassifierGuided(Gaussian(), seen, 1.0)
    levels = [level for level in edm.noise_levels(18) if LOWEST <= level <= HIGHEST]
    for count in (1, 3):
        for level in levels:
            guided(torch.zeros(count, 1, 32, 32), torch.full((count,), level), torch.zeros(count).long())
    assert asked[: len(levels)] == asked[len(levels) :]
    assert len(set(asked)) > len(levels) / 2
    assert {abs(pixels) for moved in asked for pixels in moved} == {0, 1, 2, 3}


def test_a_flat_image_has_a_finite_slope() -> None:
    flat = torch.full((2, 1, 8, 8), -1.0)
    assert torch.isfinite(classifier((1, 8, 8)).slope(flat, torch.tensor([0, 1]))).all()


def test_an_image_is_led_by_itself_in_parts_of_any_size() -> None:
    seen = classifier((1, 8, 8))
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    whole = seen.slope(images, labels)
    seen.at_once = 2
    assert torch.allclose(seen.slope(images, labels), whole, rtol=1e-4, atol=1e-6)


def test_the_denoised_image_moves_by_what_bayes_rule_says() -> None:
    seen = classifier((1, 8, 8))
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    guided, plain = ClassifierGuided(Gaussian(), seen, 1.5), Gaussian()
    for level, moved in ((0.5, True), (HIGHEST * 1.1, False), (LOWEST / 1.1, False)):
        sigma = torch.full((3,), level)
        denoised = plain(images, sigma, labels)
        # The variance of a pixel from N(0, 1/3) of which one with noise is known.
        by_hand = 1.5 * (1 / (3 + 1 / level**2)) * seen.slope(denoised, labels) if moved else 0.0
        assert torch.allclose(guided(images, sigma, labels), denoised + by_hand, atol=1e-6), level


def test_guided_levels_are_those_at_which_it_guides() -> None:
    levels = edm.noise_levels(18)
    assert guided_levels(levels) == len([level for level in levels if 0.1 <= level <= 20]) == 10


def test_samples_follow_the_classifier() -> None:
    """Without guidance a third of the labels is right by chance: 100 of 300, deviation 8.2, false-alarm rate
    below 1e-6 for more than 150.
    """
    seen, labels = classifier((1, 8, 8)), torch.arange(300) % 3
    latents = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    right = {}
    for weight in (0.0, 2.0):
        made = edm.to_uint8(edm.sample(ClassifierGuided(Gaussian(), seen, weight), latents, labels))
        shown = seen.labels(made.permute(0, 2, 3, 1).numpy())
        right[weight] = int(np.sum(shown == labels.numpy()))
    assert right[0.0] < 150 and right[2.0] > 270, right
