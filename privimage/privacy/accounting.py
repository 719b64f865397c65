"""Cost of a composition of mechanisms, by dp-accounting.

Neighbouring sets differ by one unit (an image, or all images of a group) that is added, removed or replaced.
"""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import dp_accounting

# It takes a second of CPU time to import, and ranks and stages that take a plan as it is do not need it.
logging.getLogger("absl").setLevel(logging.ERROR)  # the RDP accountant reports each order that it skips


@dataclass(frozen=True)
class SampledGaussian:
    """A Gaussian mechanism applied `count` times, each time to a Poisson sample at `sample_rate`.

    The accountant and the ledger know mechanisms by this alone: its event, and its entry in the ledger.

    `noise_multiplier` is the standard deviation of the noise divided by the L2 sensitivity; `sample_rate` 1
    is the plain Gaussian mechanism. With `replacement` the sensitivity is that of replacing a unit.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    count: int = 1
    replacement: bool = False

    @property
    def single(self) -> "SampledGaussian":
        """A single use."""
        return replace(self, count=1)

    @property
    def kind(self) -> str:
        """Its name in the literature."""
        return "Gaussian" if self.sample_rate == 1 else "Poisson-sampled Gaussian"

    def to_entry(self) -> list[float | str]:
        """Its form in the ledger."""
        entry: list[float | str] = [self.noise_multiplier, self.sample_rate, self.count]
        return [*entry, "replace"] if self.replacement else entry

    @classmethod
    def from_entry(cls, entry: list) -> "SampledGaussian":
        """The inverse of `to_entry`. Raises TypeError or ValueError for an entry that is none."""
        noise_multiplier, sample_rate, count, *more = entry
        if more not in ([], ["replace"]):
            raise ValueError(f"no entry of a ledger: {entry}")
        return cls(noise_multiplier, sample_rate, int(count), bool(more))

    def event(self) -> "dp_accounting.DpEvent":
        """This mechanism in dp-accounting's terms."""
        import dp_accounting

        # Under replacement dp-accounting wants the noise beside the longest that one unit adds to the sum:
        # half of the sensitivity, since two units may add opposite vectors.
        beside = 2 if self.replacement else 1
        single: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(beside * self.noise_multiplier)
        if self.sample_rate < 1:
            single = dp_accounting.PoissonSampledDpEvent(self.sample_rate, single)
        return dp_accounting.SelfComposedDpEvent(single, self.count)


# Discretisation of privacy losses: of what is stated, of attacks that are judged, and of the first look of a
# search. The first two may be wider where rounding costs next to nothing.
FINE, COARSE, ROUGH = 1e-4, 1e-3, 1e-1
ROUNDING = 1e-4  # of epsilon
# Orders of Renyi divergences of the first look; what is stated uses all orders of dp-accounting.
FEW_ORDERS = (1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128)


def _composed(
    mechanisms: tuple[SampledGaussian, ...], accountant: str, interval: float
) -> "dp_accounting.PrivacyAccountant":
    """All mechanisms composed.

    Raises ValueError for mechanisms of two relations, and for replacement by RDP, which has no bound for
    Poisson samples.
    """
    relations = {m.replacement for m in mechanisms}
    if len(relations) > 1 or (True in relations and accountant == "rdp"):
        raise ValueError("these mechanisms do not compose under one relation")
    return _book(mechanisms, accountant, interval, True in relations)


@lru_cache(maxsize=32)
def _book(
    mechanisms: tuple[SampledGaussian, ...], accountant: str, interval: float, replacement: bool
) -> "dp_accounting.PrivacyAccountant":
    from dp_accounting import pld, rdp
    from dp_accounting.privacy_accountant import NeighboringRelation as NeighborRel

    # Compositions are built one mechanism at a time and cached: the search changes only the last one.
    if not mechanisms:
        if accountant == "rdp":
            return rdp.RdpAccountant(FEW_ORDERS if interval > FINE else None)
        relation = NeighborRel.REPLACE_ONE if replacement else NeighborRel.ADD_OR_REMOVE_ONE
        return pld.PLDAccountant(relation, value_discretization_interval=interval)
    whole = copy.deepcopy(_book(mechanisms[:-1], accountant, interval, replacement))
    return whole.compose(mechanisms[-1].event(), 1) if mechanisms[-1].count else whole


def epsilon(
    mechanisms: Iterable[SampledGaussian],
    delta: float,
    accountant: str = "pld",
    interval: float | None = None,
) -> float:
    """Epsilon of the composition at `delta`, by privacy loss distributions (`pld`) or Rényi DP (`rdp`).

    The result is an upper bound at any `interval`, the discretisation of the privacy loss; None: what is
    fine enough to be stated. A wider one than `FINE` also means fewer orders of Rényi DP. References: Koskela
    et al. 2020 and Doroshenko et al. 2022 (PLD); Mironov et al. 2019 (RDP of the sampled Gaussian).
    """
    mechanisms = tuple(mechanisms)
    if interval is None:
        interval = _fine_enough(mechanisms, delta) if accountant == "pld" else FINE
    return _epsilon(mechanisms, delta, accountant, interval)


@lru_cache(maxsize=1024)
def _epsilon(
    mechanisms: tuple[SampledGaussian, ...], delta: float, accountant: str, interval: float
) -> float:
    return max(0.0, _composed(mechanisms, accountant, interval).get_epsilon(delta))


def _fine_enough(mechanisms: tuple[SampledGaussian, ...], delta: float, finest: float = FINE) -> float:
    """The widest discretisation, in steps of ten and no finer than `finest`, whose rounding costs at most
    `ROUNDING` of epsilon.

    The time of a composition grows with epsilon over the interval: an epsilon of 10 at the finest one takes
    seconds, 1000 minutes and gigabytes.
    """
    interval, wider = ROUGH, _epsilon(mechanisms, delta, "pld", ROUGH)
    while interval > finest:
        interval = max(interval / 10, finest)
        found = _epsilon(mechanisms, delta, "pld", interval)
        # Rounding costs about the square of the interval: a hundredth of what the wider one cost.
        if wider - found <= 100 * ROUNDING * found:
            break
        wider = found
    return interval


def profile(mechanisms: Iterable[SampledGaussian], epsilons: np.ndarray) -> np.ndarray:
    """Delta (E,) of the composition at each of `epsilons` (E,) >= 0, in either direction of the relation.

    Upper bounds, by PLD.
    """
    composed = _for_attacks(tuple(mechanisms))
    return np.array([composed.get_delta(e) for e in epsilons])


def best_guess(mechanisms: Iterable[SampledGaussian]) -> float:
    """Upper bound on the accuracy of a membership attack on one unit, in [0.5, 1]; 0.5 is guessing.

    The attacker knows all other units and every output, and both answers are equally likely beforehand. The
    best attack is right with probability (1 + TV) / 2, where the total variation distance TV of the outputs
    is delta at epsilon 0 (by PLD).
    """
    return (1 + min(1.0, _for_attacks(tuple(mechanisms)).get_delta(0.0))) / 2


def _for_attacks(mechanisms: tuple[SampledGaussian, ...]) -> "dp_accounting.PrivacyAccountant":
    """The composition by which attacks are judged."""
    return _composed(mechanisms, "pld", _fine_enough(mechanisms, 1e-9, COARSE))
