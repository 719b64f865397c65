"""GANs: BigGAN with hinge losses. Only the discriminator is trained on sensitive images, by DP-SGD."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.distributed.engine import DDPEngine, adam
from privimage.distributed.microbatch import activations
from privimage.distributed.world import World
from privimage.families.adversary import AdversarialLosses, Adversary
from privimage.families.base import (
    FineTuned,
    Pretrained,
    PrivateTraining,
    PublicTraining,
    image_shape,
    load_pretrained,
)
from privimage.families.generator import BETAS, GeneratorFamily
from privimage.families.work import PARAMETER_BYTES, Work, seconds_of_a_pass
from privimage.models import build_discriminator, build_generator, edm, parameters
from privimage.models.biggan import Discriminator, d_loss_fake, d_loss_real
from privimage.privacy.batching import cpu_batch_size
from privimage.privacy.gradients import trained_parameters
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.plan import PrivacyPlan

LABEL = "label.weight"  # the label embedding of either network


class Gan(GeneratorFamily, Pretrained, FineTuned):
    """BigGAN's generator against a discriminator: see `Family`, `Pretrained` and `FineTuned`."""

    engines: ClassVar[tuple[str, ...]] = ("ddp",)  # DeepSpeed trains one network, and these are two in turn

    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """Generator and discriminator."""
        return {
            "generator": build_generator(config, n_classes),
            "discriminator": build_discriminator(config, n_classes),
        }

    def public_training(
        self, config: Config, n_classes: int, world: World, start: dict[str, Tensor] | None = None
    ) -> PublicTraining:
        """Discriminator and generator in turn, by DDP; there are no starters of a GAN."""
        assert start is None  # refused before a run begins
        return GanPublic(config, n_classes, world)

    def private_training(
        self, config: Config, n_classes: int, world: World, pretrained: dict | None
    ) -> PrivateTraining:
        """DP-SGD on the discriminator."""
        return GanPrivate(config, n_classes, world, pretrained)

    def work(self, config: Config, plan: PrivacyPlan, n_classes: int, device: torch.device) -> list[Work]:
        """By passes through both networks, 3 for a public step (forward and backward), and by a private step
        of the discriminator.
        """
        discriminator = build_discriminator(config, n_classes).to(device)

        def forward(images: int) -> Tensor:
            return discriminator(
                torch.zeros((images, *image_shape(config)), device=device),
                torch.zeros(images, dtype=torch.int64, device=device),
            )

        # Both networks are measured once; everything below is arithmetic on these six numbers.
        g_seconds, g_memory, g_size = self._generator_work(config, n_classes, device)
        d_seconds = seconds_of_a_pass(forward, device, config.runtime.precision, config.pretrain.batch_size)
        d_memory = activations(forward, device, config.runtime.precision)
        d_size, rows = parameters(discriminator), []
        weights = PARAMETER_BYTES * (g_size + d_size)
        pretrain, finetune, private = config.pretrain, config.finetune, plan.the(DPSGD)
        if config.spec.pretraining != "none":
            # A discriminator step sees a real and a generated image (2 x 3 passes) and makes the latter (1);
            # the generator's step runs through both networks.
            seconds = 6 * d_seconds + g_seconds + 3 * (g_seconds + d_seconds) / pretrain.discriminator_steps
            memory = weights + pretrain.batch_size * max(2 * d_memory, g_memory + d_memory)
            rows.append(
                Work(
                    "pretrain",
                    pretrain.steps,
                    pretrain.batch_size,
                    pretrain.steps * pretrain.batch_size * seconds,
                    memory,
                )
            )
        images_per_step = private.logical_batch_size * private.per_group
        seconds = images_per_step * self._private_seconds(config, n_classes, device)
        seconds += finetune.generator_batch_size * 3 * (g_seconds + d_seconds) / finetune.discriminator_steps
        held = 2 * d_memory + 4 * d_size  # per image: activations of the pair, and one gradient in fp32
        memory = weights + max(
            cpu_batch_size(finetune, held) * held,
            finetune.generator_batch_size * (g_memory + d_memory),
        )
        rows.append(Work("finetune", private.steps, images_per_step, private.steps * seconds, memory))
        return [*rows, self._sampling(config, g_seconds, g_memory, weights)]


class GanPublic(PublicTraining):
    """Hinge losses on public images.

    The generator's turn comes after every `pretrain.discriminator_steps` steps of the discriminator.
    """

    def __init__(self, config: Config, n_classes: int, world: World):
        self.config, self.n_classes, self.world = config, n_classes, world
        settings, self.bf16 = config.pretrain, config.runtime.precision == "bf16"
        torch.manual_seed(public_seed(config, "networks"))
        network, discriminator = (
            build_generator(config, n_classes).to(world.device),
            build_discriminator(config, n_classes).to(world.device),
        )
        self.generator = Adversary(
            config,
            n_classes,
            world,
            network,
            settings.batch_size,
            settings.learning_rate,
            settings.ema_decay,
            self.bf16,
        )
        self.discriminator = DDPEngine(
            discriminator, adam(discriminator, settings.learning_rate, BETAS), world, self.bf16
        )
        self.draws = ImageDraws(world.device)
        # Losses of the discriminator and the generator since the last log, on the device: no synchronisation
        # per step.
        self.sums = torch.zeros(2, device=world.device)
        self.counts = [0, 0]

    def step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """See `PublicTraining`."""
        network, count = self.generator.network, len(images)
        # Random numbers belong to a place in the global batch, not to a rank: any number of ranks draws the
        # same.
        place = self.world.rank * count + torch.arange(count, device=self.world.device)
        normal = self.draws.normal(
            public_seed(self.config, "discriminator step", step), place, network.latent_size + 1
        )
        # Real and generated images of the same labels, in one pass of the discriminator.
        real = edm.to_unit(images)
        if self.config.data.flip:
            real = torch.where((normal[:, -1] < 0)[:, None, None, None], real.flip(3), real)
        with torch.no_grad(), torch.autocast(real.device.type, torch.bfloat16, enabled=self.bf16):
            fake = network(normal[:, :-1], labels).float()
        scores = self.discriminator.forward(torch.cat([real, fake]), labels.repeat(2)).float()
        loss = (d_loss_real(scores[:count]) + d_loss_fake(scores[count:])).mean()
        self._count(0, self.discriminator.update(lambda _: loss))
        # The generator follows, against the updated discriminator.
        if (step + 1) % self.config.pretrain.discriminator_steps == 0:
            self._count(1, self.generator.step(self.discriminator.module, step))

    def _count(self, which: int, loss: Tensor) -> None:
        self.sums[which] += loss
        self.counts[which] += 1

    def scalars(self) -> dict[str, float]:
        """See `PublicTraining`."""
        # The mean over the ranks; each has counted the same steps.
        sums = (self.world.all_reduce_(self.sums.clone()) / self.world.size).tolist()
        names = ("discriminator loss", "generator loss")
        means = {
            name: total / count for name, total, count in zip(names, sums, self.counts, strict=True) if count
        }
        self.sums.zero_()
        self.counts = [0, 0]
        return means

    def state(self) -> dict[str, Any]:
        """See `PublicTraining`."""
        return self.generator.state() | {"discriminator": self.discriminator.state()}

    def load(self, state: dict[str, Any]) -> None:
        """See `PublicTraining`."""
        self.generator.load(state)
        self.discriminator.load(state["discriminator"])

    def samples(self) -> Tensor:
        """See `PublicTraining`."""
        return self.generator.samples()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See `PublicTraining`; and the `discriminator`, which is not averaged.

        It is judged by what it is now.
        """
        raw, averaged = (
            self.generator.network.state_dict(),
            self.generator.frozen(averaged=True).state_dict(),
        )
        return {"raw": raw, "ema": averaged, "discriminator": self.discriminator.module.state_dict()}


class GanPrivate(PrivateTraining):
    """DP-SGD on the discriminator; the generator is updated every `finetune.discriminator_steps` private
    steps.
    """

    def __init__(self, config: Config, n_classes: int, world: World, pretrained: dict | None):
        settings, self.world = config.finetune, world
        torch.manual_seed(public_seed(config, "networks"))
        self.module: Discriminator = build_discriminator(config, n_classes).to(world.device)
        network = build_generator(config, n_classes).to(world.device)
        if pretrained is not None:
            # Embeddings of public labels mean nothing for the sensitive ones.
            fresh = LABEL if config.spec.pretraining == "all" else None
            load_pretrained(self.module, pretrained["discriminator"], fresh)
            load_pretrained(network, pretrained[settings.start_from], fresh)
        self._learning_rate = settings.learning_rate
        self.ratio, bf16 = settings.discriminator_steps, settings.precision == "bf16"
        self.generator = Adversary(
            config,
            n_classes,
            world,
            network,
            settings.generator_batch_size,
            settings.generator_learning_rate,
            settings.ema_decay,
            bf16,
        )
        # Fakes come from a frozen copy, so that all micro-batches of a step see the same generator.
        self.losses: AdversarialLosses = AdversarialLosses(
            config, world, n_classes, self.generator.frozen(averaged=False)
        )

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam, without weight decay: a private update must be a function of the noised gradient alone."""
        return torch.optim.Adam(trained_parameters(self.module), lr=self._learning_rate, betas=BETAS)

    def after_step(self, step: int) -> dict[str, float]:
        """The generator's step, if it is its turn."""
        if step % self.ratio:
            return {}
        # Post-processing of the noised discriminator. Fakes of the next private steps come from the updated
        # generator.
        loss = self.world.all_reduce_(self.generator.step(self.module, step)) / self.world.size
        self.losses.generator = self.generator.frozen(averaged=False)
        return {"generator loss": loss.item()}

    def seen(self) -> list[Tensor]:
        """See `PrivateTraining`; with the generator of the images that are paired with sensitive ones."""
        return [*super().seen(), *self.losses.generator.state_dict().values()]

    def state(self) -> dict[str, Any]:
        """See `PrivateTraining`."""
        return self.generator.state()

    def load(self, state: dict[str, Any]) -> None:
        """See `PrivateTraining`."""
        self.generator.load(state)
        self.losses.generator = self.generator.frozen(averaged=False)

    def weights(self) -> dict[str, Tensor]:
        """See `PrivateTraining`."""
        return self.generator.frozen(averaged=True).state_dict()
