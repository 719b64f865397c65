"""DP-SGD (Abadi et al. 2016): the mechanism; `privimage.privacy.dpsgd` takes its steps."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Self

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms.base import Mechanism
from privimage.privacy.relation import Relation


@dataclass(frozen=True, kw_only=True)
class DPSGD(Mechanism):
    """Poisson samples of rate B / N, per-image gradients clipped to C, noise sigma C on their sum, T times.

    The gradient of an image is averaged over its K noise copies before it is clipped (Dockhorn et al. 2023).
    Where groups are the unit it is the group that is sampled, with probability B / N of N groups, and whose
    gradient is averaged over m of its images and clipped once (Charles et al. 2024).
    """

    name: ClassVar[str] = "DP-SGD fine-tuning"
    stage: ClassVar[str] = "finetune"
    count: int  # N
    logical_batch_size: int  # B
    steps: int  # T
    max_grad_norm: float  # C
    noise_copies: int  # K
    per_group: int = 1  # m

    @classmethod
    def draft(cls, config: Config, count: int) -> Self:
        """See `Mechanism.draft`. Raises UserError if the expected batch is larger than the set."""
        settings = config.finetune
        if settings.logical_batch_size > count:
            raise UserError(
                f"finetune.logical_batch_size: {settings.logical_batch_size} is more than the {count} "
                f"sensitive {config.privacy.unit}s"
            )
        return cls(
            noise_multiplier=0.0,
            relation=Relation.of(config),
            per_group=config.per_unit,
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
        rate, replacement = float(self.sample_rate), self.relation.replacement
        return SampledGaussian(self.noise_multiplier, rate, self.steps, replacement)

    @property
    def contribution(self) -> float:
        """C: one unit adds its clipped gradient to the sum, or nothing."""
        return self.max_grad_norm

    @property
    def claim(self) -> str:
        """See `Mechanism.claim`."""
        unit = self.relation.unit
        of = "the average gradient of images_per_group of its images" if unit == "group" else "a gradient"
        return (
            f"each {unit} is in a step with probability sample_rate, independently of all others, and adds "
            f"{of}, of L2 norm at most max_grad_norm, to the sum that gets noise"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Mechanism.parameters`."""
        known = {"max_grad_norm": self.max_grad_norm, "noise_copies": self.noise_copies}
        return known | ({"images_per_group": self.per_group} if self.relation.unit == "group" else {})

    def rank_deviation(self, ranks: int) -> float:
        """Standard deviation of the noise that each of `ranks` ranks adds to its sum: sigma C / sqrt(W).

        Twice that where neighbours have one image replaced.
        """
        return self.standard_deviation / math.sqrt(ranks)
