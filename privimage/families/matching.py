"""DP-MERF.

BigGAN's generator, without a discriminator, against the noisy mean embedding of the sensitive set (Harder et
al. 2021).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.distributed.world import World
from privimage.families.generator import GeneratorFamily, TrainedGenerator
from privimage.families.work import PARAMETER_BYTES, Work
from privimage.models import build_generator
from privimage.models.random_features import RandomFeatures
from privimage.privacy.plan import PrivacyPlan


class Matching(GeneratorFamily):
    """A generator without a discriminator, and without pretraining: see `Family`."""

    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """The generator alone."""
        return {"generator": build_generator(config, n_classes)}

    def work(self, config: Config, plan: PrivacyPlan, n_classes: int, device: torch.device) -> list[Work]:
        """Passes through the generator, 3 for a step (forward and backward)."""
        settings = config.match
        seconds, memory, size = self._generator_work(config, n_classes, device)
        work, weights = settings.steps * settings.batch_size * 3 * seconds, PARAMETER_BYTES * size
        training = weights + settings.batch_size * memory
        return [
            Work("match", settings.steps, settings.batch_size, work, training),
            self._sampling(config, seconds, memory, weights),
        ]


class MatchedGenerator(TrainedGenerator):
    """A generator whose mean embedding comes ever closer to a given one.

    Its steps depend on that embedding, the seed of the configuration and their own number, on nothing else.
    """

    def __init__(
        self, config: Config, n_classes: int, world: World, features: RandomFeatures, target: Tensor
    ):
        """`target` (rows, F): per class, the mean embedding of its images times their share of the set."""
        settings = config.match
        torch.manual_seed(public_seed(config, "networks"))
        network, bf16 = (
            build_generator(config, n_classes).to(world.device),
            config.runtime.precision == "bf16",
        )
        super().__init__(
            config,
            n_classes,
            world,
            network,
            settings.batch_size,
            settings.learning_rate,
            settings.ema_decay,
            bf16,
        )
        self.features, self.target = features, target
        self.distance = torch.zeros((), device=world.device)

    def step(self, number: int) -> None:
        """One update; all ranks call it together."""
        # Mean features of this rank's images, by class; the sum over ranks is that of the batch.
        images, labels = self.batch(number)
        embedding = (
            F.one_hot(labels, len(self.target)).float().T
            @ self.features(images.float())
            / (self.own * self.world.size)
        )
        residual = self.world.all_reduce_(embedding.detach().clone()) - self.target
        # The gradient of |residual|^2, of which `own` is this rank's part; the engine takes the mean over the
        # ranks, not the sum.
        self.update(2 * self.world.size * (residual * embedding).sum())
        self.distance = residual.square().sum()

    def scalars(self) -> dict[str, float]:
        """The squared distance of the embeddings before the last update, the same on all ranks."""
        return {"squared distance": self.distance.item()}
