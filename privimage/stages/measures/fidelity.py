"""Fidelity: distances of the synthetic set to the sensitive training images in the features of a network."""

from functools import partial

import numpy as np
from torch import Tensor

from privimage.config.seeds import public_seed
from privimage.evaluation import fidelity
from privimage.evaluation.extractor import Extractor
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.subject import Measure, Subject
from privimage.telemetry.progress import say


def _take(subject: Subject) -> dict:
    """FID, KID, precision and recall of the synthetic set, and of what the pretrained generator made."""
    # A method without a generator has no synthetic set; the keys stay, with nothing in them.
    if subject.after is None:
        keys = ("name", "fid", "kid", "precision", "recall", "samples", "features", "inception_score")
        empty = dict.fromkeys(keys)
        return {"fidelity": empty, "fidelity_before": None, "fidelity_vision": None}

    def take(extractor: Extractor, images: Labelled, name: str) -> dict:
        return subject.finished.get(name, partial(_described, subject, extractor, images, name))

    found = {
        "fidelity": take(subject.extractor, subject.after, "fidelity"),
        "fidelity_before": take(subject.extractor, subject.before, "fidelity (before)")
        if subject.before
        else None,
        "fidelity_vision": take(subject.vision, subject.after, "fidelity (vision)")
        if subject.vision
        else None,
    }
    for measured in found.values() if subject.world.is_main else ():
        if measured:
            say(f"evaluate: {measured['name']} {measured['distance']:.4g} of {measured['samples']} images")
    return found


def _described(subject: Subject, extractor: Extractor, images: Labelled, name: str) -> dict:
    # The first images: labels come in turn, so each class has the same share.
    synthetic = images.images[: subject.config.evaluate.fidelity_samples]
    real = _real_features(subject, extractor)
    features = fidelity.extract(extractor, synthetic, subject.world, f"features of synthetic images: {name}")
    return fidelity.described(extractor, features, real) if subject.world.is_main else {}


def _real_features(subject: Subject, extractor: Extractor) -> Tensor:
    """Features of a random part of the sensitive training images, kept in private/ for the next time."""
    settings, train = subject.config.evaluate, subject.train
    # As many real as synthetic images: distances depend on the numbers compared.
    count = settings.reference_samples or settings.fidelity_samples
    seed = public_seed(subject.config, "reference images")
    reference = np.random.default_rng(seed).permutation(len(train.images))[:count]
    name = f"features-{train.fingerprint[:16]}-{extractor.identity}-{len(reference)}-{seed}.npy"
    return fidelity.cached(
        subject.run.private / name,
        lambda: fidelity.extract(
            extractor, train.images[reference], subject.world, "features of sensitive images"
        ),
        subject.world,
    )


FIDELITY = Measure(("fidelity", "fidelity_before", "fidelity_vision"), _take)
