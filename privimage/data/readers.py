"""The kinds of image sets that a configuration can name, each opened as a `Source`."""

import fcntl
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from privimage import torchvision_operators
from privimage.data import store
from privimage.data.decode import Source
from privimage.data.transforms import celeba_side
from privimage.errors import UserError

Split = Literal["train", "test"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
EMBEDDED = {"digits"}
OWN_TEST_SPLIT = {"cifar10", "mnist", "fashion-mnist", "digits"}
ONE_CLASS = ("all",)  # the class of sets without labels


@dataclass(frozen=True)
class Known:
    """What is known of a set's classes without its images.

    Names, or their number, or that the data name them.

    Given for sensitive sets. There one image must not decide whether a class exists, so a class may have no
    image, and classes are never counted from the labels.
    """

    names: tuple[str, ...] | None = None
    count: int | None = None


def open_source(
    kind: str,
    path: Path | None,
    split: Split,
    labelled: bool = True,
    known: Known | None = None,
) -> Source:
    """Open a set by kind and path; without labels there is one class.

    Raises UserError, in one line that names the file or folder (or the missing setting), for whatever is
    wrong with it. Without `known` each class must have an image.
    """
    if kind == "digits":
        source = _digits(split, known)
    elif path is None:
        raise UserError(f"kind {kind} needs a path")
    else:
        try:
            source = _at(path, kind, split, labelled, known)
        except OSError as error:
            raise UserError(f"{error.filename or path}: not readable ({error.strerror})") from None
    return source if labelled else without_labels(source)


def without_labels(source: Source) -> Source:
    """The same images in one class."""
    return replace(source, labels=np.zeros(len(source), np.int64), classes=ONE_CLASS)


def aligned(source: Source, classes: tuple[str, ...], of: str) -> Source:
    """The same images with their labels counted as in `classes`, by the names of the classes.

    Raises UserError, with `of` in it, for a class that is not among them, or that has its name twice there.
    """
    if source.classes == classes:
        return source
    shown = f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    for name in source.classes:
        if classes.count(name) != 1 or source.classes.count(name) != 1:
            often = "no class" if name not in classes else "not one class"
            raise UserError(f"{of}: its class {name!r} is {often} of the training images, which have {shown}")
    places = np.array([classes.index(name) for name in source.classes])
    return replace(source, labels=places[source.labels], classes=classes)


def _at(path: Path, kind: str, split: Split, labelled: bool, known: Known | None) -> Source:
    if kind in ("cifar10", "mnist", "fashion-mnist"):
        return _torchvision(kind, path, split, known)
    if kind == "celeba":
        return _celeba(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if kind == "folder":
        return _folder(_part(path, split), labelled, known)
    if kind == "npz":
        return _npz(_part(path, split, ".npz"), labelled, known)
    return _stored(path, labelled, known)


def holds_test_split(kind: str, path: Path) -> bool:
    """Whether a folder of a kind holds the held-out images too, as `test/` or `test.npz`."""
    return {"folder": (path / "test").is_dir(), "npz": (path / "test.npz").is_file()}.get(kind, False)


def _part(path: Path, split: Split, suffix: str = "") -> Path:
    inside = path / f"{split}{suffix}"
    if inside.exists():
        return inside
    if split == "test":
        raise UserError(f"{path}: has no {inside.name}; name the held-out images in data.sensitive.test_path")
    return path


def _from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...] | None,
    name: str,
    known: Known | None,
) -> Source:
    """Images uint8 (N, H, W) or (N, H, W, C) in memory, and labels (N,).

    Raises UserError for what does not fit.
    """
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3))
    ):
        raise UserError(
            f"{name}: images must be uint8 of shape (N, H, W) or (N, H, W, 1 or 3), not {images.dtype} "
            f"{images.shape}"
        )
    if len(images) == 0:
        raise UserError(f"{name}: holds no image")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name}: {len(images)} images need as many labels, whole numbers; found {labels.dtype} "
            f"{labels.shape}"
        )
    if classes is None:
        classes = _unnamed(labels, name, known)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{name}: labels from {labels.min()} to {labels.max()} do not fit {len(classes)} classes"
        )
    empty = np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=len(classes)) == 0)
    if len(empty) and known is None:
        raise UserError(f"{name}: class {classes[empty[0]]!r} has no image")
    grey = images.ndim == 4 and images.shape[3] == 1
    pixels = images[..., 0] if grey else images
    return Source(
        lambda i: Image.fromarray(pixels[i]),
        [f"{name}: image {i}" for i in range(len(images))],
        labels.astype(np.int64),
        classes,
    )


def _unnamed(labels: np.ndarray, name: str, known: Known | None) -> tuple[str, ...]:
    """The classes of a set that does not name them. Raises UserError where they must not be counted."""
    if known and known.names is not None:
        return known.names
    if known and known.count is None:
        raise UserError(
            f"data.sensitive.classes: needed, since {name} does not name its classes"
            " (an npz does by an array 'classes'); counted from the labels, they could tell whether"
            " a single image is in the set"
        )
    return tuple(str(i) for i in range(known.count if known and known.count else int(labels.max()) + 1))


def _npz(path: Path, labelled: bool, known: Known | None) -> Source:
    def array(name: str) -> np.ndarray:
        try:
            return file[name]
        except ValueError:
            raise UserError(
                f"{path}: {name} are objects, not one array (images of mixed sizes?); bring them to one "
                "size first"
            ) from None

    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ("images", "labels")[: 1 + labelled] if name not in file.files]
            if missing:
                hint = "; a set without labels is read with labelled: false" if missing == ["labels"] else ""
                raise UserError(f"{path}: no array {missing[0]!r} (found: {', '.join(file.files)}){hint}")
            images = array("images")
            labels = array("labels") if labelled else np.zeros(len(images), np.int64)
            named = labelled and "classes" in file.files
            classes = (
                tuple(str(name) for name in array("classes")) if named else None if labelled else ONE_CLASS
            )
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have their own for a damaged file
        raise UserError(f"{path}: not readable as npz ({error})") from None
    return _from_arrays(images, labels, classes, str(path), known)


def _images_below(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _folder(root: Path, labelled: bool, known: Known | None) -> Source:
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, not a file")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not labelled:
        folders = [root]
    if not folders:
        raise UserError(
            f"{root}: expected a sub-folder of images for each class; a set without classes is read with "
            "labelled: false"
        )
    files, labels = [], []
    for label, folder in enumerate(folders):
        inside = _images_below(folder)
        if not inside and labelled and known is None:
            raise UserError(f"{folder}: class {folder.name!r} has no image")
        files += inside
        labels += [label] * len(inside)
    if not files:
        raise UserError(f"{root}: holds no image")
    return Source(
        lambda i: Image.open(files[i]), files, np.array(labels), tuple(folder.name for folder in folders)
    )


def _celeba(path: Path) -> Source:
    """All 202,599 faces, as in the paper; without labels."""
    torchvision_operators.declare()
    from torchvision.datasets import CelebA

    def faces() -> list[str]:
        places = (path / "celeba" / "img_align_celeba", path / "img_align_celeba", path)
        return next((found for place in places if (found := sorted(map(str, place.glob("*.jpg"))))), [])

    files = faces()
    if not files:
        _fetch("celeba", path, lambda: CelebA(str(path), split="all", download=True))
        files = faces()
    return Source(
        lambda i: Image.open(files[i]), files, np.zeros(len(files), np.int64), ONE_CLASS, celeba_side
    )


def _torchvision(kind: str, path: Path, split: Split, known: Known | None) -> Source:
    torchvision_operators.declare()
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[
        kind
    ]
    try:
        found = dataset(str(path), train=split == "train")
    except RuntimeError:  # not there, or not whole
        found = _fetch(kind, path, lambda: dataset(str(path), train=split == "train", download=True))
    name = f"{path} ({kind}, {split})"
    return _from_arrays(np.asarray(found.data), np.asarray(found.targets), tuple(found.classes), name, known)


def _fetch(kind: str, path: Path, download: Callable):
    """Let torchvision download into `path`, one process at a time."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / ".download.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return download()
    except Exception as error:  # no network, no space, damaged archives: each its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: {kind} is not there as torchvision keeps it, and cannot be downloaded ({reason})"
        ) from None


def _digits(split: Split, known: Known | None) -> Source:
    """The UCI handwritten digits inside scikit-learn.

    8x8, 1437 to train on and 360 to test on, divided by digest.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.array(sorted(range(len(images)), key=lambda i: sha256(images[i].tobytes()).digest()))
    chosen = np.sort(order[:1437] if split == "train" else order[1437:])
    return _from_arrays(
        images[chosen], digits.target[chosen], tuple("0123456789"), f"UCI digits, {split}", known
    )


def _stored(path: Path, labelled: bool, known: Known | None) -> Source:
    sidecar = store.verify(path)
    images = store.read(path, np.arange(sidecar.count)).transpose(0, 2, 3, 1)
    if not labelled:
        return _from_arrays(images, np.zeros(sidecar.count, np.int64), ONE_CLASS, str(path), known)
    numbers = tuple(
        str(i) for i in range(len(sidecar.classes))
    )  # a set that did not name its classes was stored
    classes = None if known and sidecar.classes == numbers else sidecar.classes
    return _from_arrays(images, store.labels(path), classes, str(path), known)
