"""Memorisation: whether synthetic images are nearer to training images than to images never seen."""

from privimage.evaluation import memorization
from privimage.stages.measures.subject import Measure, Subject

COMPARED = 2000  # synthetic images in the check


def _take(subject: Subject) -> dict:
    if not subject.after or not subject.test:
        return {"memorization": None}
    return {"memorization": subject.finished.get("memorization", lambda: _check(subject))}


def _check(subject: Subject) -> dict | None:
    if not subject.world.is_main or not subject.after or not subject.test:
        return None
    from privimage.evaluation import figures as draw

    synthetic, train = subject.after.images[:COMPARED], subject.train.images
    found, nearest = memorization.check(synthetic, train, subject.test.images, subject.world.device)
    draw.nearest_pairs(
        subject.figures / "sensitive-nearest.png", synthetic, train[nearest.index], nearest.distance
    )
    return found


MEMORIZATION = Measure(("memorization",), _take, figures=("sensitive-nearest",))
