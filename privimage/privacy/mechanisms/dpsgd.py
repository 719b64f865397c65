"""DP-SGD (Abadi et al. 2016): the mechanism; `privimage.privacy.dpsgd` takes its steps."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms.base import Mechanism


@dataclass(frozen=True, kw_only=True)
class DPSGD(Mechanism):
    """Poisson samples of rate B / N, per-image gradients clipped to C, noise sigma C on their sum, T times.

    The gradient of an image is averaged over its K noise copies before it is clipped (Dockhorn et al. 2023).
    """

    name: ClassVar[str] = "DP-SGD fine-tuning"
    stage: ClassVar[str] = "finetune"
    count: int  # N
    logical_batch_size: int  # B
    steps: int  # T
    max_grad_norm: float  # C
    noise_copies: int  # K

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`. Raises UserError if the expected batch is larger than the set."""
        settings = config.finetune
        if settings.logical_batch_size > count:
            raise UserError(
                f"finetune.logical_batch_size: {settings.logical_batch_size} is more than the {count} "
                "sensitive images"
            )
        return cls(
            noise_multiplier=0.0,
            count=count,
            logical_batch_size=settings.logical_batch_size,
            steps=settings.steps,
            max_grad_norm=settings.max_grad_norm,
            noise_copies=config.noise_copies,
        )

    @property
    def sample_rate(self) -> Fraction:
        """q = B / N, exactly."""
        return Fraction(self.logical_batch_size, self.count)

    @property
    def composition(self) -> SampledGaussian:
        """See `Mechanism.composition`."""
        return SampledGaussian(self.noise_multiplier, float(self.sample_rate), self.steps)

    @property
    def sensitivity(self) -> float:
        """C: one image adds its clipped gradient to the sum, or nothing."""
        return self.max_grad_norm

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        return (
            "each image is in a step with probability sample_rate, independently of all others, and adds a "
            "gradient of L2 norm at most max_grad_norm to the sum that gets noise"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        return {"max_grad_norm": self.max_grad_norm, "noise_copies": self.noise_copies}

    def rank_deviation(self, ranks: int) -> float:
        """Standard deviation of the noise that each of `ranks` ranks adds to its sum: sigma C / sqrt(W)."""
        return self.standard_deviation / math.sqrt(ranks)
