"""The generator of a GAN in training against a discriminator."""

from functools import cached_property

import torch
from torch import Tensor, nn

from privimage.families.generator import TrainedGenerator
from privimage.models import build_discriminator
from privimage.models.biggan import g_loss


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
