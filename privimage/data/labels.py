"""Labels as sets hold them (numbers, names, one-hot rows), brought to numbers of classes."""

import numpy as np

from privimage.data.request import ONE_CLASS, Known
from privimage.errors import UserError

SHOWN = 5  # classes in a message


def numbered(
    labels: np.ndarray, classes: tuple[str, ...] | None, name: str, known: Known | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers of classes, int64 (N,), and the names of the classes.

    `labels` are whole numbers of any type from 0 on, names, or one-hot rows; (N,), (N, 1) or (N, classes).
    `classes` are the names that the set itself gives. Numbers without names count from 1 in a public set if
    that leaves no gap. In a sensitive one no reading depends on which labels occur. Raises UserError, with
    `name`, for whatever is not a label or does not fit the classes.
    """
    if classes is None and known is not None:
        classes = known.names
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        # The number of columns is a number of classes that no single image decides.
        columns = labels.shape[1]
        labels = _hot(labels, name)
        classes = classes or _stated(known) or tuple(map(str, range(columns)))
        return _fitting(labels, classes, name, known)
    if labels.ndim != 1:
        raise UserError(f"{name}: labels have the shape {labels.shape}, and one label an image is needed")
    if labels.dtype.kind == "O" and None in labels.tolist():
        raise UserError(f"{name}: image {labels.tolist().index(None)} has no label")
    if labels.dtype.kind in "OSU":
        return _named([_text(label) for label in labels.tolist()], classes, name, known)
    numbers = _whole(labels, name)
    if classes is None:
        _require_stated(name, known)
        classes = _stated(known)
    if classes is None and numbers.min() == 1 and len(np.unique(numbers)) == numbers.max():
        return numbers - 1, tuple(map(str, range(1, int(numbers.max()) + 1)))
    return _fitting(numbers, classes or tuple(map(str, range(int(numbers.max()) + 1))), name, known)


def none(count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The numbers and the class of images without labels."""
    return np.zeros(count, np.int64), ONE_CLASS


def _named(
    labels: list[str], classes: tuple[str, ...] | None, name: str, known: Known | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    if classes is None and known is not None and known.count is not None:
        # Numbers as text, as all cells of a table are.
        if all(label.isdecimal() for label in labels):
            return _fitting(np.array(labels, np.int64), tuple(map(str, range(known.count))), name, known)
        raise UserError(
            f"data.sensitive.classes: {name} has names for labels; state the names of all classes, as a "
            "list, in place of their number"
        )
    if classes is None:
        _require_stated(name, known)
        numeric = all(label.isdecimal() for label in labels)
        classes = tuple(sorted(set(labels), key=(lambda label: int(label)) if numeric else None))
    places = {label: place for place, label in enumerate(classes)}
    if len(places) < len(classes):
        raise UserError(f"{name}: two classes have one name")
    if unknown := next((label for label in labels if label not in places), None):
        raise UserError(f"{name}: {unknown!r} is none of its classes, which are {shown(classes)}")
    return _fitting(np.array([places[label] for label in labels], np.int64), classes, name, known)


def shown(classes: tuple[str, ...]) -> str:
    """The first names of classes, for a message."""
    return f"{', '.join(classes[:SHOWN])}{', ...' if len(classes) > SHOWN else ''}"


def _stated(known: Known | None) -> tuple[str, ...] | None:
    return tuple(map(str, range(known.count))) if known and known.count else None


def _require_stated(name: str, known: Known | None) -> None:
    """Raise UserError where classes would have to be counted from the labels of a sensitive set."""
    if known is not None and known.count is None and known.names is None:
        raise UserError(
            f"data.sensitive.classes: needed, since {name} does not name its classes"
            " (an npz does by an array 'classes'); counted from the labels, they could tell whether"
            " a single image is in the set"
        )


def _fitting(
    numbers: np.ndarray, classes: tuple[str, ...], name: str, known: Known | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    if numbers.min() < 0 or numbers.max() >= len(classes):
        hint = "; they count from 0: write labels - 1" if numbers.max() == len(classes) else ""
        raise UserError(
            f"{name}: labels from {numbers.min()} to {numbers.max()} do not fit {len(classes)} classes{hint}"
        )
    empty = np.flatnonzero(np.bincount(numbers, minlength=len(classes)) == 0)
    if len(empty) and known is None:
        raise UserError(f"{name}: class {classes[empty[0]]!r} has no image")
    return numbers, classes


def _whole(labels: np.ndarray, name: str) -> np.ndarray:
    if labels.dtype.kind not in "buif":
        raise UserError(f"{name}: labels are {labels.dtype}; whole numbers or names are needed")
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.rint(labels))).all():
        first = int(np.flatnonzero(~(np.isfinite(labels) & (labels == np.rint(labels))))[0])
        raise UserError(f"{name}: label {labels[first]} of image {first} is not a whole number")
    return labels.astype(np.int64)


def _hot(labels: np.ndarray, name: str) -> np.ndarray:
    right = (labels == 1).sum(axis=1) == 1
    right &= (labels == 0).sum(axis=1) == labels.shape[1] - 1
    if not right.all():
        raise UserError(
            f"{name}: labels of shape {labels.shape} are read where each row has a single 1, and that of "
            f"image {int(np.flatnonzero(~right)[0])} has not; write one label an image"
        )
    return (labels == 1).argmax(axis=1).astype(np.int64)


def _text(label: object) -> str:
    return label.decode(errors="replace") if isinstance(label, bytes) else str(label)
