"""Exact Poisson sampling: every rank derives the same global sample from the key of a step, and takes its
share.
"""

from fractions import Fraction

import numpy as np

from privimage.privacy.noise import bit_generator


def poisson_sample(source: str, key: bytes, count: int, sample_rate: Fraction) -> np.ndarray:
    """The images that take part in a step: each of `count` on its own with probability `sample_rate`.

    `key` is 32 bytes that no other step has. Integers throughout: image i takes part iff 64 random bits are
    below floor(q 2^64), so its probability is q to within 2^-64 and never above it. Returns sorted
    indices int64 (n,); may be empty.
    """
    threshold = (sample_rate.numerator << 64) // sample_rate.denominator
    if threshold >= 1 << 64:
        return np.arange(count)
    raw = bit_generator(source, key).random_raw(count)
    return np.flatnonzero(raw < np.uint64(threshold))


def share(sample: np.ndarray, rank: int, size: int) -> list[int]:
    """The share of rank r of W in a global sample int64 (n,): every W-th index from the r-th on; may be
    empty.
    """
    return sample[rank::size].tolist()
