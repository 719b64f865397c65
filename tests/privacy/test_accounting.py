"""Accounting against dp-accounting called directly and, where it applies, Opacus' PRV accountant as a third
opinion.
"""

from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.calibration import noise_beside, training_noise

MIXES = [
    (SampledGaussian(1.0),),
    (SampledGaussian(5.0), SampledGaussian(2.0)),
    (SampledGaussian(2.171, 16384 / 50000, 152),),
    (SampledGaussian(4.6), SampledGaussian(2.182, 16384 / 50000, 152)),
    (SampledGaussian(15.2, 16384 / 50000, 152),),
    (SampledGaussian(1.0, 0.01, 1000),),
    (SampledGaussian(1.552, 431 / 1437, 100), SampledGaussian(4.093)),
    (SampledGaussian(0.8, 0.005, 500), SampledGaussian(20.0), SampledGaussian(1.5, 0.02, 300)),
    (SampledGaussian(8.0, 0.5, 30),),
    (SampledGaussian(3.0, count=4), SampledGaussian(1.2, 0.03, 200)),
]


def directly(mechanisms: tuple[SampledGaussian, ...], delta: float, accountant: str) -> float:
    book = pld.PLDAccountant() if accountant == "pld" else rdp.RdpAccountant()
    for m in mechanisms:
        event = dp_accounting.GaussianDpEvent(m.noise_multiplier)
        if m.sample_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(m.sample_rate, event)
        book.compose(event, m.count)
    return book.get_epsilon(delta)


@pytest.mark.parametrize("mechanisms", MIXES)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_ten_mixes_agree_with_dp_accounting(mechanisms: tuple[SampledGaussian, ...], accountant: str) -> None:
    assert epsilon(mechanisms, 1e-5, accountant) == pytest.approx(
        directly(mechanisms, 1e-5, accountant), abs=1e-3
    )


@pytest.mark.parametrize("mechanisms", MIXES[2:6])
def test_prv_agrees_within_its_own_error(mechanisms: tuple[SampledGaussian, ...]) -> None:
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(m.noise_multiplier, m.sample_rate, m.count) for m in mechanisms]
    assert prv.get_epsilon(1e-5, eps_error=0.01, delta_error=1e-9) == pytest.approx(
        epsilon(mechanisms, 1e-5), abs=0.03
    )


@pytest.mark.parametrize(
    ("target", "by_pld", "by_rdp"), [(10, 2.171, 2.310), (5, 3.736, 3.994), (1, 15.18, 16.46)]
)
def test_the_paper_settings_need_the_known_noise(target: float, by_pld: float, by_rdp: float) -> None:
    training = SampledGaussian(1.0, 16384 / 50000, 152)
    assert training_noise(target, 1e-5, training) == pytest.approx(by_pld, rel=5e-4)
    assert training_noise(target, 1e-5, training, (), "rdp") == pytest.approx(by_rdp, rel=5e-4)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_noise_found_keeps_the_promise_and_hardly_less_would_not(accountant: str) -> None:
    others = (SampledGaussian(6.0),)
    sigma = training_noise(3.0, 1e-5, SampledGaussian(1.0, 0.1, 60), others, accountant)
    assert epsilon((*others, SampledGaussian(sigma, 0.1, 60)), 1e-5, accountant) <= 3.0
    assert epsilon((*others, SampledGaussian(sigma * 0.999, 0.1, 60)), 1e-5, accountant) > 3.0


def test_the_derived_query_costs_half_a_percent_of_noise() -> None:
    alone = training_noise(10, 1e-5, SampledGaussian(1.0, 0.3, 100))
    sigma = noise_beside(10, 1e-5, SampledGaussian(alone, 0.3, 100), 0.005)
    beside = training_noise(10, 1e-5, SampledGaussian(1.0, 0.3, 100), (SampledGaussian(sigma),))
    louder = training_noise(10, 1e-5, SampledGaussian(1.0, 0.3, 100), (SampledGaussian(sigma * 0.97),))
    assert beside / alone <= 1.0051
    assert louder / alone > 1.0051


def test_a_query_that_costs_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="no amount of noise"):
        training_noise(1.0, 1e-5, SampledGaussian(1.0, 0.1, 10), (SampledGaussian(0.5),))


@pytest.mark.parametrize("target", [50, 1000])
def test_a_large_epsilon_is_kept_and_hardly_more_noise_than_it_needs(target: float) -> None:
    """At the finest discretisation an epsilon of 1000 takes minutes and gigabytes."""
    training = SampledGaussian(1.0, 862 / 1437, 60)
    alone = training_noise(target, 1e-4, training, stated=False)
    beside = noise_beside(target, 1e-4, replace(training, noise_multiplier=alone), 0.05)
    sigma = training_noise(target, 1e-4, training, (SampledGaussian(beside),))
    spent = epsilon((SampledGaussian(beside), replace(training, noise_multiplier=sigma)), 1e-4)
    assert 0.999 * target < spent <= target
    # By Renyi DP, which has no discretisation, a fifth more is an upper bound of the same cost.
    assert spent < epsilon((replace(training, noise_multiplier=sigma),), 1e-4, "rdp") < 1.6 * target


@pytest.mark.parametrize(
    ("training", "wider"),
    [
        (SampledGaussian(0.5, 862 / 1437, 60), True),  # epsilon above 100
        (SampledGaussian(7.2, 0.33, 1600), True),  # 10
        (SampledGaussian(55.8, 0.33, 1600), False),  # 1: a thousand roundings cost more beside it
        (SampledGaussian(0.47, 1e-3, 20_000), False),  # 10
    ],
)
def test_a_wider_discretisation_is_an_upper_bound_and_hardly_more(
    training: SampledGaussian, wider: bool
) -> None:
    fine, stated = epsilon((training,), 1e-6, interval=1e-4), epsilon((training,), 1e-6)
    assert (stated > fine) == wider
    assert fine <= stated < fine * (1 + 1e-4)
