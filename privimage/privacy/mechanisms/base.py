"""What every mechanism that draws from the sensitive set has to know about itself.

A new mechanism is one file with a subclass of `Mechanism`, and one line in `mechanisms/__init__.py`. The plan
is a list of these objects; accountant, ledger, PRIVACY.json and `privimage plan` ask them.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from privimage.config import Config
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.relation import ONE_IMAGE, Relation


@dataclass(frozen=True)
class Share:
    """The part of the budget of a mechanism that is used beside the training."""

    noise_multiplier: float | None  # where it is given
    max_rise: float  # else the smallest that raises the noise of the training by at most this part


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """One mechanism of a run, with its public parameters and its noise, before it is used."""

    name: ClassVar[str]  # in PRIVACY.json and for people
    # Its name in the plan and in the ledger: the stage that uses it, and what for where it uses several.
    stage: ClassVar[str]
    replacing: ClassVar[float] = 2.0  # moves the sum by so many contributions, which may be opposite vectors
    noise_multiplier: float  # standard deviation of the noise over the L2 sensitivity; 0: none
    relation: Relation = ONE_IMAGE  # for which the sensitivity is stated; a plan takes that of its promise

    @classmethod
    @abstractmethod
    def draft(cls, config: Config, count: int) -> Self:
        """The mechanism for `count` units of the sensitive set (N, taken as public), its noise still to be
        found.

        Raises UserError for settings that do not fit N.
        """

    @classmethod
    def share(cls, config: Config) -> Share | None:
        """What it may cost beside the training; None for a run without it, and for that of a training."""
        return None

    @property
    @abstractmethod
    def composition(self) -> SampledGaussian:
        """All uses together, as the accountant and the ledger see them."""

    @property
    def draws(self) -> int:
        """How often noise is drawn, each time with another key: once a use."""
        return self.composition.count

    @property
    @abstractmethod
    def contribution(self) -> float:
        """Largest L2 norm of what one unit adds to the sum that gets noise."""

    @property
    def sensitivity(self) -> float:
        """Largest L2 distance of what is summed up on two neighbouring sets, before noise."""
        return self.contribution * (self.replacing if self.relation.replacement else 1.0)

    @property
    @abstractmethod
    def claim(self) -> str:
        """Why the contribution of a unit is bounded, in one sentence of the formal statement."""

    @property
    def parameters(self) -> dict[str, Any]:
        """What PRIVACY.json states beside noise multiplier, sample rate and number of uses."""
        return {}

    @property
    def standard_deviation(self) -> float:
        """Standard deviation of the noise on each coordinate of the sum; 0 without noise."""
        return self.noise_multiplier * self.sensitivity if self.noise_multiplier else 0.0

    def with_noise(self, noise_multiplier: float) -> Self:
        """The same mechanism with another noise multiplier."""
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    def described(self, used: SampledGaussian) -> dict[str, Any]:
        """The entry of PRIVACY.json for uses that the ledger has recorded."""
        return {
            "name": self.name,
            "mechanism": used.kind,
            "claim": self.claim,
            "sensitivity": self.sensitivity,
            **self.parameters,
            "noise_multiplier": used.noise_multiplier,
            "sample_rate": used.sample_rate,
            "count": used.count,
        }


@dataclass(frozen=True, kw_only=True)
class OneUse(Mechanism):
    """A mechanism that a run uses once, on the whole set."""

    @property
    def composition(self) -> SampledGaussian:
        """See `Mechanism.composition`."""
        return SampledGaussian(self.noise_multiplier, replacement=self.relation.replacement)
