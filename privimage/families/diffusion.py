"""Diffusion models: DDPM++ under EDM. The denoiser is the generator and the network trained privately."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.distributed.microbatch import activations
from privimage.distributed.world import World
from privimage.families.base import (
    Family,
    FineTuned,
    Pretrained,
    PrivateTraining,
    PublicTraining,
    Warmed,
    WarmTraining,
    image_shape,
)
from privimage.families.denoising import (
    DiffusionPrivate,
    DiffusionPublic,
    DiffusionWarm,
    losses_of_nothing,
)
from privimage.families.matching import Matching
from privimage.families.work import PARAMETER_BYTES, Work, label_features_pass, seconds_of_a_pass
from privimage.models import build_diffusion, build_generator, diffusion_arguments, edm, parameters
from privimage.models.guidance import ClassifierGuided, guided_levels
from privimage.models.label_features import LabelClassifier
from privimage.privacy.batching import cpu_batch_size
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.plan import PrivacyPlan


class DiffusionFamily(Family, Pretrained):
    """Common part of families that pretrain a diffusion model."""

    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """The denoiser alone."""
        return {"generator": build_diffusion(config, n_classes)}

    def generator(self, config: Config, n_classes: int) -> nn.Module:
        """The denoiser."""
        return build_diffusion(config, n_classes)

    def architecture(self, config: Config, n_classes: int) -> tuple[str, dict[str, Any]]:
        """DDPM++; see `Family.architecture`."""
        return "DDPM++", diffusion_arguments(config, n_classes)

    def sampling(self, config: Config) -> dict[str, Any]:
        """Arguments of `privimage.models.edm.sample`."""
        settings = config.synthesize
        return {
            "sampler": settings.sampler,
            "steps": settings.sampler_steps,
            "guidance": settings.guidance,
        }

    def guided(self, config: Config, generator: nn.Module, classifier: LabelClassifier) -> nn.Module:
        """With `synthesize.classifier_guidance`; see `Family.guided`."""
        if not (weight := config.synthesize.classifier_guidance):
            return generator
        return ClassifierGuided(generator, classifier, weight)

    def sample(
        self, config: Config, generator: nn.Module, labels: Tensor | None, indices: Tensor, draws: ImageDraws
    ) -> Tensor:
        """By the sampler, steps and guidance of `synthesize`; see `Family.sample`: uint8 (B, C, H, W)."""
        shape = image_shape(config)
        pixels = math.prod(shape)

        def churn(step: int) -> Tensor:
            return draws.normal(public_seed(config, "churn", step), indices, pixels).view(-1, *shape)

        # Latents belong to (seed, index of the image): a set of any size and any sharing over ranks begins
        # alike.
        latents = draws.normal(public_seed(config, "latents"), indices, pixels).view(-1, *shape)
        # The sampler is deterministic given latents and churn.
        images = edm.sample(generator, latents, labels, churn_noise=churn, **self.sampling(config))
        return edm.to_uint8(images)

    def public_training(
        self, config: Config, n_classes: int, world: World, start: dict[str, Tensor] | None = None
    ) -> PublicTraining:
        """EDM's loss, by DDP or DeepSpeed."""
        return DiffusionPublic(config, n_classes, world, start)

    def work(self, config: Config, plan: PrivacyPlan, n_classes: int, device: torch.device) -> list[Work]:
        """Estimate from passes through the denoiser, 3 per public step, and private steps."""
        denoiser = build_diffusion(config, n_classes).to(device)
        forward = losses_of_nothing(denoiser, image_shape(config), device)
        settings, precision = config.pretrain, config.runtime.precision
        seconds = seconds_of_a_pass(forward, device, precision, settings.batch_size)
        # One pass is measured; every stage is a number of passes.
        passes = Passes(seconds, activations(forward, device, precision), parameters(denoiser))
        later = self._later_work(config, plan, n_classes, passes, forward, device)
        if config.spec.pretraining == "none":
            return later
        return [passes.work("pretrain", settings.steps, settings.batch_size, 3, settings.batch_size), *later]

    @abstractmethod
    def _later_work(
        self,
        config: Config,
        plan: PrivacyPlan,
        n_classes: int,
        passes: "Passes",
        forward: Callable[[int], Tensor],
        device: torch.device,
    ) -> list[Work]:
        """Estimate of what follows pretraining; `forward(n)` is what was measured in `passes`."""


class Diffusion(DiffusionFamily, FineTuned, Warmed):
    """A denoiser that is fine-tuned by DP-SGD: see `Pretrained`, `FineTuned` and `Warmed`."""

    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """The denoiser, and the generator of a warm start that has one."""
        networks = super().networks(config, n_classes)
        if "embedding" in config.warm_starts:
            networks["matched generator"] = build_generator(config, n_classes)
        return networks

    def warm_training(
        self, config: Config, n_classes: int, world: World, pretrained: dict | None
    ) -> WarmTraining:
        """EDM's loss, by DDP."""
        return DiffusionWarm(config, n_classes, world, pretrained)

    def private_training(
        self, config: Config, n_classes: int, world: World, pretrained: dict | None
    ) -> PrivateTraining:
        """DP-SGD on the denoiser."""
        return DiffusionPrivate(config, n_classes, world, pretrained)

    def _later_work(
        self,
        config: Config,
        plan: PrivacyPlan,
        n_classes: int,
        passes: "Passes",
        forward: Callable[[int], Tensor],
        device: torch.device,
    ) -> list[Work]:
        """See `DiffusionFamily._later_work`."""
        finetune, settings = plan.the(DPSGD), config.synthesize
        # Per image of a physical batch: activations of its noise copies, and one gradient in fp32.
        copies = finetune.noise_copies * activations(forward, device, config.finetune.precision)
        held = copies + 4 * passes.size
        memory = cpu_batch_size(config.finetune, held) * held
        images_per_step = finetune.logical_batch_size * finetune.per_group
        seconds = finetune.steps * images_per_step * self._private_seconds(config, n_classes, device)
        # Heun's method evaluates the network twice per step, guidance with and without the label.
        calls = (
            settings.sampler_steps
            * (2 if settings.sampler == "heun" else 1)
            * (2 if settings.guidance else 1)
        )
        led = self._of_guidance(config, device) / (calls * passes.forward)
        start, warm = config.warm, []
        if "embedding" in config.warm_starts:
            warm.append(Matching().work_of_a_start(config, n_classes, device))
        if config.warm_starts:
            warm.append(passes.work("warm", start.steps, start.batch_size, 3, start.batch_size))
        return [
            *warm,
            Work(
                "finetune",
                finetune.steps,
                images_per_step * finetune.noise_copies,
                seconds,
                PARAMETER_BYTES * passes.size + memory,
            ),
            passes.work("synthesize", calls, settings.samples, 1 + led, settings.batch_size / 8),
        ]

    def _of_guidance(self, config: Config, device: torch.device) -> float:
        """Seconds per image of guidance by a private classifier: its features and their gradient.

        A weight that is left to be chosen counts as guidance.
        """
        settings = config.synthesize
        if "classify" not in config.stages or not settings.classifier_guidance:
            return 0.0
        levels = guided_levels(edm.noise_levels(settings.sampler_steps))
        twice = 2 if settings.sampler == "heun" else 1
        shape, precision = image_shape(config), config.runtime.precision
        # There and back, and there once more for the mirror image.
        passes = twice * levels * (3 + config.data.flip)
        return passes * label_features_pass(config.label_network, shape, device, precision)


@dataclass(frozen=True)
class Passes:
    """Cost of a denoiser of `size` parameters: seconds and bytes of activations per image of a pass."""

    forward: float
    memory: float
    size: int

    def work(self, stage: str, steps: int, images: float, passes: float, at_once: float) -> Work:
        """`passes` passes of `images` images in each of `steps` steps, with the activations of `at_once`
        images in memory.
        """
        return Work(
            stage,
            steps,
            images,
            steps * images * passes * self.forward,
            PARAMETER_BYTES * self.size + at_once * self.memory,
        )
