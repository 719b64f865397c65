"""The selection: which public images were pretrained on, and how similar in meaning they are."""

import numpy as np

from privimage.evaluation import figures as draw
from privimage.evaluation import semantics
from privimage.stages.measures.subject import Measure, Subject
from privimage.stages.public_set import Semantics, public_labels, public_semantics

NOT_MEASURED = {"sds": None, "sds_all_public": None, "covered": None}


def _take(subject: Subject) -> dict:
    if "pretrain" not in subject.config.stages:
        return {"selection": None, "semantics": NOT_MEASURED}
    public, columns = public_labels(subject.run), None
    if subject.config.spec.pretraining in ("selected", "random"):
        columns = public_semantics(subject.config, subject.run, subject.world)
    if not subject.world.is_main:
        return {}
    # Methods without a query have used all public images.
    used, chosen = np.ones(len(public.of_images), bool), None
    if columns is not None:
        used, chosen = _chosen(subject, columns)
    return {"selection": chosen, "semantics": _similarity(subject, public, used)}


def _chosen(subject: Subject, columns: Semantics) -> tuple[np.ndarray, dict]:
    """Which public images were used, bool (M,), and what the report says of it."""
    selection = np.load(subject.run.stage("select") / "selection.npz")
    counts, assignment = selection["counts"], selection["assignment"]
    rows = list(subject.train.classes) if subject.config.data.sensitive.labelled else ["all images"]
    by_vote = subject.config.spec.pretraining == "selected"
    if by_vote:
        file = subject.figures / "selection.png"
        draw.selection(file, counts, assignment, rows, columns.names, columns.kind)
    # An image was used if its class or cluster was given to a sensitive class.
    used = assignment[columns.of_images] >= 0
    by_class = [
        {"name": name, "public": [columns.names[i] for i in np.flatnonzero(assignment == row)]}
        for row, name in enumerate(rows)
    ]
    return used, {
        "images": int(used.sum()),
        "public_images": len(used),
        "by_vote": by_vote,
        "semantics": columns.kind,
        "kept": by_class,
    }


def _similarity(subject: Subject, public: Semantics, used: np.ndarray) -> dict:
    """Semantic distribution similarity of the sensitive set to the used and to all public images."""
    labelled = subject.config.data.sensitive.labelled
    if subject.vectors is None or not labelled or len(public.names) < 2:
        return NOT_MEASURED
    train = subject.train
    # Frequencies of the sensitive labels: the result is marked as not covered.
    sensitive = (train.classes, np.bincount(train.labels, minlength=len(train.classes)))
    similar, whole = (
        semantics.similarity(
            *sensitive, public.names, np.bincount(labels, minlength=len(public.names)), subject.vectors
        )
        for labels in (public.of_images[used], public.of_images)
    )
    return similar | {"sds_all_public": whole["sds"]}


SELECTION = Measure(("selection", "semantics"), _take, figures=("selection",))
