"""The query's mechanism: sensitivity sqrt(k1), Gaussian noise on every bin, conflicts resolved by counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import SemanticHistogram
from privimage.privacy.mechanisms.histogram import ONE, noisy_histogram, vote_counts
from privimage.stages.select import exclusive_top

KEY = insecure_fixed(11).derive("test")
NOBODY = np.zeros(0, np.int64)


def of_images(votes: np.ndarray, labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The counts where each image is a unit of its own."""
    return vote_counts(votes, labels, np.arange(len(votes)), (rows, columns), votes.shape[1]) / ONE


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31))
def test_one_image_moves_the_histogram_by_at_most_sqrt_k1(
    count: int, k1: int, rows: int, columns: int, seed: int
) -> None:
    """Also for an image that votes for one class several times."""
    rng = np.random.default_rng(seed)
    votes, labels = rng.integers(0, columns, (count + 1, k1)), rng.integers(0, rows, count + 1)
    difference = of_images(votes, labels, rows, columns) - of_images(votes[1:], labels[1:], rows, columns)
    assert np.linalg.norm(difference) <= np.sqrt(k1) + 1e-12
    assert np.count_nonzero(difference.any(1)) == 1


def test_counts_are_votes_of_the_images_of_a_row() -> None:
    counts = of_images(np.array([[0, 2], [2, 1], [2, 2]]), np.array([0, 1, 1]), 2, 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 2]]


def test_the_noise_is_gaussian_of_sigma_sqrt_k1_on_every_bin() -> None:
    """No votes at all: what comes out is noise.

    Kolmogorov-Smirnov and variance, false-alarm rate 1e-3 each, fixed key.
    """
    plan = SemanticHistogram(per_image=4, noise_multiplier=7.0)
    noise = (
        noisy_histogram(np.zeros((0, 4), np.int64), NOBODY, NOBODY, (20, 1000), plan, "aes-ctr", KEY).ravel()
        / 14.0
    )
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert 5e-4 < stats.chi2.cdf((noise**2).sum(), noise.size) < 1 - 5e-4


def test_more_votes_than_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="3 votes per image, planned for 2"):
        noisy_histogram(
            np.zeros((5, 3), np.int64),
            np.zeros(5, np.int64),
            np.arange(5),
            (1, 10),
            SemanticHistogram(per_image=2, noise_multiplier=1.0),
            "aes-ctr",
            KEY,
        )


def test_a_public_class_serves_one_row_the_one_with_the_larger_count() -> None:
    counts = np.array([[9.0, 5.0, 1.0, 0.0], [10.0, 2.0, 3.0, 0.0]])
    assert exclusive_top(counts, 1).tolist() == [1, 0, -1, -1]
    assert exclusive_top(counts, 2).tolist() == [1, 0, 1, 0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**31))
def test_every_row_gets_its_share_and_no_column_two_rows(
    rows: int, per_class: int, spare: int, seed: int
) -> None:
    columns = rows * per_class + spare
    assignment = exclusive_top(np.random.default_rng(seed).normal(size=(rows, columns)), per_class)
    assert np.bincount(assignment[assignment >= 0], minlength=rows).tolist() == [per_class] * rows
