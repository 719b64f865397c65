"""The one place where sample rate, noise multipliers, clipping bound, steps and noise copies meet.

Sampler, optimizer, noise and accountant are all built from the same plan, so they cannot disagree.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import ClassVar

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy import accounting
from privimage.privacy.accounting import Mechanism


class MechanismPlan(ABC):
    """How one mechanism draws from the sensitive set."""

    name: ClassVar[str]  # what PRIVACY.json calls it
    stage: ClassVar[str]  # which uses it

    @property
    @abstractmethod
    def mechanism(self) -> Mechanism:
        """What the accountant sees, all uses together."""

    @property
    @abstractmethod
    def parameters(self) -> dict:
        """What PRIVACY.json tells of it beside noise multiplier, sample rate and count."""


@dataclass(frozen=True)
class QueryPlan(MechanismPlan):
    """The noisy histogram.

    Each image votes for `per_image` classes of one row, so the L2 sensitivity is sqrt(per_image).
    """

    name: ClassVar[str] = "semantic distribution query"
    stage: ClassVar[str] = "select"
    per_image: int
    noise_multiplier: float

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the noise on each bin, in votes."""
        return self.noise_multiplier * math.sqrt(self.per_image)

    @property
    def mechanism(self) -> Mechanism:
        """See `MechanismPlan.mechanism`."""
        return Mechanism(self.noise_multiplier)

    @property
    def parameters(self) -> dict:
        """See `MechanismPlan.parameters`."""
        return {"votes_per_image": self.per_image}


@dataclass(frozen=True)
class FinetunePlan(MechanismPlan):
    """DP-SGD.

    Poisson samples of rate B / N, per-image gradients clipped to C, noise of sigma C on their sum, T times.
    """

    name: ClassVar[str] = "DP-SGD fine-tuning"
    stage: ClassVar[str] = "finetune"
    count: int
    logical_batch_size: int
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    noise_copies: int

    @classmethod
    def draft(cls, config: Config, count: int) -> "FinetunePlan":
        """The plan for `count` images, its noise still to be found.

        Raises UserError if the expected batch is larger than the set.
        """
        settings = config.finetune
        if settings.logical_batch_size > count:
            raise UserError(
                f"finetune.logical_batch_size: {settings.logical_batch_size} is more than the {count} "
                "sensitive images"
            )
        return cls(
            count,
            settings.logical_batch_size,
            settings.steps,
            0.0,
            settings.max_grad_norm,
            config.noise_copies,
        )

    @property
    def sample_rate(self) -> Fraction:
        """q = B / N, exactly."""
        return Fraction(self.logical_batch_size, self.count)

    @property
    def mechanism(self) -> Mechanism:
        """See `MechanismPlan.mechanism`."""
        return Mechanism(self.noise_multiplier, float(self.sample_rate), self.steps)

    @property
    def parameters(self) -> dict:
        """See `MechanismPlan.parameters`."""
        return {"max_grad_norm": self.max_grad_norm, "noise_copies": self.noise_copies}

    def rank_deviation(self, ranks: int) -> float:
        """Standard deviation of the noise that each of `ranks` ranks adds to its sum: sigma C / sqrt(W).

        0 without noise.
        """
        return self.noise_multiplier * self.max_grad_norm / math.sqrt(ranks) if self.noise_multiplier else 0.0


@dataclass(frozen=True)
class MatchPlan(MechanismPlan):
    """One noisy sum of feature vectors of norm 1, each in the row of its image's label.

    The L2 sensitivity is 1.
    """

    name: ClassVar[str] = "noisy mean embedding"
    stage: ClassVar[str] = "match"
    count: int
    features: int
    noise_multiplier: float

    @classmethod
    def draft(cls, config: Config, count: int) -> "MatchPlan":
        """The plan for `count` images, its noise still to be found."""
        return cls(count, config.match.features, 0.0)

    @property
    def mechanism(self) -> Mechanism:
        """See `MechanismPlan.mechanism`."""
        return Mechanism(self.noise_multiplier)

    @property
    def parameters(self) -> dict:
        """See `MechanismPlan.parameters`."""
        return {"features": self.features}


@dataclass(frozen=True)
class EvolvePlan(MechanismPlan):
    """One noisy histogram an iteration.

    Each image votes for one synthetic image of its own class, so the L2 sensitivity is 1.
    """

    name: ClassVar[str] = "nearest-neighbour histogram"
    stage: ClassVar[str] = "evolve"
    per_image: ClassVar[int] = 1
    iterations: int
    noise_multiplier: float

    @classmethod
    def draft(cls, config: Config, count: int) -> "EvolvePlan":
        """The plan, its noise still to be found; it is the same for any `count`."""
        return cls(config.evolve.iterations, 0.0)

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the noise on each bin, in votes."""
        return self.noise_multiplier

    @property
    def mechanism(self) -> Mechanism:
        """See `MechanismPlan.mechanism`."""
        return Mechanism(self.noise_multiplier, count=self.iterations)

    @property
    def parameters(self) -> dict:
        """See `MechanismPlan.parameters`."""
        return {"votes_per_image": self.per_image}


TrainingPlan = FinetunePlan | MatchPlan | EvolvePlan
TRAININGS: dict[str, type[TrainingPlan]] = {
    kind.stage: kind for kind in (FinetunePlan, MatchPlan, EvolvePlan)
}


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run promises and how it keeps it.

    `query` is None for methods that do not ask the sensitive set; `training` is the mechanism that the
    synthetic images come from.
    """

    epsilon: float
    delta: float
    accountant: str
    query: QueryPlan | None
    training: TrainingPlan

    @property
    def parts(self) -> tuple[MechanismPlan, ...]:
        """All mechanisms in the order in which they are used."""
        return (*((self.query,) if self.query else ()), self.training)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What the accountant sees of `parts`."""
        return tuple(part.mechanism for part in self.parts)

    @property
    def finetune(self) -> FinetunePlan:
        """The training of a method that fine-tunes by DP-SGD. Raises UserError for another method."""
        if not isinstance(self.training, FinetunePlan):
            raise UserError(f"method: it draws from the sensitive set by {self.training.name}, not by DP-SGD")
        return self.training

    def spent(self, accountant: str | None = None) -> float:
        """Epsilon of the whole plan at its delta."""
        return accounting.epsilon(self.mechanisms, self.delta, accountant or self.accountant)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON; the plan of the training under the name of its stage."""
        tree = asdict(self)
        return tree | {self.training.stage: tree.pop("training")}


def default_delta(count: int) -> float:
    """1 / (N ln N): below 1/N, so that revealing one whole image is not within the promise."""
    return 1 / (count * math.log(max(count, 3)))


def make_plan(config: Config, count: int, accountant: str | None = None) -> PrivacyPlan:
    """The plan of a run on `count` sensitive images (N, taken as public).

    Raises UserError if the expected batch is larger than the set, or if no amount of noise keeps the promise.
    """
    privacy = config.privacy
    accountant = accountant or privacy.accountant
    delta = privacy.delta or default_delta(count)
    draft = TRAININGS[config.spec.training].draft(config, count)

    def noise(*others: Mechanism) -> float:
        return accounting.training_noise(privacy.epsilon, delta, draft.mechanism, others, accountant)

    try:
        query = None
        noise_multiplier = alone = noise()
        if config.spec.pretraining == "selected":
            training = dataclasses.replace(draft.mechanism, noise_multiplier=alone)
            sigma1 = config.select.noise_multiplier or accounting.query_noise(
                privacy.epsilon, delta, training, config.select.max_rise, accountant
            )
            query = QueryPlan(config.select.per_image, sigma1)
            noise_multiplier = noise(query.mechanism)
    except ValueError:
        raise UserError(
            f"privacy.epsilon: {privacy.epsilon} at delta {delta:g} cannot be kept; the query alone may "
            "cost more"
        ) from None
    return PrivacyPlan(
        privacy.epsilon,
        delta,
        accountant,
        query,
        dataclasses.replace(draft, noise_multiplier=noise_multiplier),
    )


def plan_from_dict(tree: dict) -> PrivacyPlan:
    """The inverse of `PrivacyPlan.to_dict`."""
    query = QueryPlan(**tree["query"]) if tree["query"] else None
    training = next(kind(**tree[stage]) for stage, kind in TRAININGS.items() if stage in tree)
    return PrivacyPlan(tree["epsilon"], tree["delta"], tree["accountant"], query, training)
