"""Agreement: whether the labels of the synthetic set say what its images show, from that set alone."""

import numpy as np

from privimage.config.seeds import public_seed
from privimage.evaluation import utility
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.classify import predicted, strongest
from privimage.stages.measures.subject import Measure, Subject
from privimage.telemetry.progress import say

COMPARED = 10_000  # synthetic images, half of them to train on


def _take(subject: Subject) -> dict:
    """A classifier learns from one half of the synthetic set and is asked about the other.

    It sees nothing sensitive: post-processing of the release.
    """
    if subject.after is None or subject.n_classes < 2 or len(subject.after) < 4 * subject.n_classes:
        return {"agreement": None}
    found = subject.finished.get("agreement", lambda: _agreement(subject, subject.after))
    if subject.world.is_main:
        say(f"evaluate: one half of the synthetic labels from the other: {found['percent']:.1f} % right")
    record = subject.run.record("synthesize") or {}
    return {"agreement": found | {"relabelled": record.get("relabelled")}}


def _agreement(subject: Subject, after: Labelled | None) -> dict | None:
    assert after is not None  # `_take` has looked
    # Drawn by lot: labels come in turn, so that every second image would be half of the classes.
    order = np.random.default_rng(public_seed(subject.config, "halves")).permutation(len(after))[:COMPARED]
    one, other = (Labelled(after.images[half], after.labels[half]) for half in np.array_split(order, 2))
    key = strongest(subject)
    labels = predicted(subject, key, one, other, "one half")
    if labels is None:
        return None
    return {
        "classifier": key,
        "percent": utility.percent(labels, other.labels),
        "images": len(other),
        "chance": 100 / subject.n_classes,
    }


AGREEMENT = Measure(("agreement",), _take)
