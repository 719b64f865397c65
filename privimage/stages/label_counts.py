"""The labels of the synthetic set: in turn, or in the proportions of a noisy count of the sensitive ones."""

import numpy as np

from privimage.config import Config
from privimage.distributed.world import World
from privimage.privacy.mechanisms import LabelCounts
from privimage.privacy.mechanisms.histogram import noisy_counts, vote_counts
from privimage.stages.noisy_statistic import Drawn, Sensitive, draw_once
from privimage.storage.rundir import RunDir


def label_counts(config: Config, run_dir: RunDir, world: World, sensitive: Sensitive) -> Drawn:
    """The noisy number of images of each class, float64 (classes,), drawn once: see `draw_once`."""
    images, plan = sensitive.images, sensitive.account.plan.the(LabelCounts)

    def exact(_: str) -> np.ndarray:
        votes, one_row = images.labels[:, None], np.zeros_like(images.labels)
        return vote_counts(votes, one_row, images.groups, (1, sensitive.rows), plan.per_image)[0]

    def noisy(total: np.ndarray, key: bytes) -> np.ndarray:
        return noisy_counts(total, plan, config.privacy.noise_source, key)

    path = run_dir.stage("synthesize") / "labels.npz"
    return draw_once(config, run_dir, world, sensitive, plan, path, exact, noisy)


def labels_in_turn(count: int, n_classes: int) -> np.ndarray:
    """`count` labels in turn, int64, so that each class has the same share; all 0 for an unlabelled set."""
    return np.arange(count, dtype=np.int64) % max(n_classes, 1)


def labels_by(counts: np.ndarray, count: int) -> np.ndarray:
    """`count` labels int64 with the proportions of noisy counts (classes,), those below zero taken for zero.

    Each class is spread evenly over the set, so that any beginning of it has the same proportions. Where no
    count is above zero every class has the same share.
    """
    weights = counts.clip(min=0)
    if not weights.sum() > 0:
        return labels_in_turn(count, len(counts))
    # Whole numbers by the largest remainders.
    exact = count * weights / weights.sum()
    numbers = np.floor(exact).astype(np.int64)
    numbers[np.argsort(numbers - exact, kind="stable")[: count - numbers.sum()]] += 1
    labels = np.repeat(np.arange(len(counts)), numbers)
    place = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in numbers.tolist()])
    return labels[np.argsort(place, kind="stable")]
