"""BigGAN's generator in training, whatever its loss, and sampling from it."""

from typing import Any

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.distributed.batch_norm import over_ranks
from privimage.distributed.engine import DDPEngine, adam
from privimage.distributed.microbatch import activations
from privimage.distributed.world import World
from privimage.families.base import Family
from privimage.families.work import Work, seconds_of_a_pass
from privimage.models import build_generator, edm, gan_arguments, parameters
from privimage.models.biggan import Generator, recalibrate
from privimage.models.ema import EMA

BETAS = (0.5, 0.999)
CALIBRATION = (8, 64)  # batches and latents in each, from which a generator's statistics are measured


@torch.no_grad()
def generated(generator: Generator, draws: ImageDraws, seed: int, indices: Tensor, labels: Tensor) -> Tensor:
    """Images uint8 (B, C, H, W) of an eval-mode generator, from labels and latents that belong to (seed,
    index).

    `indices` and `labels` int64 (B,), labels 0 for an unlabelled set.
    """
    return edm.to_uint8(generator(draws.normal(seed, indices, generator.latent_size), labels))


class TrainedGenerator:
    """A generator, its optimizer, and its averaged weights.

    Batch norm is over the latents of all ranks, so that a step is the same for any number of ranks that
    divides the batch.
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
        self.config, self.n_classes, self.world, self.network, self.bf16 = (
            config,
            n_classes,
            world,
            network,
            bf16,
        )
        # Rounded up, so that all ranks have as many latents.
        self.own = -(-batch_size // world.size)
        # Statistics over the global batch: otherwise the function trained would change with the number of
        # ranks.
        over_ranks(network, world)
        self.engine = DDPEngine(network, adam(network, learning_rate, BETAS), world, bf16)
        self.ema = EMA(network, decay)
        self.draws = ImageDraws(world.device)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """This rank's images (B, C, H, W) in [-1, 1] of step `number`, to be trained on, and their labels
        (B,), drawn in turn.
        """
        # Latents belong to places in the whole batch: the step is the same however ranks share it.
        place = self.world.rank * self.own + torch.arange(self.own, device=self.world.device)
        labels = (place + number * self.own * self.world.size) % max(self.n_classes, 1)
        latents = self.draws.normal(
            public_seed(self.config, "generator step", number), place, self.network.latent_size
        )
        return self.engine.forward(latents, labels), labels

    def update(self, loss: Tensor) -> Tensor:
        """One update by the mean of all ranks' scalar losses; returns this rank's, detached."""
        mean = self.engine.update(lambda _: loss)
        self.ema.update()
        return mean

    def frozen(self, averaged: bool) -> Generator:
        """An eval-mode copy with the current or averaged weights and recomputed batch-norm statistics."""
        # A copy: training goes on with the original, whose statistics stay those of its batches.
        # Buffers are copied with the weights; `recalibrate` replaces them.
        still = build_generator(self.config, self.n_classes).to(self.world.device)
        still.load_state_dict(self.network.state_dict())
        if averaged:
            self.ema.copy_to(still)
        batches, latents = CALIBRATION
        seed = public_seed(self.config, "batch-norm statistics")
        # Fixed latents and evenly spread labels: the statistics are a function of the weights alone.
        normal = self.draws.normal(seed, torch.arange(batches * latents), still.latent_size)
        labels = torch.arange(batches * latents, device=self.world.device) % max(self.n_classes, 1)
        return recalibrate(still, list(zip(normal.split(latents), labels.split(latents), strict=True)))

    def samples(self) -> Tensor:
        """A few images of the averaged generator, uint8 (N, C, H, W), up to 10 classes in turn."""
        indices = torch.arange(
            5 * min(self.n_classes, 10) if self.n_classes else 25, device=self.world.device
        )
        return generated(
            self.frozen(averaged=True),
            self.draws,
            public_seed(self.config, "latents"),
            indices,
            indices % max(self.n_classes, 1),
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; all ranks must call it together."""
        return {"generator": self.engine.state(), "ema": self.ema.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.engine.load(state["generator"])
        self.ema.load_state_dict(state["ema"])


class GeneratorFamily(Family):
    """Common part of families whose images come from BigGAN's generator in one pass."""

    def generator(self, config: Config, n_classes: int) -> Generator:
        """BigGAN's generator."""
        return build_generator(config, n_classes)

    def architecture(self, config: Config, n_classes: int) -> tuple[str, dict[str, Any]]:
        """BigGAN's generator; see `Family.architecture`."""
        return "BigGAN", gan_arguments(config, n_classes)

    def sampling(self, config: Config) -> dict[str, Any]:
        """One pass needs latents and nothing else."""
        return {}

    def sample(
        self, config: Config, generator: nn.Module, labels: Tensor | None, indices: Tensor, draws: ImageDraws
    ) -> Tensor:
        """One pass of the generator, which is in eval mode: uint8 (B, C, H, W)."""
        assert isinstance(generator, Generator)
        return generated(
            generator,
            draws,
            public_seed(config, "latents"),
            indices,
            torch.zeros_like(indices) if labels is None else labels,
        )

    def _generator_work(
        self, config: Config, n_classes: int, device: torch.device
    ) -> tuple[float, float, int]:
        """Seconds of a pass and bytes of activations per image, and the number of parameters, of the
        generator.
        """
        generator = build_generator(config, n_classes).to(device)

        def forward(images: int) -> Tensor:
            return generator(
                torch.zeros(images, generator.latent_size, device=device),
                torch.zeros(images, dtype=torch.int64, device=device),
            )

        # Timed on zeros: the time of a convolution does not depend on the values.
        seconds = seconds_of_a_pass(forward, device, config.runtime.precision, config.pretrain.batch_size)
        return seconds, activations(forward, device, config.runtime.precision), parameters(generator)

    def _sampling(self, config: Config, seconds: float, memory: float, weights: float) -> Work:
        """Work of synthesis; `weights` are the bytes of the networks."""
        settings = config.synthesize
        return Work(
            "synthesize",
            1,
            settings.samples,
            settings.samples * seconds,
            weights + settings.batch_size * memory / 8,
        )
