"""Accuracy: classifiers trained on synthetic images, tested on real ones, beside the real-data ceiling."""

from collections.abc import Callable
from functools import partial

import numpy as np

from privimage.evaluation import report, utility
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.classify import predicted, seed, strongest, trained_network
from privimage.stages.measures.subject import Finished, Measure, Subject
from privimage.telemetry.progress import say

EMBEDDED = 1000  # images of each kind in the t-SNE figure

Scores = dict[str, float | None]
# Per classifier, what `_judged` says of its answers.
Judged = dict[str, dict]


def _take(subject: Subject) -> dict:
    """Accuracies in percent, by name of the classifier, after training on the synthetic set, on what the
    pretrained generator made, and on the sensitive images themselves.
    """
    empty: Scores = dict.fromkeys(report.SCORES)
    nothing: dict = dict.fromkeys(("accuracy_before", "accuracy_ceiling", "accuracy_chance"))
    nothing |= dict.fromkeys(("accuracy_before_images", "accuracy_ceiling_images"), 0)
    nothing |= {"accuracy": empty, "accuracy_note": "", "classes": None}
    if subject.test is None:
        why = "data.sensitive.test_path names no held-out images to test on"
        return nothing | {"accuracy_note": f"Not measured: {why}."}
    if subject.n_classes < 2:
        return nothing | {"accuracy_note": "Not measured: the sensitive set has no classes."}

    # A method without a generator trains them on the sensitive images: the ceiling for all others. Labels of
    # public classes teach nothing about the sensitive ones.
    source = subject.after or Labelled(subject.train.images[:], subject.train.labels)
    before = subject.before if subject.before and subject.before.labels.min() >= 0 else None
    after = _all(subject, source, "after", subject.finished)
    earlier = _all(subject, before, "before", subject.finished) if before else None
    real = (
        _as_many(subject, len(subject.after)) if subject.after and subject.config.evaluate.ceiling else None
    )
    ceiling = _all(subject, real, "real images", subject.ceiling) if real else None

    scores = {name: _scores(judged) for name, judged in (("after", after), ("before", earlier))}
    if subject.world.is_main:
        from privimage.evaluation import figures as draw

        known = [
            {key: score for key in report.CLASSIFIERS if (score := s[key]) is not None}
            for s in scores.values()
        ]
        file = subject.figures / "sensitive-accuracy.png"
        draw.accuracies(file, known[0], known[1], 100 / subject.n_classes, report.CLASSIFIERS)
    # What saying always the same would get right, where the classes of the test images are not even.
    counts = np.bincount(subject.test.labels, minlength=subject.n_classes)
    return nothing | {
        "accuracy": scores["after"],
        "accuracy_before": scores["before"] if earlier else None,
        "accuracy_before_images": len(before) if before else 0,
        "accuracy_ceiling": _scores(ceiling) if ceiling else None,
        "accuracy_ceiling_images": len(real) if real else 0,
        "accuracy_chance": float(100 * counts.max() / counts.sum()),
        "classes": _by_class(subject, after, ceiling, counts) if subject.world.is_main else None,
    }


def _as_many(subject: Subject, count: int) -> Labelled:
    """Sensitive images to learn from in place of `count` synthetic ones: as many, of all if there are more.

    More would take longer than all other classifiers together, and no synthetic set of `count` images could
    be expected to teach as much.
    """
    labels = subject.train.labels
    chosen = np.sort(np.random.default_rng(seed(subject)).permutation(len(labels))[:count])
    return Labelled(subject.train.images[chosen], labels[chosen])


def _all(subject: Subject, training: Labelled, name: str, kept: Finished) -> Judged:
    """Each classifier of the settings; those in `kept` are not trained again."""
    found: Judged = {}
    for key in subject.config.evaluate.classifiers:
        found[key] = kept.get(f"{key} ({name})", partial(_judged, subject, key, training, name))
        if subject.world.is_main:
            say(
                f"evaluate: {key} trained on {len(training)} images ({name}): {found[key]['percent']:.1f} % "
                f"of {len(_held_out(subject))} real test images"
            )
    return found


def _judged(subject: Subject, key: str, training: Labelled, name: str) -> dict | None:
    """The accuracy of one classifier on the real test images, in percent, of all and of each class."""
    held_out = _held_out(subject)
    answer: Callable = _cnn_with_figures if key == "cnn" and name == "after" else predicted
    labels = answer(subject, key, training, held_out, name)
    if labels is None:
        return None
    counts = utility.confusion(labels, held_out.labels, subject.n_classes)
    of_class = [100 * row[c] / row.sum() if row.sum() else None for c, row in enumerate(counts)]
    return {"percent": utility.percent(labels, held_out.labels), "of_class": of_class}


def _cnn_with_figures(
    subject: Subject, key: str, training: Labelled, held_out: Labelled, name: str
) -> np.ndarray:
    network = trained_network(subject, key, training, name)
    predictions = utility.predict(network, held_out.images, subject.world.device)
    if subject.world.is_main:
        from privimage.evaluation import figures as draw

        counts = utility.confusion(predictions.labels, held_out.labels, subject.n_classes)
        classes = subject.train.classes
        draw.confusion_matrix(subject.figures / "sensitive-confusion.png", counts, classes)
        # Features of both sets in one plane show whether the classifier transfers.
        synthetic = utility.predict(network, training.images[:EMBEDDED], subject.world.device)
        draw.embedding(
            subject.figures / "sensitive-tsne.png",
            synthetic.features,
            training.labels[:EMBEDDED],
            predictions.features[:EMBEDDED],
            held_out.labels[:EMBEDDED],
            classes,
            seed(subject),
        )
    return predictions.labels


def _scores(judged: Judged | None) -> Scores:
    scores = {key: (judged or {}).get(key, {}).get("percent") for key in report.CLASSIFIERS}
    # Of the benchmark's three, both numbers that others print; of fewer they would be something else.
    three = [score for key in report.BENCHMARK if (score := scores[key]) is not None]
    whole = len(three) == len(report.BENCHMARK)
    return scores | {
        "benchmark_best": max(three) if whole else None,
        "benchmark_mean": float(np.mean(three)) if whole else None,
    }


def _by_class(subject: Subject, after: Judged, ceiling: Judged | None, counts: np.ndarray) -> dict:
    """Accuracy of the strongest classifier on the test images of each class, in percent."""
    key = strongest(subject)
    highest = ceiling[key]["of_class"] if ceiling else [None] * subject.n_classes
    columns = zip(subject.train.classes, after[key]["of_class"], highest, counts.tolist(), strict=True)
    names = ("name", "accuracy", "ceiling", "test_images")
    return {"classifier": key, "of": [dict(zip(names, row, strict=True)) for row in columns]}


def _held_out(subject: Subject) -> Labelled:
    assert subject.test is not None  # `_take` has looked
    return Labelled(subject.test.images[:], subject.test.labels)


UTILITY = Measure(
    (
        "accuracy",
        "accuracy_before",
        "accuracy_before_images",
        "accuracy_ceiling",
        "accuracy_ceiling_images",
        "accuracy_chance",
        "accuracy_note",
        "classes",
    ),
    _take,
    figures=("sensitive-accuracy", "sensitive-confusion", "sensitive-tsne"),
)
