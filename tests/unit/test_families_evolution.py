"""Private Evolution's population.

Random images, parents by their chances, variations by degree, the same in any batch.
"""

from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from privimage.config import Config, load
from privimage.data.sensitive import ImageDraws
from privimage.families import family
from privimage.families.evolution import Population, degree
from privimage.models import edm

TINY = Path(__file__).parent.parent / "tiny.yaml"
CPU = torch.device("cpu")
DRAWS = ImageDraws(CPU)


class Constant(nn.Module):
    """A denoiser that knows one image for each label: label / 10 everywhere, -1 without a label."""

    def forward(self, images: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float = 0.0) -> Tensor:
        values = torch.full((len(images),), -1.0) if labels is None else labels / 10
        return values[:, None, None, None].expand_as(images)


def settings(*overrides: str) -> Config:
    return load(TINY, ["method=private-evolution", "run.dir=unused", *overrides])


@pytest.fixture
def population() -> Population:
    """Two classes with seven images each, of ten public classes, and the constant denoiser."""
    made = Population(settings(), public_classes=10, rows=2)
    made.denoiser = Constant()
    return made


def test_first_images_are_of_public_classes_with_equal_chances(population: Population) -> None:
    """Chi-squared test of 5,000 draws, false-alarm rate 1e-3, fixed seed.

    Each image is the one that the model knows for its class.
    """
    images, public = population.first(torch.arange(5000), DRAWS)
    assert stats.chisquare(torch.bincount(public, minlength=10)).pvalue > 1e-3
    assert torch.equal(images, edm.to_uint8((public / 10)[:, None, None, None].expand(-1, 1, 8, 8)))


def test_parents_are_drawn_by_their_chances_from_their_own_class_and_hand_on_their_public_class(
    population: Population,
) -> None:
    """Chi-squared test of 2,500 draws a class, false-alarm rate 1e-3 each, fixed seed."""
    wanted = torch.tensor(
        [[0.0, 0.5, 0.2, 0.0, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.75]], dtype=torch.float64
    )
    population.chances = wanted
    population.public = torch.arange(14).view(2, 7) % 10
    indices = torch.arange(5000)
    _, public = population.offspring(indices, DRAWS, 0, indices % 2)
    for row in (0, 1):
        found = torch.bincount((public[indices % 2 == row] - 7 * row) % 10, minlength=7)
        drawn = wanted[row] > 0
        assert not found[:7][~drawn].any() and len(found) == 7
        assert stats.chisquare(found[drawn], 2500 * wanted[row][drawn]).pvalue > 1e-3


def test_an_image_is_the_same_in_any_batch_and_another_in_another_generation() -> None:
    made, indices = Population(settings(), 10, 2).eval(), torch.arange(14)
    made.images, made.public = (
        torch.randint(0, 256, made.images.shape, dtype=torch.uint8),
        torch.zeros_like(made.public),
    )
    whole, _ = made.offspring(indices, DRAWS, 0, indices % 2)
    assert torch.equal(
        whole, torch.cat([made.offspring(part, DRAWS, 0, part % 2)[0] for part in indices.split(5)])
    )
    assert not torch.equal(whole, made.offspring(indices, DRAWS, 1, indices % 2)[0])
    assert not torch.equal(whole, made.first(indices, DRAWS)[0])


@pytest.mark.parametrize(("sigma", "kept"), [(0.01, True), (60.0, False)])
def test_variations_of_a_small_degree_keep_the_image_and_of_a_large_one_forget_it(
    sigma: float, kept: bool
) -> None:
    """Of two images, the exact denoiser of that pair brings back the noised one, or either of them with equal
    probability.
    """

    class Pair(nn.Module):
        def forward(
            self, images: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float = 0.0
        ) -> Tensor:
            level = sigma[:, None, None, None]
            weight = torch.sigmoid((images.sum((1, 2, 3), keepdim=True) / level**2).clamp(-80, 80))
            return (2 * weight - 1).expand_as(images) * 0.5

    pair = torch.where(torch.arange(400) % 2 == 0, 0.5, -0.5)[:, None, None, None].expand(-1, 1, 8, 8)
    noise = torch.randn(pair.shape, generator=torch.Generator().manual_seed(0))
    back = (
        (edm.vary(Pair(), pair, noise, None, sigma, steps=60).mean((1, 2, 3)) * pair[:, 0, 0, 0] > 0)
        .float()
        .mean()
    )
    assert back == 1 if kept else back < 0.65


def test_degrees_fall_geometrically_from_the_first_to_the_last() -> None:
    config = settings("evolve.iterations=3", "evolve.first_degree=4", "evolve.last_degree=0.25")
    assert [degree(config, generation) for generation in range(3)] == pytest.approx([4, 1, 0.25])
    assert degree(settings("evolve.iterations=1"), 0) == settings().evolve.first_degree


def test_samples_are_offspring_of_the_last_generation(population: Population) -> None:
    config, indices = settings(), torch.arange(6)
    for labels in (indices % 2, torch.tensor([1, 1, 1, 0, 1, 1])):
        expected, _ = population.offspring(indices, DRAWS, config.evolve.iterations - 1, labels)
        assert torch.equal(family(config).sample(config, population, labels, indices, DRAWS), expected)
