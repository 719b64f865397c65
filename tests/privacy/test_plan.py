"""The plan of each training.

Noise against the closed form of the Gaussian mechanism, its way through JSON, and what needs another one.
"""

import json
import math
from statistics import NormalDist

import pytest
from ranks import TINY, privimage
from scipy.optimize import brentq

from privimage.config import load
from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms import DPSGD, MeanEmbedding, NearestHistogram
from privimage.privacy.plan import make_plan, plan_from_dict

PHI = NormalDist().cdf
KINDS = {
    "privimage+d": DPSGD,
    "dpdm": DPSGD,
    "dp-merf": MeanEmbedding,
    "private-evolution": NearestHistogram,
}


def closed_form(epsilon: float, delta: float, count: int) -> float:
    """The noise multiplier of `count` Gaussian mechanisms, which together are one with sqrt(count) times the
    sensitivity (Balle and Wang 2018, Theorem 8).
    """

    def excess(sigma: float) -> float:
        half, whole = 1 / (2 * sigma), epsilon * sigma
        return PHI(half - whole) - math.exp(epsilon) * PHI(-half - whole) - delta

    return math.sqrt(count) * brentq(excess, 0.1, 100)


@pytest.mark.parametrize("epsilon", [10, 1])
@pytest.mark.parametrize(("method", "count"), [("dp-merf", 1), ("private-evolution", 12)])
def test_the_noise_is_that_of_the_closed_form(method: str, count: int, epsilon: float) -> None:
    config = load(
        TINY,
        [f"method={method}", f"privacy.epsilon={epsilon}", "privacy.accountant=pld", "evolve.iterations=12"],
    )
    plan = make_plan(config, 1437)
    assert plan.compositions == (SampledGaussian(plan.training.noise_multiplier, 1.0, count),)
    assert plan.training.noise_multiplier == pytest.approx(closed_form(epsilon, 1e-4, count), rel=1e-3)
    assert plan.training.noise_multiplier >= closed_form(epsilon, 1e-4, count)
    assert plan.spent() <= epsilon


@pytest.mark.parametrize("method", list(KINDS))
def test_a_plan_reads_back_from_json_and_names_its_mechanisms(method: str) -> None:
    plan = make_plan(load(TINY, [f"method={method}"]), 1437)
    assert isinstance(plan.training, KINDS[method])
    assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert len({part.name for part in plan.mechanisms}) == len(plan.mechanisms)
    assert plan.training.stage in load(TINY, [f"method={method}"]).stages


@pytest.mark.parametrize("method", ["dp-merf", "private-evolution"])
def test_a_method_without_dp_sgd_says_by_what_it_draws_and_is_audited(method: str) -> None:
    name = KINDS[method].name
    with pytest.raises(UserError, match=f"method: it draws from the sensitive set by {name}, not by DP-SGD"):
        _ = make_plan(load(TINY, [f"method={method}"]), 1437).the(DPSGD)
    told = privimage("audit", TINY, f"method={method}")
    # A true claim is refuted with probability 0.05 at most, by fresh coins and noise: not asked here.
    assert name in told.stdout and "the audit sees the breach" in told.stdout, told.stderr
