"""The two sides of a GAN: the generator's steps, and the discriminator's losses on sensitive images."""

from functools import cached_property

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.distributed.blocks import blockwise
from privimage.distributed.world import World
from privimage.families.base import ImageLosses
from privimage.families.generator import TrainedGenerator
from privimage.models import build_discriminator, edm
from privimage.models.biggan import Generator, d_loss_fake, d_loss_real, g_loss

# Latents that go through the generator at once: always as many, so that no fake depends on how many are made.
FAKES = 32


class Adversary(TrainedGenerator):
    """A generator in training against a discriminator, of which it only reads the weights.

    A step depends on those weights, `runtime.seed` and its own number, on nothing else.
    """

    @cached_property
    def critic(self) -> nn.Module:
        """A discriminator with ordinary gradients, which gets the weights of the one that is trained."""
        return build_discriminator(self.config, self.n_classes).to(self.world.device).requires_grad_(False)

    def step(self, discriminator: nn.Module, number: int) -> Tensor:
        """One update; returns this rank's loss, a scalar. All ranks call it together."""
        # A copy: per-image gradients have taken the place of the original's ordinary ones.
        self.critic.load_state_dict(discriminator.state_dict())
        images, labels = self.batch(number)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            scores = self.critic(images, labels)
        return self.update(g_loss(scores.float()).mean())


class AdversarialLosses(ImageLosses):
    """The discriminator's hinge losses of a sensitive image and of one generated image with its label.

    Their gradients are summed, then clipped.

    The two are laid out as two copies of the image with doubled losses, whose mean is the sum. The generator
    is in eval mode: batch norm over the batch would let the fake of one image depend on which other images
    take part, and clipping would bound nothing.
    """

    def __init__(self, config: Config, world: World, n_classes: int, generator: Generator):
        super().__init__(config, world, n_classes)
        self.generator = generator

    @torch.no_grad()
    def draw(
        self, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> pairs of a real and a generated one (B, 2, C, H, W), their labels and which
        is real (B, 2).
        """
        # A programming error that would void the sensitivity bound must not pass in silence.
        if self.generator.training:
            raise RuntimeError(
                "the generator's statistics are those of its batch: the loss of an image would depend on "
                "the others"
            )
        # The latent of a fake belongs to (step, image): it does not depend on which other images were
        # sampled.
        latents = self.draws.normal(seed, indices, self.generator.latent_size)
        labels = labels if self.n_classes else torch.zeros_like(labels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            # Blocks of a fixed size: the kernels that a library chooses depend on the batch size, and
            # rounding with them.
            fakes = [block.float() for _, block in blockwise(self.generator, latents, labels, size=FAKES)]
        # Copy 0 is the sensitive image, copy 1 the generated one.
        real = torch.tensor([True, False], device=self.device).expand(len(images), -1)
        return torch.stack([edm.to_unit(images), torch.cat(fakes)], 1), labels[:, None].expand(-1, 2), real

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """See `ImageLosses`."""
        images, labels, real = tensors
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            scores = module(images, labels).float()
        # Doubled, since the gradient is averaged over the two copies.
        return 2 * torch.where(real, d_loss_real(scores), d_loss_fake(scores))
