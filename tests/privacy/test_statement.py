"""What is printed of a promise is a bound too."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privimage.privacy.statement import rounded_up, statement_for_people

MECHANISM = {
    "name": "DP-SGD fine-tuning",
    "mechanism": "Gaussian",
    "noise_multiplier": 2.0,
    "sample_rate": 0.5,
    "count": 3,
}


@given(st.floats(1e-12, 1e3))
def test_epsilon_is_never_rounded_down_and_by_a_ten_thousandth_at_most_up(value: float) -> None:
    printed = Decimal(str(rounded_up(value, places=4)))
    assert 0 <= printed - Decimal(repr(value)) <= Decimal("0.0001")


@given(st.floats(1e-300, 1 - 1e-12))
def test_delta_is_never_rounded_down_and_has_six_digits(value: float) -> None:
    printed = Decimal(str(rounded_up(value, digits=6)))
    assert 0 <= printed - Decimal(repr(value)) <= Decimal("1e-5") * Decimal(repr(value))


@pytest.mark.parametrize("value", [1e-4, 1e-5, 0.25])
def test_a_delta_that_was_given_in_few_digits_stays_what_it_is(value: float) -> None:
    assert rounded_up(value, digits=6) == value


@given(st.floats(1e-4, 100), st.floats(1e-20, 0.1))
def test_both_files_print_the_same(epsilon: float, delta: float) -> None:
    said = {
        "private": True,
        "method": "dpdm",
        "unit": "image",
        "neighbours": "add or remove one image",
        "accountant": "pld",
        "noise_source": "aes-ctr",
        "cryptographic_noise": True,
        "mechanisms": [MECHANISM],
    }
    said |= {"epsilon": rounded_up(epsilon, places=4), "delta": rounded_up(delta, digits=6)}
    for_people, kept = statement_for_people(said), json.dumps(said)
    assert f'"epsilon": {said["epsilon"]}' in kept and f'"delta": {said["delta"]}' in kept
    assert f"({said['epsilon']}, {said['delta']})-differential privacy" in for_people
    assert f"e^{said['epsilon']}," in for_people and f"a probability of {said['delta']}." in for_people
