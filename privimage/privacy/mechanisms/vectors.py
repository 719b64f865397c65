"""Vectors that the images of a unit add to a sum, in whole numbers: each unit's together of a norm of at most
1.

A group adds the sum of its images' vectors, shortened, and not their mean: vectors of images with different
labels are in different rows, so that the mean of n of them has a norm of only 1 / sqrt(n). So do votes
(`vote_counts`). What is shortened is a function of the group alone, whoever else is in the set.
"""

import math

import torch
from torch import Tensor

# Vectors are summed as whole multiples of it: integer sums are exact, in any order and on any number of
# ranks.
QUANTUM = 2.0**-30
LESS = 1 - 2.0**-40  # more than float64 rounds off


def shortened(vectors: Tensor) -> Tensor:
    """Vectors (B, d) in float64, of an L2 norm of at most 1: longer ones are shortened, one that is not
    finite is 0.

    How a library adds up the squares of a vector may depend on the number of vectors. Where what is longer
    than 1 comes in blocks of one size, the result for a vector does not depend on the others, and no more
    does what is shortened again later.
    """
    vectors = vectors.double()
    vectors = torch.where(vectors.isfinite().all(1, keepdim=True), vectors, 0.0)
    # The largest number first, so that squares do not overflow; at last a trifle below 1, since the norm
    # itself is rounded.
    vectors = vectors / vectors.abs().amax(1, keepdim=True).clamp(min=1.0)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1.0) * (1 - 1e-9)


def length(part: float) -> float:
    """The largest norm of a vector of a norm of at most 1 with `part` after it."""
    return math.sqrt(1 + part**2)


def whole_vectors(vectors: Tensor, weight: float = 0.0) -> Tensor:
    """Vectors (B, F), each shortened to a norm of 1, over `length` (weight), in units of `QUANTUM`: int64."""
    return (shortened(vectors) / length(weight) / QUANTUM).trunc().to(torch.int64)


class VectorsOfUnits:
    """Sums of the vectors of some units, by unit and row; memory for one vector for each of these pairs.

    Beside its vectors a unit adds `weight` for each of its images, shortened with them, to one more number.
    """

    def __init__(self, groups: Tensor, labels: Tensor, features: int, weight: float = 0.0) -> None:
        """All images of these units: groups and labels int64 (B,), the rows that their vectors are added
        to.
        """
        _, own, self.images = groups.unique(return_inverse=True, return_counts=True)
        pairs, self.pair = torch.unique(torch.stack([own, labels], 1), dim=0, return_inverse=True)
        self.unit, self.labels = pairs.unbind(1)
        self.weights = self.images * int(weight / length(weight) / QUANTUM)
        self.sums = torch.zeros(len(pairs), features, dtype=torch.int64, device=groups.device)

    def add(self, images: slice, whole: Tensor) -> None:
        """Add the `whole_vectors` int64 (b, F) of a slice of the images."""
        self.sums.index_add_(0, self.pair[images], whole)

    def add_to(self, total: Tensor) -> None:
        """Add what each unit contributes to `total` int64 (rows * F + 1,), rows first and the weight last: a
        vector of an L2 norm of at most 1 / `QUANTUM`, exactly.
        """
        # Norms in coarser units, rounded up: the squares are whole numbers whose sum has less than 63 bits,
        # however many images a unit has, and so is exact in any order.
        bits = torch.frexp(self.images.double()).exponent.to(torch.int64)
        squares = _over(self.weights, bits).square()
        squares.index_add_(0, self.unit, _over(self.sums, bits[self.unit, None]).square().sum(1))
        norms = squares.double().sqrt() * (1 << bits).double() * QUANTUM
        factors = torch.where(self.images == 1, 1.0, (LESS / norms).clamp(max=1.0))
        # Towards zero, like the whole vectors.
        own = (self.sums * factors[self.unit, None]).trunc().to(torch.int64)
        total[:-1].view(-1, own.shape[1]).index_add_(0, self.labels, own)
        total[-1] += (self.weights * factors).trunc().to(torch.int64).sum()


def _over(whole: Tensor, bits: Tensor) -> Tensor:
    """Absolute values over 2^bits, rounded up: int64."""
    return (whole.abs() + (1 << bits) - 1) >> bits
