"""Exact Poisson sampling over all ranks: the same global mask on each, from (key, step), of which each takes its share."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler

from privimage.privacy.keys import RootKey
from privimage.privacy.noise import bit_generator


def poisson_sample(root: RootKey, source: str, attempt: int, step: int, count: int, sample_rate: Fraction) -> np.ndarray:
    """The images that take part in a step: each of `count` on its own with probability `sample_rate`.

    Integers throughout: image i takes part iff 64 random bits are below floor(q 2^64), so its probability is q to within
    2^-64 and never above it. Returns sorted int64 indices; may be empty.
    """
    key = root.derive("poisson sampling", attempt, step)
    threshold = (sample_rate.numerator << 64) // sample_rate.denominator
    if threshold >= 1 << 64:
        return np.arange(count)
    raw = bit_generator(source, key).random_raw(count)
    return np.flatnonzero(raw < np.uint64(threshold))


class PoissonBatches(Sampler[list[int]]):
    """The logical batches of one rank, step by step, for a DataLoader under Opacus' BatchMemoryManager.

    The global batch of a step does not depend on the number of ranks; rank r of W takes every W-th index from the r-th on.
    A share may be empty: it is yielded all the same, so that the rank takes part in the step.
    """

    def __init__(self, root: RootKey, source: str, attempt: int, count: int, sample_rate: Fraction, steps: range, rank: int, size: int):
        self.root, self.source, self.attempt = root, source, attempt
        self.count, self.sample_rate, self.steps = count, sample_rate, steps
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            chosen = poisson_sample(self.root, self.source, self.attempt, step, self.count, self.sample_rate)
            yield chosen[self.rank :: self.size].tolist()

    def __len__(self) -> int:
        return len(self.steps)
