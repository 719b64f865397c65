"""Cost of a composition of mechanisms, and the noise that a budget needs, by dp-accounting.

Neighbouring data sets differ by adding or removing one image.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from scipy.optimize import brentq

logging.getLogger("absl").setLevel(logging.ERROR)  # the RDP accountant reports each order that it skips


@dataclass(frozen=True)
class SampledGaussian:
    """A Gaussian mechanism applied `count` times, each time to a Poisson sample at `sample_rate`.

    The accountant and the ledger know mechanisms by this alone: its event, and its entry in the ledger.

    `noise_multiplier` is the standard deviation of the noise divided by the L2 sensitivity; `sample_rate` 1
    is the plain Gaussian mechanism.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    count: int = 1

    @property
    def single(self) -> "SampledGaussian":
        """A single use."""
        return replace(self, count=1)

    @property
    def kind(self) -> str:
        """Its name in the literature."""
        return "Gaussian" if self.sample_rate == 1 else "Poisson-sampled Gaussian"

    def to_entry(self) -> list[float]:
        """Its form in the ledger."""
        return [self.noise_multiplier, self.sample_rate, self.count]

    @classmethod
    def from_entry(cls, entry: list[float]) -> "SampledGaussian":
        """The inverse of `to_entry`. Raises TypeError or ValueError for an entry that is none."""
        noise_multiplier, sample_rate, count = entry
        return cls(noise_multiplier, sample_rate, int(count))

    def event(self) -> dp_accounting.DpEvent:
        """This mechanism in dp-accounting's terms."""
        single: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1:
            single = dp_accounting.PoissonSampledDpEvent(self.sample_rate, single)
        return dp_accounting.SelfComposedDpEvent(single, self.count)


FINE, COARSE = (
    1e-4,
    1e-3,
)  # discretisation of privacy losses: the one that is stated, the one that searches begin with


@lru_cache(maxsize=32)
def _composed(
    mechanisms: tuple[SampledGaussian, ...], accountant: str, interval: float
) -> dp_accounting.PrivacyAccountant:
    # Compositions are built one mechanism at a time and cached: the search changes only the last one.
    if not mechanisms:
        return (
            pld.PLDAccountant(value_discretization_interval=interval)
            if accountant == "pld"
            else rdp.RdpAccountant()
        )
    whole = copy.deepcopy(_composed(mechanisms[:-1], accountant, interval))
    return whole.compose(mechanisms[-1].event(), 1) if mechanisms[-1].count else whole


def epsilon(
    mechanisms: Iterable[SampledGaussian], delta: float, accountant: str = "pld", interval: float = FINE
) -> float:
    """Epsilon of the composition at `delta`, by privacy loss distributions (`pld`) or Rényi DP (`rdp`).

    `interval` is the discretisation of the privacy loss (pld only); the result is an upper bound at any
    interval. References: Koskela et al. 2020 and Doroshenko et al. 2022 (PLD); Mironov et al. 2019 (RDP of
    the sampled Gaussian).
    """
    return max(0.0, _composed(tuple(mechanisms), accountant, interval).get_epsilon(delta))


def profile(mechanisms: Iterable[SampledGaussian], epsilons: np.ndarray) -> np.ndarray:
    """Delta (E,) of the composition at each of `epsilons` (E,) >= 0, in either direction of the relation.

    Upper bounds, by PLD.
    """
    composed = _composed(tuple(mechanisms), "pld", COARSE)
    return np.array([composed.get_delta(e) for e in epsilons])


def best_guess(mechanisms: Iterable[SampledGaussian]) -> float:
    """Upper bound on the accuracy of a membership attack on one image, in [0.5, 1]; 0.5 is guessing.

    The attacker knows all other images and every output, and both answers are equally likely beforehand. The
    best attack is right with probability (1 + TV) / 2, where the total variation distance TV of the outputs
    is delta at epsilon 0 (by PLD).
    """
    return (1 + min(1.0, _composed(tuple(mechanisms), "pld", COARSE).get_delta(0.0))) / 2


Compose = Callable[[float], tuple[SampledGaussian, ...]]


def _search(
    compose: Compose, target: float, delta: float, accountant: str, interval: float, guess: float
) -> float:
    def excess(log_noise: float) -> float:
        return epsilon(compose(math.exp(log_noise)), delta, accountant, interval) - target

    # Bracket the noise from above and from below, then bisect on its logarithm.
    low = high = math.log(guess)
    while excess(high) > 0:
        low, high = high, high + 0.2
        if high > math.log(1e7):
            raise ValueError("no amount of noise keeps this promise")
    while low > math.log(0.1) and excess(low) <= 0:
        low, high = low - 0.1, low
    return math.exp(brentq(excess, low, high, xtol=2e-5)) if excess(low) > 0 else math.exp(low)


def _smallest_noise(compose: Compose, target: float, delta: float, accountant: str, guess: float) -> float:
    """The smallest noise multiplier, to 5 digits, at which `compose(noise_multiplier)` costs at most `target`
    at `delta`.

    Raises ValueError if no amount of noise is enough.
    """
    # The search uses a coarse discretisation; the result is verified with the fine one that is stated, and
    # raised until it holds.
    candidate = _search(compose, target, delta, accountant, COARSE, guess)
    noise_multiplier = _round_up(candidate * (1 - 2e-5))
    while epsilon(compose(noise_multiplier), delta, accountant) > target:
        noise_multiplier = _round_up(noise_multiplier * (1 + 1e-5))
    return noise_multiplier


@lru_cache(maxsize=64)
def training_noise(
    target: float,
    delta: float,
    training: SampledGaussian,
    others: tuple[SampledGaussian, ...] = (),
    accountant: str = "pld",
) -> float:
    """The noise multiplier with which `training`, composed with `others`, costs at most `target` epsilon at
    `delta`.

    The noise multiplier that `training` has does not matter. Raises ValueError if no amount of noise is
    enough.
    """

    def compose(sigma: float) -> tuple[SampledGaussian, ...]:
        return (*others, replace(training, noise_multiplier=sigma))

    # Rényi DP is quick and finds the neighbourhood in which privacy loss distributions then search.
    guess = (
        1.0
        if accountant == "rdp"
        else _search(lambda sigma: compose(sigma)[-1:], target, delta, "rdp", FINE, guess=1.0) * 0.95
    )
    return _smallest_noise(compose, target, delta, accountant, guess)


@lru_cache(maxsize=64)
def noise_beside(
    target: float,
    delta: float,
    training: SampledGaussian,
    max_rise: float,
    others: tuple[SampledGaussian, ...] = (),
    accountant: str = "pld",
) -> float:
    """The smallest noise multiplier of one more Gaussian mechanism that raises the noise of `training` by at
    most `max_rise`.

    `training` is the mechanism that would use up `target` together with `others` alone.
    """
    # The mechanism may cost what raising the training's noise by `max_rise` sets free.
    noisier = replace(training, noise_multiplier=training.noise_multiplier * (1 + max_rise))

    def compose(sigma: float) -> tuple[SampledGaussian, ...]:
        return *others, noisier, SampledGaussian(sigma)

    return _smallest_noise(compose, target, delta, accountant, guess=8.0)


def _round_up(value: float, digits: int = 5) -> float:
    # Upwards: rounding must never lower the noise.
    scale = 10 ** (digits - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale - 1e-9) / scale
