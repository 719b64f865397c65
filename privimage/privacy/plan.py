"""The one place where sample rate, noise multipliers, clipping bound, steps and noise copies meet.

Sampler, optimizer, noise and accountant are all built from the same plan, so they cannot disagree.
"""

import math
from dataclasses import asdict, dataclass
from fractions import Fraction

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy import accounting
from privimage.privacy.accounting import Mechanism


@dataclass(frozen=True)
class QueryPlan:
    """The noisy histogram: each image votes for `per_image` classes of one row, so the L2 sensitivity is sqrt(per_image)."""

    per_image: int
    noise_multiplier: float

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the noise on each bin, in votes."""
        return self.noise_multiplier * math.sqrt(self.per_image)

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant sees."""
        return Mechanism(self.noise_multiplier)


@dataclass(frozen=True)
class FinetunePlan:
    """DP-SGD: Poisson samples of rate B / N, per-image gradients clipped to C, noise of sigma C on their sum, T times."""

    count: int
    logical_batch_size: int
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    noise_copies: int

    @property
    def sample_rate(self) -> Fraction:
        """q = B / N, exactly."""
        return Fraction(self.logical_batch_size, self.count)

    @property
    def mechanism(self) -> Mechanism:
        """What the accountant sees."""
        return Mechanism(self.noise_multiplier, float(self.sample_rate), self.steps)

    def rank_deviation(self, ranks: int) -> float:
        """Standard deviation of the noise that each of `ranks` ranks adds to its sum: sigma C / sqrt(W); 0 without noise."""
        return self.noise_multiplier * self.max_grad_norm / math.sqrt(ranks) if self.noise_multiplier else 0.0


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run promises and how it keeps it. `query` is None for methods that do not ask the sensitive set."""

    epsilon: float
    delta: float
    accountant: str
    query: QueryPlan | None
    finetune: FinetunePlan

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All mechanisms in the order in which they are used."""
        return (*((self.query.mechanism,) if self.query else ()), self.finetune.mechanism)

    def spent(self, accountant: str | None = None) -> float:
        """Epsilon of the whole plan at its delta."""
        return accounting.epsilon(self.mechanisms, self.delta, accountant or self.accountant)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self)


def default_delta(count: int) -> float:
    """1 / (N ln N): below 1/N, so that revealing one whole image is not within the promise."""
    return 1 / (count * math.log(max(count, 3)))


def make_plan(config: Config, count: int, accountant: str | None = None) -> PrivacyPlan:
    """The plan of a run on `count` sensitive images (N, taken as public).

    Raises UserError if the expected batch is larger than the set, or if no amount of noise keeps the promise.
    """
    settings, privacy = config.finetune, config.privacy
    accountant = accountant or privacy.accountant
    delta = privacy.delta or default_delta(count)
    if settings.logical_batch_size > count:
        raise UserError(f"finetune.logical_batch_size: {settings.logical_batch_size} is more than the {count} sensitive images")
    rate = settings.logical_batch_size / count
    try:
        query = None
        alone = accounting.finetune_noise(privacy.epsilon, delta, rate, settings.steps, (), accountant)
        noise_multiplier = alone
        if config.spec.pretraining == "selected":
            sigma1 = config.select.noise_multiplier or accounting.query_noise(
                privacy.epsilon, delta, Mechanism(alone, rate, settings.steps), config.select.max_rise, accountant
            )
            query = QueryPlan(config.select.per_image, sigma1)
            noise_multiplier = accounting.finetune_noise(privacy.epsilon, delta, rate, settings.steps, (query.mechanism,), accountant)
    except ValueError:
        raise UserError(f"privacy.epsilon: {privacy.epsilon} at delta {delta:g} cannot be kept; the query alone may cost more") from None
    finetune = FinetunePlan(count, settings.logical_batch_size, settings.steps, noise_multiplier, settings.max_grad_norm, settings.noise_copies)
    return PrivacyPlan(privacy.epsilon, delta, accountant, query, finetune)


def plan_from_dict(tree: dict) -> PrivacyPlan:
    """The inverse of `PrivacyPlan.to_dict`."""
    query = QueryPlan(**tree["query"]) if tree["query"] else None
    return PrivacyPlan(**{**tree, "query": query, "finetune": FinetunePlan(**tree["finetune"])})
