"""Accuracy: classifiers trained on synthetic images, tested on real ones."""

from functools import partial

from privimage.config.seeds import public_seed
from privimage.evaluation import report, utility
from privimage.evaluation.utility import Labelled
from privimage.stages.measures.subject import Measure, Subject
from privimage.telemetry.progress import say

EMBEDDED = 1000  # images of each kind in the t-SNE figure

Scores = dict[str, float | None]


def _take(subject: Subject) -> dict:
    """Accuracies in percent of the classifiers trained on the synthetic set, and on what the pretrained
    generator made; by name of the classifier.
    """
    empty: Scores = dict.fromkeys(report.CLASSIFIERS)
    nothing = {"accuracy": empty, "accuracy_before": None, "accuracy_before_images": 0, "accuracy_note": ""}
    if subject.test is None:
        why = "data.sensitive.test_path names no held-out images to test on"
        return nothing | {"accuracy_note": f"Not measured: {why}."}
    if subject.n_classes < 2:
        return nothing | {"accuracy_note": "Not measured: the sensitive set has no classes."}

    # A method without a generator trains them on the sensitive images: the ceiling for all others. Labels of
    # public classes teach nothing about the sensitive ones.
    source = subject.after or Labelled(subject.train.images[:], subject.train.labels)
    before = subject.before if subject.before and subject.before.labels.min() >= 0 else None
    after = _scores(subject, source, "after")
    earlier = _scores(subject, before, "before") if before else None

    if subject.world.is_main:
        from privimage.evaluation import figures as draw

        known = [
            {key: value for key, value in (scores or {}).items() if value is not None}
            for scores in (after, earlier)
        ]
        draw.accuracies(
            subject.figures / "sensitive-accuracy.png", known[0], known[1], 100 / subject.n_classes
        )
    return nothing | {
        "accuracy": after,
        "accuracy_before": earlier,
        "accuracy_before_images": len(before) if before else 0,
    }


def _scores(subject: Subject, training: Labelled, name: str) -> Scores:
    scores: Scores = dict.fromkeys(report.CLASSIFIERS)
    for key in subject.config.evaluate.classifiers:
        score = partial(_score, subject, key, training, name)
        scores[key] = subject.finished.get(f"{key} ({name})", score)
        if subject.world.is_main:
            say(
                f"evaluate: {key} trained on {len(training)} images ({name}): {scores[key]:.1f} % of "
                f"{len(subject.test.labels) if subject.test else 0} real test images"
            )
    return scores


def _score(subject: Subject, key: str, training: Labelled, name: str) -> float | None:
    if key == "cnn":
        return _cnn(subject, training, name)
    if not subject.world.is_main:
        return None  # scikit-learn's classifiers run on one rank
    return utility.SHALLOW[key](training, _held_out(subject), _seed(subject))


def _cnn(subject: Subject, training: Labelled, name: str) -> float:
    settings, held_out = subject.config.evaluate, _held_out(subject)
    network = utility.train_cnn(
        training,
        subject.n_classes,
        epochs=settings.cnn_epochs,
        batch_size=settings.cnn_batch_size,
        flip=subject.config.pretrain.flip,
        seed=_seed(subject),
        world=subject.world,
        label=f"cnn ({name})",
    )
    predictions = utility.predict(network, held_out.images, subject.world.device)
    if name == "after" and subject.world.is_main:
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
            _seed(subject),
        )
    return utility.percent(predictions.labels, held_out.labels)


def _held_out(subject: Subject) -> Labelled:
    assert subject.test is not None  # `_take` has looked
    return Labelled(subject.test.images[:], subject.test.labels)


def _seed(subject: Subject) -> int:
    return public_seed(subject.config, "classifiers") % 2**32  # scikit-learn takes 32 bits


UTILITY = Measure(
    ("accuracy", "accuracy_before", "accuracy_before_images", "accuracy_note"),
    _take,
    figures=("sensitive-accuracy", "sensitive-confusion", "sensitive-tsne"),
)
