"""The kinds of image sets that a configuration can name, each opened as a `Source`."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from privimage.data import store
from privimage.data.arrays import from_arrays, with_groups
from privimage.data.decode import Source
from privimage.data.request import ONE_CLASS, Columns, Known, Request, Split
from privimage.data.torchvision_sets import celeba, torchvision_set
from privimage.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
EMBEDDED = {"digits"}
OWN_TEST_SPLIT = {"cifar10", "mnist", "fashion-mnist", "digits"}


def open_source(
    kind: str,
    path: Path | None,
    split: Split,
    labelled: bool = True,
    known: Known | None = None,
    columns: Columns = Columns(),
) -> Source:
    """Open a set by kind and path; see `Request`.

    Raises UserError, in one line that names the file or folder (or the missing setting), for whatever is
    wrong with it.
    """
    if columns.group is not None and kind != "npz":
        raise UserError(f"data.sensitive.group: kind {kind} does not say whom an image belongs to")
    if kind == "digits":
        source = _digits(split, known)
    elif path is None:
        raise UserError(f"kind {kind} needs a path")
    else:
        try:
            source = _at(kind, Request(path, split, labelled, known, columns))
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
    # A class is found by its name alone; a name that occurs twice would be ambiguous.
    shown = f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    for name in source.classes:
        if classes.count(name) != 1 or source.classes.count(name) != 1:
            often = "no class" if name not in classes else "not one class"
            raise UserError(f"{of}: its class {name!r} is {often} of the training images, which have {shown}")
    places = np.array([classes.index(name) for name in source.classes])
    return replace(source, labels=places[source.labels], classes=classes)


def _at(kind: str, request: Request) -> Source:
    path, split, known = request.path, request.split, request.known
    if kind in ("cifar10", "mnist", "fashion-mnist"):
        return torchvision_set(kind, path, split, known)
    if kind == "celeba":
        return celeba(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if kind == "folder":
        return _folder(_part(path, split), request.labelled, known)
    if kind == "npz":
        return _npz(_part(path, split, ".npz"), request)
    return _stored(path, request.labelled, known)


def holds_test_split(kind: str, path: Path) -> bool:
    """Whether a folder of a kind holds the held-out images too, as `test/` or `test.npz`."""
    return {"folder": (path / "test").is_dir(), "npz": (path / "test.npz").is_file()}.get(kind, False)


def _part(path: Path, split: Split, suffix: str = "") -> Path:
    # A folder with train/ and test/ holds both splits, any other is one split.
    inside = path / f"{split}{suffix}"
    if inside.exists():
        return inside
    if split == "test":
        raise UserError(f"{path}: has no {inside.name}; name the held-out images in data.sensitive.test_path")
    return path


def _npz(path: Path, request: Request) -> Source:
    labelled, group = request.labelled, request.columns.group

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
            # Say what is missing, and what is there instead.
            wanted = ["images", *(["labels"] if labelled else []), *([group] if group else [])]
            missing = [name for name in wanted if name not in file.files]
            if missing:
                hint = "; a set without labels is read with labelled: false" if missing == ["labels"] else ""
                raise UserError(f"{path}: no array {missing[0]!r} (found: {', '.join(file.files)}){hint}")
            images = array("images")
            labels = array("labels") if labelled else np.zeros(len(images), np.int64)
            groups = array(group) if group else None
            named = labelled and "classes" in file.files
            classes = (
                tuple(str(name) for name in array("classes")) if named else None if labelled else ONE_CLASS
            )
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have their own for a damaged file
        raise UserError(f"{path}: not readable as npz ({error})") from None
    source = from_arrays(images, labels, classes, str(path), request.known)
    return source if groups is None else with_groups(source, groups, str(path))


def _images_below(folder: Path) -> list[str]:
    # By names alone: a million paths as objects would take minutes.
    return sorted(
        os.path.join(place, name)  # noqa: PTH118
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122
    )


def _folder(root: Path, labelled: bool, known: Known | None) -> Source:
    if not root.is_dir():
        hint = "; kind beton reads it" if root.suffix in (".beton", ".npy") else ""
        raise UserError(f"{root}: expected a folder of images, not a file{hint}")
    # Classes are numbered by the order of their names.
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not labelled:
        folders = [root]
    if not folders:
        raise UserError(
            f"{root}: expected a sub-folder of images for each class; a set without classes is read with "
            "labelled: false"
        )
    files, labels = [], []
    # A class without an image is allowed only where the classes were declared (sensitive sets).
    for label, folder in enumerate(folders):
        inside = _images_below(folder)
        if not inside and labelled and known is None:
            raise UserError(f"{folder}: class {folder.name!r} has no image")
        files += inside
        labels += [label] * len(inside)
    if not files:
        raise UserError(f"{root}: holds no image")
    return Source(files, Image.open, files, np.array(labels), tuple(folder.name for folder in folders))


def _digits(split: Split, known: Known | None) -> Source:
    """The UCI handwritten digits inside scikit-learn.

    8x8, 1437 to train on and 360 to test on, divided by digest.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    # The division depends on the pixels alone, so that it is the same in every version of scikit-learn.
    order = np.array(sorted(range(len(images)), key=lambda i: sha256(images[i].tobytes()).digest()))
    chosen = np.sort(order[:1437] if split == "train" else order[1437:])
    return from_arrays(
        images[chosen], digits.target[chosen], tuple("0123456789"), f"UCI digits, {split}", known
    )


def _stored(path: Path, labelled: bool, known: Known | None) -> Source:
    sidecar = store.verify(path)
    # (N, C, H, W) as stored -> (N, H, W, C) as arrays are given.
    images = store.read(path, np.arange(sidecar.count)).transpose(0, 2, 3, 1)
    if not labelled:
        return from_arrays(images, np.zeros(sidecar.count, np.int64), ONE_CLASS, str(path), known)
    numbers = tuple(
        str(i) for i in range(len(sidecar.classes))
    )  # a set that did not name its classes was stored
    classes = None if known and sidecar.classes == numbers else sidecar.classes
    return from_arrays(images, store.labels(path), classes, str(path), known)
