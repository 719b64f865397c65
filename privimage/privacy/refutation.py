"""The largest epsilon that the guesses of an attacker refute (Mahloujifar, Melis and Chaudhuri 2024)."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from privimage.privacy.accounting import SampledGaussian, epsilon, profile

EPSILONS = (
    40 * np.linspace(0, 1, 401) ** 2
)  # where a trade-off curve is touched by its lines: more closely near 0


class TradeOff:
    """A lower bound on the trade-off curve of a mechanism that is (epsilon, delta)-DP for each given pair.

    An event of probability y under one data set has at least `least(y)` under each neighbour.
    """

    def __init__(self, epsilons: np.ndarray, deltas: np.ndarray):
        """`epsilons` >= 0 (E,), `deltas` in [0, 1] (E,)."""
        # P(E) <= e^eps Q(E) + delta for the event, and for its complement with P and Q exchanged.
        grown = np.exp(epsilons)
        self.slopes = np.concatenate([1 / grown, grown, [0.0]])
        self.intercepts = np.concatenate([-deltas / grown, 1 - deltas - grown, [0.0]])

    def least(self, y: float) -> float:
        """The smallest probability under a neighbour of an event of probability `y` in [0, 1]."""
        return float((self.slopes * y + self.intercepts).max())


def refuted(curve: TradeOff, canaries: int, guesses: int, right: int, level: float) -> bool:
    """Whether a mechanism with this curve gets `right` or more of `guesses` guesses right with a probability
    below `level`.

    m canaries, r guesses, W of them right, p_c = P(W = c). Turn the coin of canary i: a guess that was right
    is now wrong, the others stay. So for any j, averaging over all i and all coins (the curve is convex),
        sum_{c >= j} (c / m) p_c <= y  implies  sum_{c >= j} ((r - c + 1) / m) p_{c-1} >= least(y). With a =
        sum_{c >= j} (c / m) p_c and b = sum_{c >= j} ((r - c) / m) p_c, the second sum is b one step down,
        and a + b = (r / m) P(W >= j). P(W >= right) = level costs the other outcomes least if all of it sits
        on W = right; from there down to W = 0 each p is taken as small as the curve allows. The level cannot
        be reached if the total exceeds 1 (Mahloujifar et al. 2024, Algorithm 1).
    """
    a, b = right * level / canaries, (guesses - right) * level / canaries
    for j in range(right, 0, -1):
        lower = curve.least(a)
        if lower <= b:
            return False  # the curve asks for nothing more: further down neither a nor b would change
        a += (lower - b) * (j - 1) / (guesses - j + 1)
        b = lower
        if (a + b) * canaries > guesses:
            return True
    return False


@dataclass(frozen=True)
class Finding:
    """Lower bounds on epsilon from the guesses of one run, at the confidence of the audit."""

    guesses: int
    right: int
    any_epsilon: float  # of any mechanism whatever, at the delta of the plan
    # of the planned mechanisms with another amount of noise: tighter, since its whole trade-off curve counts
    epsilon: float


def find(
    mechanisms: tuple[SampledGaussian, ...],
    delta: float,
    canaries: int,
    guesses: int,
    right: int,
    level: float,
) -> Finding:
    """The largest epsilons at `delta` that the guesses refute with an error of at most `level`.

    `mechanisms` are those of the claim, composed.
    """

    def any_refuted(value: float) -> bool:
        return refuted(TradeOff(np.array([value]), np.array([delta])), canaries, guesses, right, level)

    def less_noise(by: float) -> tuple[SampledGaussian, ...]:
        return tuple(
            dataclasses.replace(one, noise_multiplier=one.noise_multiplier * math.exp(-by))
            for one in mechanisms
        )

    def planned_refuted(by: float) -> bool:
        return refuted(TradeOff(EPSILONS, profile(less_noise(by), EPSILONS)), canaries, guesses, right, level)

    # Once by epsilon and delta alone, once by the whole curve of the planned ones with less noise.
    any_epsilon = _largest(any_refuted, 0.0, 1.0, 0.0, 1e-3)
    by = _largest(planned_refuted, 0.0, 0.25, -4.0, 5e-3)
    return Finding(guesses, right, any_epsilon or 0.0, 0.0 if by is None else epsilon(less_noise(by), delta))


def _largest(
    holds: Callable[[float], bool], start: float, step: float, floor: float, tolerance: float
) -> float | None:
    """The largest value at which `holds` (true up to there, false beyond), to `tolerance`.

    None if it is below `floor`.
    """
    # Find a value where it holds, going down, then one where it does not, going up, then bisect.
    low = start
    while not holds(low):
        low -= step
        if low < floor:
            return None
    high = low + step
    while holds(high):
        low, high = high, high + step
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
