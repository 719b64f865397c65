"""The memorisation check sees copies, and nothing where there are none."""

import numpy as np
import pytest

from privimage.evaluation.memorization import check, nearest


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 6), dtype=np.uint8)


TRAIN, HELD_OUT = images(600, 0), images(200, 1)


def test_copies_are_found() -> None:
    measures, found = check(TRAIN[:100], TRAIN, HELD_OUT)
    assert measures["nearest_is_training"] == 1
    assert measures["excess"] == 1
    assert measures["identical"] == 100
    assert np.array_equal(found.index, np.arange(100))


def test_noisy_copies_are_found() -> None:
    noisy = np.clip(TRAIN[:100] + np.random.default_rng(3).normal(0, 20, (100, 3, 6, 6)), 0, 255).astype(
        np.uint8
    )
    measures, found = check(noisy, TRAIN, HELD_OUT)
    assert measures["excess"] > 0.95
    assert measures["identical"] == 0
    assert np.array_equal(found.index, np.arange(100))


def test_new_images_of_the_same_distribution_have_no_excess() -> None:
    measures, _ = check(images(2000, 2), TRAIN, HELD_OUT)
    assert measures["expected"] == 0.75
    assert measures["excess"] == pytest.approx(0, abs=0.2)
    assert measures["identical"] == 0


def test_copies_of_held_out_images_count_the_other_way() -> None:
    assert check(HELD_OUT, TRAIN, HELD_OUT)[0]["nearest_is_training"] == 0


def test_the_nearest_image_is_that_of_a_plain_search() -> None:
    queries = images(20, 5)
    difference = (queries[:, None].astype(float) - TRAIN[None].astype(float)) / 255
    distances = np.sqrt((difference**2).mean((2, 3, 4)))
    found = nearest(queries, TRAIN, chunk=170)
    assert np.array_equal(found.index, distances.argmin(1))
    assert found.distance == pytest.approx(distances.min(1), rel=1e-5)
