"""Private Evolution: a population of synthetic images in place of a trained network (Lin et al. 2024).

Nothing here sees a sensitive image: the chances of a population come from noisy votes, everything else from a
diffusion model that was trained on public images.
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
from privimage.families.work import Work
from privimage.models import build_diffusion, edm
from privimage.privacy.plan import PrivacyPlan


class Evolution(DiffusionFamily):
    """See `Family` and `Pretrained`: pretraining is that of a diffusion model.

    What is sampled from is a population and that model.
    """

    releases_model: ClassVar[bool] = False

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

    def _later_work(
        self,
        config: Config,
        plan: PrivacyPlan,
        n_classes: int,
        passes: Passes,
        forward: Callable[[int], Tensor],
        device: torch.device,
    ) -> list[Work]:
        settings, samples = config.evolve, config.synthesize
        # Each image of a generation is one run of the sampler.
        calls = settings.sampler_steps * (2 if settings.guidance else 1)
        return [
            passes.work(
                "evolve",
                settings.iterations,
                settings.population * max(n_classes, 1),
                calls,
                settings.batch_size / 8,
            ),
            passes.work("synthesize", calls, samples.samples, 1, samples.batch_size / 8),
        ]


def degree(config: Config, generation: int) -> float:
    """Noise level of the variations that follow generation 0, 1, ..., T - 1: a geometric series."""
    settings = config.evolve
    return settings.first_degree * (settings.last_degree / settings.first_degree) ** (
        generation / max(settings.iterations - 1, 1)
    )


class Population(nn.Module):
    """R classes with P synthetic images each, their chances to have children, and the public model that makes
    them.

    `images` uint8 (R, P, C, H, W); `public` int64 (R, P), the public class that each image was made for, of
    `public_classes` (0: the model knows none); `chances` float64 (R, P), of which each row sums to 1. Index i
    belongs to class i mod R, and is its member i div R. All random numbers of an image belong to its
    generation and index: it is the same whatever the rank.
    """

    images: Tensor
    public: Tensor
    chances: Tensor

    def __init__(self, config: Config, public_classes: int, rows: int):
        super().__init__()
        self.config, self.public_classes, members = config, public_classes, config.evolve.population
        self.denoiser = build_diffusion(config, public_classes)
        self.register_buffer("images", torch.zeros(rows, members, *image_shape(config), dtype=torch.uint8))
        self.register_buffer("public", torch.zeros(rows, members, dtype=torch.int64))
        self.register_buffer("chances", torch.full((rows, members), 1 / members, dtype=torch.float64))

    @torch.no_grad()
    def first(self, indices: Tensor, draws: ImageDraws) -> tuple[Tensor, Tensor]:
        """Images of generation 0, uint8 (B, C, H, W), each of a public class (B,) that is drawn with equal
        chances (RANDOM_API).
        """
        settings = self.config.evolve
        # The public class is drawn like everything else of an image: from its generation and index.
        uniform, latents = self._draw(indices, draws, 0)
        public = (uniform * self.public_classes).long().clamp(max=max(self.public_classes - 1, 0))
        images = edm.sample(
            self.denoiser, latents, self._labels(public), "euler", settings.sampler_steps, settings.guidance
        )
        return edm.to_uint8(images), public

    @torch.no_grad()
    def offspring(
        self, indices: Tensor, draws: ImageDraws, generation: int, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Variations, uint8 (B, C, H, W), of parents of generation 0, 1, ... in the classes `rows` (B,).

        Drawn by their chances, and their public classes (B,) (VARIATION_API).
        """
        settings = self.config.evolve
        uniform, noise = self._draw(indices, draws, generation + 1)
        # Inverse transform sampling of a parent from the chances of the image's class.
        parents = (self.chances.cumsum(1)[rows] < uniform[:, None]).sum(1).clamp(max=self.images.shape[1] - 1)
        images, public = edm.to_unit(self.images[rows, parents]), self.public[rows, parents]
        # Noise of this level is added to the parent and removed again by the public model.
        sigma = degree(self.config, generation)
        return edm.to_uint8(
            edm.vary(
                self.denoiser,
                images,
                noise,
                self._labels(public),
                sigma,
                settings.sampler_steps,
                settings.guidance,
            )
        ), public

    def state(self) -> dict[str, Tensor]:
        """The population without the model, which does not change."""
        return {"images": self.images, "public": self.public, "chances": self.chances}

    def _draw(self, indices: Tensor, draws: ImageDraws, generation: int) -> tuple[Tensor, Tensor]:
        # One draw per image: its first number, through the normal distribution function, is the uniform one.
        normal = draws.normal(
            public_seed(self.config, "generation", generation), indices, 1 + self.images[0, 0].numel()
        )
        return torch.special.ndtr(normal[:, 0].double()), normal[:, 1:].reshape(-1, *self.images.shape[2:])

    def _labels(self, public: Tensor) -> Tensor | None:
        return public if self.public_classes else None
