"""Memorisation: whether synthetic images are nearer to training images than to images never seen."""

from functools import partial

from privimage.data.private_store import ImageSet
from privimage.evaluation import memorization
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.subject import Measure, Subject

COMPARED = 2000  # synthetic images in the check


def _take(subject: Subject) -> dict:
    # Without held-out images there is nothing to compare the distance with.
    if not subject.after or not subject.test:
        return {"memorization": None}
    check = partial(_check, subject, subject.after, subject.test)
    return {"memorization": subject.finished.get("memorization", check)}


def _check(subject: Subject, after: Labelled, test: ImageSet) -> dict | None:
    if not subject.world.is_main:
        return None
    from privimage.evaluation import figures as draw

    synthetic, train = after.images[:COMPARED], subject.train.images
    measures, nearest = memorization.check(synthetic, train, test.images, subject.world.device)
    draw.nearest_pairs(
        subject.figures / "sensitive-nearest.png", synthetic, train[nearest.index], nearest.distance
    )
    return measures


MEMORIZATION = Measure(("memorization",), _take, figures=("sensitive-nearest",))
