"""The generator of a GAN in training against a discriminator."""

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.distributed.world import World
from privimage.families.generator import TrainedGenerator
from privimage.models import build_discriminator
from privimage.models.biggan import Generator, g_loss


class Adversary(TrainedGenerator):
    """A generator in training against a discriminator, of which it only reads the weights.

    A step depends on those weights, `runtime.seed` and its own number, on nothing else.
    """

    def __init__(
        self,
        config: Config,
        n_classes: int,
        world: World,
        network: Generator,
        batch_size: int,
        learning_rate: float,
        decay: float,
        bf16: bool,
    ):
        super().__init__(config, n_classes, world, network, batch_size, learning_rate, decay, bf16)
        self.critic = build_discriminator(config, n_classes).to(world.device).requires_grad_(False)

    def step(self, discriminator: nn.Module, number: int) -> Tensor:
        """One update; returns this rank's loss, a scalar. All ranks call it together."""
        # A copy: per-image gradients have taken the place of the original's ordinary ones.
        self.critic.load_state_dict(discriminator.state_dict())
        images, labels = self.batch(number)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            scores = self.critic(images, labels)
        return self.update(g_loss(scores.float()).mean())
