"""DP-MERF and DP-MEPF.

BigGAN's generator, without a discriminator, against the noisy mean embedding of the sensitive set (Harder et
al. 2021, 2023).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.distributed.microbatch import fitting, pieces
from privimage.distributed.world import World
from privimage.families.base import image_shape
from privimage.families.generator import GeneratorFamily, TrainedGenerator
from privimage.families.work import PARAMETER_BYTES, Work, classifier_pass
from privimage.models import build_generator
from privimage.models.network_moments import NetworkMoments
from privimage.models.random_features import RandomFeatures
from privimage.privacy.plan import PrivacyPlan

FeatureMap = RandomFeatures | NetworkMoments  # images (B, C, H, W) in [-1, 1] -> features (B, F)


class Matching(GeneratorFamily):
    """A generator without a discriminator, and without pretraining: see `Family`."""

    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """The generator alone."""
        return {"generator": build_generator(config, n_classes)}

    def work(self, config: Config, plan: PrivacyPlan, n_classes: int, device: torch.device) -> list[Work]:
        """See `Family.work`."""
        seconds, memory, size = self._generator_work(config, n_classes, device)
        return [
            self._matching_work("match", config, (seconds, memory, size), device),
            self._sampling(config, seconds, memory, PARAMETER_BYTES * size),
        ]

    def work_of_a_start(self, config: Config, n_classes: int, device: torch.device) -> Work:
        """The same training where another generator is warmed by what it makes."""
        return self._matching_work(
            "warm match", config, self._generator_work(config, n_classes, device), device
        )

    @staticmethod
    def _matching_work(
        stage: str, config: Config, generator: tuple[float, float, int], device: torch.device
    ) -> Work:
        """Passes through the generator, and the network if features are its, 3 for a step (forward and
        backward); `generator` is what `_generator_work` has measured.
        """
        settings, (seconds, memory, size) = config.match, generator
        through = (0.0, 0.0)
        if settings.embedding == "network":
            through = classifier_pass(config.query.network, image_shape(config), 1000, device, "fp32")
        work = settings.steps * settings.batch_size * 3 * (seconds + through[0])
        training = PARAMETER_BYTES * size + settings.batch_size * (memory + through[1])
        return Work(stage, settings.steps, settings.batch_size, work, training)


class MatchedGenerator(TrainedGenerator):
    """A generator whose mean embedding comes ever closer to a given one.

    Its steps depend on that embedding, the public features, the seed of the configuration and their own
    number, on nothing else.
    """

    def __init__(self, config: Config, n_classes: int, world: World, features: FeatureMap, target: Tensor):
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

        def forward(images: int) -> Tensor:
            blank = torch.zeros(images, *image_shape(config), device=world.device, requires_grad=True)
            return features(blank).sum()

        # Images whose features are computed at once.
        self.at_once = fitting(self.own, forward, "fp32", world, "match")

    def _embedded(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W).

        Where not all have room at once, in pieces, which the backward pass computes again.
        """
        if len(images) <= self.at_once:
            return self.features(images)
        parts = [images[piece] for piece in pieces(len(images), self.at_once)]
        return torch.cat([checkpoint(self.features, part, use_reentrant=False) for part in parts])

    def step(self, number: int) -> None:
        """One update; all ranks call it together."""
        # Mean features of this rank's images, by class; the sum over ranks is that of the batch.
        images, labels = self.batch(number)
        embedding = (
            F.one_hot(labels, len(self.target)).float().T
            @ self._embedded(images.float())
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
