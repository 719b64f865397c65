"""Private Evolution's population.

Random images, parents by their chances, variations by degree, the same in any batch.
"""

from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from privimage.config import Config, load
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.distributed.world import World
from privimage.families import family
from privimage.families.diffusion import Passes
from privimage.families.evolution import APIS, Population, degree
from privimage.families.glyph_api import GlyphAPI
from privimage.families.image_api import ImageAPI
from privimage.models import edm
from privimage.releases.card import SIMULATORS
from privimage.stages.nearest import candidates

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
    made.api.denoiser = Constant()
    return made


def test_first_images_are_of_public_classes_with_equal_chances(population: Population) -> None:
    """Chi-squared test of 5,000 draws, false-alarm rate 1e-3, fixed seed.

    Each image is the one that the model knows for its class.
    """
    images, traits = population.first(torch.arange(5000), DRAWS)
    public = traits[:, 0].long()
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
    population.traits = torch.arange(14).double().view(2, 7, 1) % 10
    indices = torch.arange(5000)
    public = population.offspring(indices, DRAWS, 0, indices % 2)[1][:, 0].long()
    for row in (0, 1):
        found = torch.bincount((public[indices % 2 == row] - 7 * row) % 10, minlength=7)
        drawn = wanted[row] > 0
        assert not found[:7][~drawn].any() and len(found) == 7
        assert stats.chisquare(found[drawn], 2500 * wanted[row][drawn]).pvalue > 1e-3


@pytest.mark.parametrize("api", APIS)
def test_an_image_is_the_same_in_any_batch_and_another_in_another_generation(api: str) -> None:
    made, indices = Population(settings(f"evolve.api={api}"), 10, 2).eval(), torch.arange(14)
    images, traits = made.first(indices, DRAWS)
    made.images, made.traits = images.unflatten(0, (2, 7)), traits.unflatten(0, (2, 7))
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


class Shifted(ImageAPI):
    """A simulator of grey images: a variation is lighter by its second random number times the degree."""

    draws, traits = 2, 0

    def random(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def vary(self, images: Tensor, traits: Tensor, normal: Tensor, degree: float) -> tuple[Tensor, Tensor]:
        lighter = (10 * degree * normal[:, 1]).round()[:, None, None, None]
        return (images + lighter).clamp(0, 255).to(torch.uint8), traits


class Lightness:
    """In place of the features of a network, the mean of an image."""

    width = 1

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(("size", "lookahead"), [(500, 0), (500, 3), (4, 3)])
def test_a_look_ahead_is_the_mean_over_variations_named_by_generation_index_and_number(
    population: Population, size: int, lookahead: int
) -> None:
    """Of the degree of that generation's children; the same in blocks of any size."""
    config = settings(f"evolve.lookahead={lookahead}", f"evolve.batch_size={size}")
    population.api = Shifted(config, 0)
    values = torch.arange(60, 200, 10)[:14].view(2, 7)
    population.images = values.view(2, 7, 1, 1, 1).expand(-1, -1, 1, 8, 8).to(torch.uint8)
    found = candidates(config, Lightness(), population, 1, World(0, 0, 1, 1, CPU))
    expected = torch.zeros(2, 7)
    for index in range(14):
        row, member = index % 2, index // 2
        numbers = [
            DRAWS.normal(public_seed(config, "look-ahead", 1, number), torch.tensor([index]), 3)[0, 2]
            for number in range(lookahead)
        ]
        shifts = [(10 * degree(config, 1) * number).round() for number in numbers]
        expected[row, member] = values[row, member] + torch.tensor([0.0, *shifts]).sum() / max(lookahead, 1)
    assert found.shape == (2, 7, 1)
    torch.testing.assert_close(found[..., 0], expected)


def test_a_look_ahead_is_counted_in_the_plan() -> None:
    seconds = []
    for lookahead in (0, 3):
        config, passes = settings(f"evolve.lookahead={lookahead}"), Passes(1e-3, 0.0, 0)
        works = family(config)._later_work(config, None, 10, passes, None, CPU)
        seconds.append({work.stage: work.seconds for work in works})
    assert seconds[0]["evolve"] == pytest.approx(3 * 7 * 10 * 3 * 1e-3)  # generations of images, by 3 steps
    assert seconds[1]["evolve"] == pytest.approx(4 * seconds[0]["evolve"])
    assert seconds[1]["synthesize"] == seconds[0]["synthesize"]


def test_glyphs_keep_their_character_and_less_of_the_rest_the_higher_the_degree() -> None:
    """Their numbers stay standard normal: Kolmogorov-Smirnov, false-alarm rate 1e-3 each, fixed seed."""
    api = GlyphAPI(settings(), 0)
    images, traits = api.random(DRAWS.normal(1, torch.arange(200), api.draws))
    assert images.shape == (200, 1, 8, 8) and images.dtype == torch.uint8
    changed = []
    for sigma in (0.01, 0.5, 2.0, 50.0):
        varied, moved = api.vary(images, traits, DRAWS.normal(2, torch.arange(200), api.draws), sigma)
        assert torch.equal(moved[:, 0], traits[:, 0])
        for numbers in (moved[:, 1], moved[:, 2:].flatten()):
            assert stats.kstest(numbers, "norm").pvalue > 1e-3
        assert (moved[:, 1] != traits[:, 1]).double().mean() == pytest.approx(
            1 - (1 + sigma**2) ** -0.5, abs=0.12
        )
        changed.append((varied.float() - images.float()).abs().mean().item())
    assert changed[0] < 4 and changed == sorted(changed) and changed[-1] > 20


def test_every_simulator_is_named_on_the_card() -> None:
    assert set(SIMULATORS) == set(APIS) - {"diffusion"}


def test_a_simulator_is_planned_without_networks() -> None:
    config = settings("evolve.api=glyphs", "evolve.batch_size=8", "evolve.lookahead=1")
    evolve, synthesize = family(config).work(config, None, 10, CPU)
    assert family(config).sizes(config, 10) == {}
    of_an_image = evolve.seconds / (3 * 7 * 10 * 2)
    assert 0 < of_an_image == pytest.approx(synthesize.seconds / config.synthesize.samples)
