"""Classifiers of an evaluation: trained on one set, asked about another."""

import numpy as np
from torch import nn

from privimage.config.seeds import public_seed
from privimage.evaluation import utility
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.subject import Subject


def trained_cnn(subject: Subject, training: Labelled, name: str) -> nn.Module:
    """The CNN of `evaluate.cnn_*`, the same on all ranks, which call it together. Raises Stopped."""
    settings = subject.config.evaluate
    return utility.train_cnn(
        training,
        subject.n_classes,
        epochs=settings.cnn_epochs,
        batch_size=settings.cnn_batch_size,
        flip=subject.config.pretrain.flip,
        seed=seed(subject),
        world=subject.world,
        label=f"cnn ({name})",
    )


def predicted(
    subject: Subject, key: str, training: Labelled, tests: Labelled, name: str
) -> np.ndarray | None:
    """What a classifier of `evaluate.classifiers` that was trained on one set says of another: labels (M,).

    All ranks call it together; only the main rank has the answer of scikit-learn's classifiers.
    """
    if key == "cnn":
        network = trained_cnn(subject, training, name)
        return utility.predict(network, tests.images, subject.world.device).labels
    return utility.SHALLOW[key](training, tests, seed(subject)) if subject.world.is_main else None


def strongest(subject: Subject) -> str:
    """The classifier that stands for all where one is enough: the CNN, or the best of those that are set."""
    return max(subject.config.evaluate.classifiers, key=("lr", "mlp", "cnn").index)


def seed(subject: Subject) -> int:
    """The seed of all classifiers; scikit-learn takes 32 bits."""
    return public_seed(subject.config, "classifiers") % 2**32
