"""Classifiers of an evaluation: trained on one set, asked about another."""

import numpy as np
from torch import nn

from privimage.config.seeds import public_seed
from privimage.evaluation import benchmark, report, utility
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.subject import Subject


def trained_network(subject: Subject, key: str, training: Labelled, name: str) -> nn.Module:
    """The CNN of `evaluate.cnn_*`, or one of the benchmark's networks: the same on all ranks, which call it
    together. Raises Stopped.
    """
    settings, world, label = subject.config.evaluate, subject.world, f"{key} ({name})"
    if key in report.BENCHMARK:
        return benchmark.train(
            key,
            settings.benchmark,
            training,
            subject.n_classes,
            epochs=settings.benchmark_epochs,
            seed=seed(subject),
            world=world,
            label=label,
        )
    flip = subject.config.data.flip
    precision = subject.config.runtime.precision
    how = utility.Training(
        settings.cnn_epochs, settings.cnn_batch_size, flip, seed(subject), world, label, precision
    )
    return utility.train_cnn(training, subject.n_classes, how)


def predicted(
    subject: Subject, key: str, training: Labelled, tests: Labelled, name: str
) -> np.ndarray | None:
    """What a classifier of `evaluate.classifiers` that was trained on one set says of another: labels (M,).

    All ranks call it together; only the main rank has the answer of scikit-learn's classifiers.
    """
    if key in utility.SHALLOW:
        return utility.SHALLOW[key](training, tests, seed(subject)) if subject.world.is_main else None
    network = trained_network(subject, key, training, name)
    return utility.predict(network, tests.images, subject.world.device).labels


def strongest(subject: Subject) -> str:
    """The classifier that stands for all where one is enough: the CNN, or the best of those that are set.

    The benchmark's networks take hours, and stand for all only where there is no other.
    """
    order = (*report.BENCHMARK, "lr", "mlp", "cnn")
    return max(subject.config.evaluate.classifiers, key=order.index)


def seed(subject: Subject) -> int:
    """The seed of all classifiers; scikit-learn takes 32 bits."""
    return public_seed(subject.config, "classifiers") % 2**32
