"""What makes the images of Private Evolution: images at random, and variations of images."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.families.base import image_shape
from privimage.models import build_diffusion, edm


class ImageAPI(nn.Module, ABC):
    """RANDOM_API and VARIATION_API of Lin et al. 2024, which know public things alone.

    All that is random comes in as `draws` standard normal numbers for each image. The rows of a batch do not
    depend on each other: an image is the same in any batch, on any rank. `traits` numbers stay with an image
    beside its pixels, for its variations.
    """

    draws: int
    traits: int

    def __init__(self, config: Config, public_classes: int):
        """`public_classes` that a pretrained model knows; 0 for none."""
        super().__init__()
        self.config, self.public_classes, self.shape = config, public_classes, image_shape(config)

    @abstractmethod
    def random(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """normal (B, draws) -> images uint8 (B, C, H, W), and their traits float64 (B, traits)."""

    @abstractmethod
    def vary(self, images: Tensor, traits: Tensor, normal: Tensor, degree: float) -> tuple[Tensor, Tensor]:
        """Variations of images uint8 (B, C, H, W) with traits (B, traits), and the traits of these.

        normal (B, draws). The larger `degree` in (0.002, 80), the less of an image is kept.
        """


class DiffusionAPI(ImageAPI):
    """A public diffusion model. The trait of an image is the public class that it was made for.

    A variation is noised up to the level `degree` and denoised again.
    """

    traits = 1

    def __init__(self, config: Config, public_classes: int):
        """See `ImageAPI`."""
        super().__init__(config, public_classes)
        self.draws = 1 + self.shape[0] * self.shape[1] * self.shape[2]
        self.denoiser = build_diffusion(config, public_classes)

    def random(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """See `ImageAPI.random`; each image is of a public class that is drawn with equal chances."""
        settings, count = self.config.evolve, max(self.public_classes, 1)
        # The first number, through the normal distribution function, is uniform.
        public = (torch.special.ndtr(normal[:, 0].double()) * count).long().clamp(max=count - 1)
        latents = normal[:, 1:].reshape(-1, *self.shape)
        with self._precision(normal.device):
            images = edm.sample(
                self.denoiser,
                latents,
                self._labels(public),
                "euler",
                settings.sampler_steps,
                settings.guidance,
            )
        return edm.to_uint8(images), public.double()[:, None]

    def vary(self, images: Tensor, traits: Tensor, normal: Tensor, degree: float) -> tuple[Tensor, Tensor]:
        """See `ImageAPI.vary`; the public class stays."""
        settings = self.config.evolve
        noise, labels = normal[:, 1:].reshape(-1, *self.shape), self._labels(traits[:, 0].long())
        with self._precision(normal.device):
            varied = edm.vary(
                self.denoiser,
                edm.to_unit(images),
                noise,
                labels,
                degree,
                settings.sampler_steps,
                settings.guidance,
            )
        return edm.to_uint8(varied), traits

    def _labels(self, public: Tensor) -> Tensor | None:
        return public if self.public_classes else None

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.config.runtime.precision == "bf16")
