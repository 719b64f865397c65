"""Poisson sampling: exact, the same on all ranks, a partition over any number of them."""

from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from privimage.privacy.keys import insecure_fixed
from privimage.privacy.sampling import poisson_sample, share

KEY = insecure_fixed(7)


def sample(step: int, count: int = 5000, rate: Fraction = Fraction(3, 10), name: str = "a") -> np.ndarray:
    return poisson_sample("aes-ctr", KEY.derive("sample", name, step), count, rate)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_shares_of_all_ranks_are_the_global_sample(size: int) -> None:
    for step in range(50):
        whole = sample(step, 1000, Fraction(1, 10))
        assert sorted(index for rank in range(size) for index in share(whole, rank, size)) == whole.tolist()


def test_sizes_are_binomial_and_images_are_equally_likely() -> None:
    """False-alarm rate 1e-3 for each of two chi-squared tests; the key is fixed."""
    steps, count, rate = 400, 2000, 0.3
    taken = np.zeros((steps, count), dtype=bool)
    for step in range(steps):
        taken[step, sample(step, count, Fraction(3, 10))] = True
    sizes = ((taken.sum(1) - count * rate) ** 2 / (count * rate * (1 - rate))).sum()
    images = ((taken.sum(0) - steps * rate) ** 2 / (steps * rate * (1 - rate))).sum()
    assert stats.chi2.sf(sizes, steps) > 1e-3 and stats.chi2.cdf(sizes, steps) > 1e-3
    assert stats.chi2.sf(images, count) > 1e-3 and stats.chi2.cdf(images, count) > 1e-3


def test_the_sizes_vary() -> None:
    """A fixed-size or shuffled batch would have one size.

    The accountant's amplification does not hold for it.
    """
    assert len({len(sample(step)) for step in range(20)}) > 10


def test_each_key_has_a_sample_of_its_own() -> None:
    assert sample(1).tolist() == sample(1).tolist()
    assert sample(1).tolist() != sample(2).tolist()
    assert sample(1).tolist() != sample(1, name="b").tolist()


def test_rate_one_takes_everyone_and_a_tiny_rate_may_take_nobody() -> None:
    assert sample(0, 100, Fraction(1)).tolist() == list(range(100))
    assert [] in [sample(step, 10, Fraction(1, 1000)).tolist() for step in range(30)]
