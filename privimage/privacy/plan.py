"""The privacy plan of a run: its mechanisms with their noise, found before anything is drawn.

Sampler, optimizer, noise and accountant are all built from the same plan, so they cannot disagree.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy import accounting, calibration
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms import MECHANISMS, Mechanism
from privimage.privacy.mechanisms.base import Share
from privimage.privacy.relation import Relation

M = TypeVar("M", bound=Mechanism)


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run promises, and the mechanisms in the order in which they are used.

    The last mechanism is that of the stage that trains; the synthetic images come from it.
    """

    epsilon: float
    delta: float
    accountant: str
    mechanisms: tuple[Mechanism, ...]

    @property
    def training(self) -> Mechanism:
        """The mechanism that the synthetic images come from."""
        return self.mechanisms[-1]

    @property
    def compositions(self) -> tuple[SampledGaussian, ...]:
        """All uses of all mechanisms, as the accountant sees them."""
        return tuple(mechanism.composition for mechanism in self.mechanisms)

    def the(self, kind: type[M]) -> M:
        """The mechanism of a kind. Raises UserError for a method that has none."""
        for mechanism in self.mechanisms:
            if isinstance(mechanism, kind):
                return mechanism
        raise UserError(
            f"method: it draws from the sensitive set by {self.training.name}, not by {kind.name}"
        )

    def spent(self, accountant: str | None = None) -> float:
        """Epsilon of the whole plan at its delta."""
        return accounting.epsilon(self.compositions, self.delta, accountant or self.accountant)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self) | {"mechanisms": [{"stage": one.stage, **asdict(one)} for one in self.mechanisms]}


def default_delta(count: int) -> float:
    """1 / (N ln N): below 1/N, so that revealing one whole image is not within the promise."""
    return 1 / (count * math.log(max(count, 3)))


def make_plan(config: Config, count: int) -> PrivacyPlan:
    """The plan of a run on `count` sensitive images (N, taken as public).

    Raises UserError if the expected batch is larger than the set, or if no amount of noise keeps the promise.
    """
    privacy = config.privacy
    accountant = privacy.accountant
    delta = privacy.delta or default_delta(count)
    training = _draft(MECHANISMS[config.spec.training], config, count)
    beside: list[Mechanism] = []

    shares = _shares(config)

    def noise(stated: bool, guess: float | None = None) -> float:
        others = tuple(one.composition for one in beside)
        return calibration.training_noise(
            privacy.epsilon, delta, training.composition, others, accountant, stated, guess
        )

    try:
        # Noise of the training alone, then of each mechanism beside it in turn, and again of the training.
        # What is found before the last only leads to the numbers that are stated.
        training = training.with_noise(noise(stated=not shares))
        for place, (kind, share) in enumerate(shares, 1):
            sigma = share.noise_multiplier or calibration.noise_beside(
                privacy.epsilon,
                delta,
                training.composition,
                share.max_rise,
                tuple(one.composition for one in beside),
                accountant,
            )
            beside.append(_draft(kind, config, count).with_noise(sigma))
            risen, last = training.noise_multiplier * (1 + share.max_rise), place == len(shares)
            # Where the noise beside was derived, that is what it leaves to the training.
            if last or share.noise_multiplier is not None:
                risen = noise(stated=last, guess=risen)
            training = training.with_noise(risen)
    except ValueError:
        raise UserError(
            f"privacy.epsilon: {privacy.epsilon} at delta {delta:g} cannot be kept; "
            "what is drawn beside the training alone may cost more"
        ) from None
    return PrivacyPlan(privacy.epsilon, delta, accountant, (*beside, training))


def _draft(kind: type[Mechanism], config: Config, count: int) -> Mechanism:
    """Raises UserError for a mechanism whose sensitivity is that of another relation than the promise."""
    mechanism = kind.draft(config, count)
    if mechanism.relation != Relation.of(config):
        raise UserError(f"privacy.unit, privacy.neighbours: {mechanism.name} has no bound for these")
    return mechanism


def _shares(config: Config) -> list[tuple[type[Mechanism], Share]]:
    """The mechanisms that a run uses beside that of its training, in the order of `MECHANISMS`."""
    shares = [(kind, kind.share(config)) for kind in MECHANISMS.values()]
    return [(kind, share) for kind, share in shares if share is not None]


def plan_without_noise(config: Config, count: int) -> PrivacyPlan:
    """The steps of a method without noise or clipping, in the form of a plan."""
    # Same steps and samples, but no bound and no noise.
    limits = config.finetune.model_copy(
        update={
            "logical_batch_size": min(config.finetune.logical_batch_size, count),
            "max_grad_norm": math.inf,
        }
    )
    unbounded = config.model_copy(update={"finetune": limits})
    kinds = [*(kind for kind, _ in _shares(config)), MECHANISMS[config.spec.training]]
    mechanisms = tuple(kind.draft(unbounded, count) for kind in kinds)
    return PrivacyPlan(math.inf, 1.0, config.privacy.accountant, mechanisms)


def plan_from_dict(tree: dict) -> PrivacyPlan:
    """The inverse of `PrivacyPlan.to_dict`."""
    mechanisms = tuple(_mechanism(**one) for one in tree["mechanisms"])
    return PrivacyPlan(tree["epsilon"], tree["delta"], tree["accountant"], mechanisms)


def _mechanism(stage: str, relation: dict, **parameters: Any) -> Mechanism:
    return MECHANISMS[stage](relation=Relation(**relation), **parameters)
