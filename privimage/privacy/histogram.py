"""Noisy histograms of votes.

The one function through which the semantic query and Private Evolution see the sensitive set.
"""

import numpy as np

from privimage.privacy.noise import gaussian
from privimage.privacy.plan import EvolvePlan, QueryPlan


def vote_counts(votes: np.ndarray, labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How often the images of each sensitive class (row) voted for each column: float64 (rows, columns).

    votes int64 (N, k1): the columns that each image votes for; one that an image names twice counts once, so
    that one image adds at most 1 to each of at most k1 bins of one row, an L2 norm of at most sqrt(k1).
    labels int64 (N,) in [0, rows).
    """
    counts = np.zeros((rows, columns))
    ordered = np.sort(votes, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    np.add.at(counts, (np.broadcast_to(labels[:, None], ordered.shape)[first], ordered[first]), 1.0)
    return counts


def noisy_histogram(
    votes: np.ndarray,
    labels: np.ndarray,
    rows: int,
    columns: int,
    plan: QueryPlan | EvolvePlan,
    source: str,
    key: bytes,
) -> np.ndarray:
    """`vote_counts` with Gaussian noise of standard deviation sigma sqrt(k1) on every bin (Theorem 3.1 of the
    paper of PrivImage).

    A Gaussian mechanism of noise multiplier `plan.noise_multiplier` under adding or removing one image.
    Raises ValueError if an image has more than `plan.per_image` votes. The caller charges the ledger before
    it uses what is returned.
    """
    if votes.shape[1] > plan.per_image:
        raise ValueError(f"{votes.shape[1]} votes an image, planned for {plan.per_image}")
    noise = gaussian(source, key, rows * columns, plan.standard_deviation)
    return vote_counts(votes, labels, rows, columns) + noise.reshape(rows, columns)
