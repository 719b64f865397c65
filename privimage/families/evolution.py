"""Private Evolution: a population of synthetic images in place of a trained network (Lin et al. 2024).

Nothing here sees a sensitive image: the chances of a population come from noisy votes, everything else from
an API that knows public things alone.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.families.base import image_shape
from privimage.families.diffusion import DiffusionFamily, Passes
from privimage.families.glyph_api import GlyphAPI
from privimage.families.image_api import DiffusionAPI, ImageAPI
from privimage.families.work import FEW, Work, seconds_an_image
from privimage.privacy.plan import PrivacyPlan

# By `evolve.api`: a model that is pretrained, or simulators that are not.
APIS: dict[str, type[ImageAPI]] = {"diffusion": DiffusionAPI, "glyphs": GlyphAPI}


class Evolution(DiffusionFamily):
    """See `Family` and `Pretrained`: pretraining is that of a diffusion model, if there is one.

    What is sampled from is a population and what makes its images.
    """

    releases_model: ClassVar[bool] = False

    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """The denoiser; none of a simulator."""
        return {} if config.evolve.simulated else super().networks(config, n_classes)

    def restored(self, config: Config, state: dict[str, Any]) -> nn.Module:
        """The population that `state` holds under `ema`."""
        population = Population(config, state["public_classes"], max(state["n_classes"], 1))
        population.load_state_dict(state["ema"])
        return population

    def sample(
        self, config: Config, generator: nn.Module, labels: Tensor | None, indices: Tensor, draws: ImageDraws
    ) -> Tensor:
        """One more generation, whose variations have the last degree: uint8 (B, C, H, W)."""
        assert isinstance(generator, Population)
        rows = torch.zeros_like(indices) if labels is None else labels
        return generator.offspring(indices, draws, config.evolve.iterations - 1, rows)[0]

    def work(self, config: Config, plan: PrivacyPlan, n_classes: int, device: torch.device) -> list[Work]:
        """Estimate from passes through the denoiser, or from images of a simulator."""
        if not config.evolve.simulated:
            return super().work(config, plan, n_classes, device)
        api, at_once = APIS[config.evolve.api](config, 0), config.evolve.batch_size
        normal = torch.randn(at_once, api.draws, generator=torch.Generator().manual_seed(0)).to(device)
        seconds = seconds_an_image(lambda count: api.random(normal[:count])[0], min(FEW, at_once), at_once)
        return _made(config, n_classes, Passes(seconds, 0.0, 0), 1)

    def _later_work(
        self,
        config: Config,
        plan: PrivacyPlan,
        n_classes: int,
        passes: Passes,
        forward: Callable[[int], Tensor],
        device: torch.device,
    ) -> list[Work]:
        settings = config.evolve
        return _made(config, n_classes, passes, settings.sampler_steps * (2 if settings.guidance else 1))


def _made(config: Config, n_classes: int, passes: Passes, calls: int) -> list[Work]:
    """The work of making images, each by `calls` passes, and the variations of each in the look-ahead."""
    settings, samples = config.evolve, config.synthesize
    images = settings.population * max(n_classes, 1) * (1 + settings.lookahead)
    return [
        passes.work("evolve", settings.iterations, images, calls, settings.batch_size / 8),
        passes.work("synthesize", calls, samples.samples, 1, samples.batch_size / 8),
    ]


def degree(config: Config, generation: int) -> float:
    """Noise level of the variations that follow generation 0, 1, ..., T - 1: a geometric series."""
    settings = config.evolve
    return settings.first_degree * (settings.last_degree / settings.first_degree) ** (
        generation / max(settings.iterations - 1, 1)
    )


def places(indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The class and the member that each index (B,) of a population of `rows` classes stands for."""
    return indices % rows, indices.div(rows, rounding_mode="floor")


def by_class(values: Tensor, rows: int) -> Tensor:
    """Values (R P, ...) by index -> (R, P, ...) by class and member."""
    return values.unflatten(0, (-1, rows)).transpose(0, 1).contiguous()


class Population(nn.Module):
    """R classes with P synthetic images each, their chances to have children, and the API that makes them.

    `images` uint8 (R, P, C, H, W); `traits` float64 (R, P, T), what the API keeps of each image; `chances`
    float64 (R, P), of which each row sums to 1. Index i belongs to class i mod R, and is its member i div R.
    All random numbers of an image belong to its generation and index: it is the same whatever the rank.
    """

    images: Tensor
    traits: Tensor
    chances: Tensor

    def __init__(self, config: Config, public_classes: int, rows: int):
        """`public_classes` that a pretrained model knows; 0 for none."""
        super().__init__()
        self.config, self.public_classes, members = config, public_classes, config.evolve.population
        self.api = APIS[config.evolve.api](config, public_classes)
        self.register_buffer("images", torch.zeros(rows, members, *image_shape(config), dtype=torch.uint8))
        self.register_buffer("traits", torch.zeros(rows, members, self.api.traits, dtype=torch.float64))
        self.register_buffer("chances", torch.full((rows, members), 1 / members, dtype=torch.float64))

    @torch.no_grad()
    def first(self, indices: Tensor, draws: ImageDraws) -> tuple[Tensor, Tensor]:
        """Images of generation 0, uint8 (B, C, H, W), and their traits (B, T) (RANDOM_API)."""
        return self.api.random(self._draw(indices, draws, "generation", 0)[:, 1:])

    @torch.no_grad()
    def offspring(
        self, indices: Tensor, draws: ImageDraws, generation: int, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Variations, uint8 (B, C, H, W), of parents of generation 0, 1, ... in the classes `rows` (B,).

        Parents are drawn by their chances. With the traits of the variations (B, T) (VARIATION_API).
        """
        normal = self._draw(indices, draws, "generation", generation + 1)
        # Inverse transform sampling of a parent from the chances of the image's class.
        uniform = torch.special.ndtr(normal[:, :1].double())
        parents = (self.chances.cumsum(1)[rows] < uniform).sum(1).clamp(max=self.images.shape[1] - 1)
        return self._varied(rows, parents, normal, generation)

    @torch.no_grad()
    def ahead(self, indices: Tensor, draws: ImageDraws, generation: int, number: int) -> Tensor:
        """Variation `number` (0, 1, ...) of each image at `indices` (B,) of `generation`, uint8 (B, C, H, W).

        Of the degree that their children will have.
        """
        normal = self._draw(indices, draws, "look-ahead", generation, number)
        return self._varied(*places(indices, len(self.images)), normal, generation)[0]

    def state(self) -> dict[str, Tensor]:
        """The population without the API, which does not change."""
        return {"images": self.images, "traits": self.traits, "chances": self.chances}

    def _varied(
        self, rows: Tensor, members: Tensor, normal: Tensor, generation: int
    ) -> tuple[Tensor, Tensor]:
        return self.api.vary(
            self.images[rows, members],
            self.traits[rows, members],
            normal[:, 1:],
            degree(self.config, generation),
        )

    def _draw(self, indices: Tensor, draws: ImageDraws, purpose: str, *numbers: int) -> Tensor:
        """Standard normal numbers (B, 1 + draws of the API): the first is for the choice of a parent."""
        return draws.normal(public_seed(self.config, purpose, *numbers), indices, 1 + self.api.draws)
