"""Training of a denoiser by EDM's loss, in public and in private."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.config.private import Warm
from privimage.config.public import Pretrain
from privimage.config.seeds import public_seed
from privimage.data.sensitive import dropped
from privimage.distributed.engine import DDPEngine, Engine, adam, make_engine
from privimage.distributed.microbatch import fitting
from privimage.distributed.world import World
from privimage.families.base import (
    ImageLosses,
    PrivateTraining,
    PublicTraining,
    WarmTraining,
    image_shape,
    load_pretrained,
)
from privimage.models import build_diffusion, edm
from privimage.models.ddpmpp import DDPMpp
from privimage.models.ema import EMA
from privimage.privacy.gradients import trained_parameters
from privimage.telemetry import flops

LABEL = "network.label.weight"


def losses_of_nothing(
    denoiser: nn.Module, shape: tuple[int, int, int], device: torch.device
) -> Callable[[int], Tensor]:
    """A function of n: the losses (n,) of as many images of zeros, to time and measure with."""

    def forward(images: int) -> Tensor:
        x, sigma = torch.zeros(images, *shape, device=device), torch.ones(images, device=device)
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        return edm.loss(denoiser, x, labels, sigma, x)

    return forward


class DiffusionPublic(PublicTraining):
    """EDM's loss on public images through an engine, with an exponential average of the weights."""

    stage = "pretrain"

    def __init__(
        self,
        config: Config,
        n_classes: int,
        world: World,
        start: dict[str, Tensor] | None = None,
        fresh: str | None = None,
    ):
        """`start` are weights to begin with, but for the parameter `fresh`."""
        self.config, self.n_classes, self.world = config, n_classes, world
        self.settings = self._settings()
        torch.manual_seed(public_seed(config, "networks"))
        self.denoiser = build_diffusion(config, n_classes).to(world.device)
        if start is not None:  # before the engine, which may copy the weights
            load_pretrained(self.denoiser, start, fresh)
        network = self.denoiser.network
        assert isinstance(network, DDPMpp)  # the family's
        network.recompute = config.pretrain.recompute
        if self.stage == "pretrain" and config.pretrain.compile:
            network.compile(dynamic=False)  # in place: names of weights stay
        self.engine = self._engine()
        self.ema = EMA(self.denoiser, self.settings.ema_decay)
        self.loss_sum, self.steps = torch.zeros((), device=world.device), 0
        batch_size = -(-self.settings.batch_size // world.size)
        of_nothing = losses_of_nothing(self.denoiser, image_shape(config), world.device)
        self.at_once = fitting(batch_size, of_nothing, config.runtime.precision, world, self.stage)
        self.operations = flops.of_training(of_nothing)

    def _settings(self) -> Pretrain | Warm:
        return self.config.pretrain

    def _engine(self) -> Engine:
        return make_engine(self.config, self.denoiser, self.world)

    def step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """See `PublicTraining`."""
        self._update(self._noised(images, labels, step))

    def _update(self, noised: tuple[Tensor, ...]) -> None:
        """One update by the images, labels, noise levels and noise of `_noised`."""

        def loss(piece: slice) -> Tensor:
            return edm.loss(self.engine.forward, *(part[piece] for part in noised)).mean()

        # Summed on the device; reading it would wait for the GPU at every step.
        self.loss_sum += self.engine.update(loss, len(noised[0]), self.at_once)
        self.ema.update()
        self.steps += 1

    def _noised(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, ...]:
        """Images in [-1, 1], labels with dropout, noise levels and noise: the random part of a step,
        repeatable.
        """
        device = self.world.device
        generator = torch.Generator(device).manual_seed(
            public_seed(self.config, f"{self.stage} step", step, self.world.rank)
        )
        # The order of these draws is part of a repeatable step.
        x = edm.to_unit(images)
        count = len(x)
        if self.config.data.flip:
            flipped = torch.rand(count, generator=generator, device=device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        sigma = edm.draw_sigma(torch.randn(count, generator=generator, device=device))
        noise = torch.randn(x.shape, generator=generator, device=device)
        hidden = torch.rand(count, generator=generator, device=device) < self.settings.label_dropout
        return x, torch.where(hidden, self.n_classes, labels), sigma, noise

    def scalars(self) -> dict[str, float]:
        """See `PublicTraining`."""
        mean = self.world.all_reduce_(self.loss_sum.clone()) / (self.steps * self.world.size)
        self.loss_sum.zero_()
        self.steps = 0
        return {"loss": mean.item()}

    def state(self) -> dict[str, Any]:
        """See `PublicTraining`."""
        return {"engine": self.engine.state(), "ema": self.ema.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """See `PublicTraining`."""
        self.engine.load(state["engine"])
        self.ema.load_state_dict(state["ema"])

    def samples(self) -> Tensor:
        """See `PublicTraining`."""
        # The averaged weights, in a network of their own: training goes on with the others.
        averaged = build_diffusion(self.config, self.n_classes).to(self.world.device)
        averaged.load_state_dict(self.denoiser.state_dict())
        self.ema.copy_to(averaged)
        count = 5 * min(self.n_classes, 10) if self.n_classes else 25
        generator = torch.Generator(self.world.device).manual_seed(public_seed(self.config, "latents"))
        latents = torch.randn(count, *image_shape(self.config), generator=generator, device=self.world.device)
        labels = torch.arange(count, device=self.world.device) % max(self.n_classes, 1)
        return edm.to_uint8(edm.sample(averaged, latents, labels if self.n_classes else None, steps=18))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See `PublicTraining`."""
        return {"raw": self.denoiser.state_dict(), "ema": self.ema.averages}


class DiffusionWarm(DiffusionPublic, WarmTraining):
    """The same on images that noisy statistics of the sensitive set have given, from pretrained weights."""

    stage = "warm"

    def __init__(self, config: Config, n_classes: int, world: World, pretrained: dict | None):
        start = None if pretrained is None else pretrained["ema"]
        super().__init__(config, n_classes, world, start, _fresh_label(config))

    def step(
        self, images: Tensor, labels: Tensor, step: int, below: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """See `WarmTraining`."""
        x, labels, sigma, noise = self._noised(images, labels, step)
        if below is not None:
            # Both with the same random numbers: which of the two an image is follows from its noise level.
            public, public_labels, _, _ = self._noised(*below, step)
            low = sigma < self.config.warm.sigma_min
            x, labels = (
                torch.where(low[:, None, None, None], public, x),
                torch.where(low, public_labels, labels),
            )
        self._update((x, labels, sigma, noise))

    def _settings(self) -> Pretrain | Warm:
        return self.config.warm

    def _engine(self) -> Engine:
        optimizer = adam(self.denoiser, self.settings.learning_rate)
        return DDPEngine(self.denoiser, optimizer, self.world, self.config.runtime.precision == "bf16")


def _fresh_label(config: Config) -> str | None:
    """The name of the embedding that is not taken from pretraining.

    Embeddings of public labels mean nothing for the sensitive ones, unless the selection gave them the
    sensitive classes.
    """
    return LABEL if config.spec.pretraining == "all" else None


class DiffusionPrivate(PrivateTraining):
    """DP-SGD on the denoiser, with an exponential average of its weights after each private step."""

    def __init__(self, config: Config, n_classes: int, world: World, pretrained: dict | None):
        torch.manual_seed(public_seed(config, "networks"))
        self.module = build_diffusion(config, n_classes).to(world.device)
        if pretrained is not None:
            # A warm start knows the sensitive classes already.
            fresh = None if config.finetuned_from == "warm" else _fresh_label(config)
            load_pretrained(self.module, pretrained[config.finetune.start_from], fresh)
        self.losses = DenoisingLosses(config, world, n_classes)
        self._learning_rate = config.finetune.learning_rate
        self.ema = EMA(self.module, config.finetune.ema_decay)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(trained_parameters(self.module), lr=self._learning_rate)

    def after_step(self, step: int) -> dict[str, float]:
        """Take the weights into the average."""
        self.ema.update()
        return {}

    def state(self) -> dict[str, Any]:
        """See `PrivateTraining`."""
        return {"ema": self.ema.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """See `PrivateTraining`."""
        self.ema.load_state_dict(state["ema"])

    def weights(self) -> dict[str, Tensor]:
        """See `PrivateTraining`."""
        return self.ema.averages


class DenoisingLosses(ImageLosses):
    """EDM's loss of K noised copies of each image; all random numbers belong to (step, image)."""

    def __init__(self, config: Config, world: World, n_classes: int):
        super().__init__(config, world, n_classes)
        self.copies, self.label_dropout = config.finetune.noise_copies, config.finetune.label_dropout

    def draw(
        self, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> images, labels, sigma and noise with K copies each: (B, K, ...)."""
        count, copies, pixels = len(images), self.copies, images[0].numel()
        # One draw per image for everything that is random in its loss: label dropout, noise levels, noise.
        normal = self.draws.normal(seed, indices, 1 + copies * (1 + pixels))
        hidden = dropped(normal[:, 0], self.label_dropout)
        sigma = edm.draw_sigma(normal[:, 1 : 1 + copies])
        noise = normal[:, 1 + copies :].view(count, copies, *self.shape)
        # The class after the last one stands for "no label" (classifier-free guidance).
        shown_labels = torch.where(hidden, self.n_classes, labels)
        return (
            edm.to_unit(images)[:, None].expand(-1, copies, -1, -1, -1),
            shown_labels[:, None].expand(-1, copies),
            sigma,
            noise,
        )

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """See `ImageLosses`."""
        images, labels, sigma, noise = tensors
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return edm.loss(module, images, labels if self.n_classes else None, sigma, noise)
