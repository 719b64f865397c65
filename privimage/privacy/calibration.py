"""The noise that a budget needs: searches over what `accounting` says that mechanisms cost."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from privimage.privacy.accounting import FINE, ROUGH, SampledGaussian, epsilon

Compose = Callable[[float], tuple[SampledGaussian, ...]]
LOUDEST, QUIETEST = 1e7, 0.1  # noise multipliers between which is searched


def _search(excess: Callable[[float], float], guess: float, step: float, tolerance: float) -> float:
    """Where `excess`, which falls with the noise multiplier, is zero, to a relative `tolerance`.

    From a bracket around `guess` whose relative width is `step` if the guess is good, and doubles until it
    holds the solution. Raises ValueError if no amount of noise is enough.
    """
    from scipy.optimize import brentq

    def above(log_noise: float) -> float:
        return excess(math.exp(log_noise))

    low = high = math.log(guess)
    first = above(low)
    found = {low: first}
    while first > 0 and found[high] > 0:
        low, high, step = high, high + step, 2 * step
        if high > math.log(LOUDEST):
            raise ValueError("no amount of noise keeps this promise")
        found[high] = above(high)
    while first <= 0 and found[low] <= 0 and low > math.log(QUIETEST):
        low, high, step = max(low - step, math.log(QUIETEST)), low, 2 * step
        found[low] = above(low)
    if found[low] <= 0 or found[high] == 0:
        return math.exp(low if found[low] <= 0 else high)
    return math.exp(brentq(above, low, high, xtol=tolerance))


def _smallest_noise(
    compose: Compose, target: float, delta: float, accountant: str, guess: float, stated: bool
) -> float:
    """The smallest noise multiplier, to 5 digits, at which `compose(noise_multiplier)` costs at most `target`
    at `delta`.

    `stated` is False for a number that only leads to another: it is then found by a coarse discretisation and
    may be a trifle larger. Raises ValueError if no amount of noise is enough.
    """
    # The search uses a coarse discretisation; the result is verified as it is stated, and raised until it
    # holds.
    interval, tolerance = _coarse(target, accountant, stated), 2e-5 if stated else 2e-4

    def excess(sigma: float) -> float:
        return epsilon(compose(sigma), delta, accountant, interval) - target

    noise_multiplier = _round_up(_search(excess, guess, 4e-3, tolerance))
    while epsilon(compose(noise_multiplier), delta, accountant, None if stated else interval) > target:
        noise_multiplier = _round_up(noise_multiplier * (1 + tolerance / 2))
    return noise_multiplier


def _coarse(target: float, accountant: str, stated: bool) -> float:
    # Rounding then costs about 1e-5 of the target, or 1e-3 where a number only leads to another: of two such
    # that are compared both pay it.
    return min(max(FINE, (1e-4 if stated else 1e-3) * target), ROUGH) if accountant == "pld" else FINE


def _first_look(compose: Compose, target: float, delta: float, accountant: str) -> float:
    """About the smallest noise multiplier, by a discretisation that takes next to no time."""
    interval = min(ROUGH, target / 100)
    with contextlib.suppress(ValueError):  # so rough that rounding alone costs more than the target
        return _search(
            lambda sigma: epsilon(compose(sigma), delta, accountant, interval) - target, 1.0, 0.4, 1e-3
        )
    return 1.0


def training_noise(
    target: float,
    delta: float,
    training: SampledGaussian,
    others: tuple[SampledGaussian, ...] = (),
    accountant: str = "pld",
    stated: bool = True,
    guess: float | None = None,
) -> float:
    """The noise multiplier with which `training`, composed with `others`, costs at most `target` epsilon at
    `delta`.

    The noise multiplier that `training` has does not matter. `stated`: see `_smallest_noise`. The search is
    short where `guess` is good. Raises ValueError if no amount of noise is enough.
    """
    training = replace(training, noise_multiplier=0.0)
    return _training_noise(target, delta, training, others, accountant, stated, guess)


@lru_cache(maxsize=256)
def _training_noise(
    target: float,
    delta: float,
    training: SampledGaussian,
    others: tuple[SampledGaussian, ...],
    accountant: str,
    stated: bool,
    guess: float | None,
) -> float:
    def compose(sigma: float) -> tuple[SampledGaussian, ...]:
        return (*others, replace(training, noise_multiplier=sigma))

    if guess is None:
        guess = _first_look(compose, target, delta, accountant)
    return _smallest_noise(compose, target, delta, accountant, guess, stated)


@lru_cache(maxsize=256)
def noise_beside(
    target: float,
    delta: float,
    training: SampledGaussian,
    max_rise: float,
    others: tuple[SampledGaussian, ...] = (),
    accountant: str = "pld",
) -> float:
    """About the smallest noise multiplier of one more Gaussian mechanism that raises the noise of `training`
    by at most `max_rise`; to about a percent.

    `training` is the mechanism that would use up `target` together with `others` alone.
    """
    # The mechanism may cost what raising the training's noise by `max_rise` sets free.
    noisier = replace(training, noise_multiplier=training.noise_multiplier * (1 + max_rise))
    interval = _coarse(target, accountant, False)

    def excess(sigma: float) -> float:
        beside = SampledGaussian(sigma, replacement=training.replacement)
        return epsilon((*others, noisier, beside), delta, accountant, interval) - target

    return _round_up(_search(excess, 8.0, 0.4, 5e-4) * (1 + 5e-4))


def _round_up(value: float, digits: int = 5) -> float:
    # Upwards: rounding must never lower the noise.
    scale = 10 ** (digits - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale - 1e-9) / scale
