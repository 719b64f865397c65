"""Fidelity: distances of the synthetic set to the sensitive training images in the features of a network."""

from functools import partial

import numpy as np
from torch import Tensor

from privimage.config.seeds import public_seed
from privimage.evaluation import fidelity
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.subject import Measure, Subject
from privimage.telemetry.progress import say


def _take(subject: Subject) -> dict:
    """FID, KID, precision and recall of the synthetic set, and of what the pretrained generator made."""
    # A method without a generator has no synthetic set; the keys stay, with nothing in them.
    if subject.after is None:
        empty = dict.fromkeys(("name", "fid", "kid", "precision", "recall", "samples", "features"))
        return {"fidelity": empty, "fidelity_before": None}
    after = subject.finished.get("fidelity", partial(_described, subject, subject.after, "after"))
    before = None
    if subject.before is not None:
        described = partial(_described, subject, subject.before, "before")
        before = subject.finished.get("fidelity (before)", described)
    if subject.world.is_main:
        say(f"evaluate: {after['name']} {after['distance']:.4g} of {after['samples']} images")
    return {"fidelity": after, "fidelity_before": before}


def _described(subject: Subject, images: Labelled, name: str) -> dict:
    # The first images: labels come in turn, so each class has the same share.
    synthetic = images.images[: subject.config.evaluate.fidelity_samples]
    real = _real_features(subject)
    features = fidelity.extract(
        subject.extractor, synthetic, subject.world, f"features of synthetic images ({name})"
    )
    return fidelity.described(subject.extractor, features, real) if subject.world.is_main else {}


def _real_features(subject: Subject) -> Tensor:
    """Features of a random part of the sensitive training images, kept in private/ for the next time."""
    settings, train = subject.config.evaluate, subject.train
    # As many real as synthetic images: distances depend on the numbers compared.
    count = settings.reference_samples or settings.fidelity_samples
    seed = public_seed(subject.config, "reference images")
    reference = np.random.default_rng(seed).permutation(len(train.images))[:count]
    name = f"features-{train.fingerprint[:16]}-{subject.extractor.identity}-{len(reference)}-{seed}.npy"
    return fidelity.cached(
        subject.run.private / name,
        lambda: fidelity.extract(
            subject.extractor, train.images[reference], subject.world, "features of sensitive images"
        ),
        subject.world,
    )


FIDELITY = Measure(("fidelity", "fidelity_before"), _take)
