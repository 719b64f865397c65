"""The kinds of image sets that a configuration can name, each opened as a `Source`."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from privimage.data import folder, hdf5, npz, parquet, store, table, webdataset, zip_archive
from privimage.data.arrays import from_arrays
from privimage.data.decode import Source
from privimage.data.labels import shown
from privimage.data.path_groups import grouped_by_path, labelled_below_groups
from privimage.data.request import ONE_CLASS, Columns, Known, Request, Split, part
from privimage.data.torchvision_sets import celeba, torchvision_set
from privimage.errors import UserError

FOLDERS = {"folder", "npz", "parquet", "webdataset", "beton"}  # kinds that may be a folder
SPLIT = {"folder", "npz", "parquet", "webdataset"}  # kinds that may hold held-out images too
EMBEDDED = {"digits"}
OWN_TEST_SPLIT = {"cifar10", "mnist", "fashion-mnist", "digits"}
# Kinds that say whom an image belongs to.
GROUPED = {"celeba", "csv", "folder", "hdf5", "jsonl", "npz", "parquet", "webdataset", "zip"}


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
    if columns.group is not None and kind not in GROUPED:
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


def aligned(source: Source, classes: tuple[str, ...], of: str, whose: str = "the training images") -> Source:
    """The same images with their labels counted as in `classes`, by the names of the classes.

    Raises UserError, with `of` in it, for a class that is not among them, or that has its name twice there.
    """
    if source.classes == classes:
        return source
    # A class is found by its name alone; a name that occurs twice would be ambiguous.
    for name in source.classes:
        if classes.count(name) != 1 or source.classes.count(name) != 1:
            often = "no class" if name not in classes else "not one class"
            raise UserError(f"{of}: its class {name!r} is {often} of {whose}: {shown(classes)}")
    places = np.array([classes.index(name) for name in source.classes])
    return replace(source, labels=places[source.labels], classes=classes)


def _at(kind: str, request: Request) -> Source:
    if kind in ("cifar10", "mnist", "fashion-mnist"):
        return torchvision_set(kind, request.path, request.split, request.known)
    if kind == "celeba":
        return celeba(request.path, request.columns.group)
    if not request.path.exists():
        raise UserError(f"{request.path}: no such file or folder")
    if request.split == "test" and kind not in SPLIT:
        reason = "has no test split of its own; name the held-out images in data.sensitive.test_path"
        raise UserError(f"{request.path}: {reason}")
    if request.path.is_dir() and kind not in FOLDERS:
        raise UserError(f"{request.path}: a folder, and kind {kind} is one file")
    return READERS[kind](request)


def holds_test_split(kind: str, path: Path) -> bool:
    """Whether a set of a kind holds the held-out images too, as `test/` or as files or arrays named so."""
    if kind == "folder":
        return (path / "test").is_dir()
    if kind == "npz":
        return (path / "test.npz").is_file() or npz.holds_test_split(path)
    if kind in ("parquet", "webdataset"):
        return {"parquet": parquet, "webdataset": webdataset}[kind].holds_test_split(path)
    return False


def _folder(request: Request) -> Source:
    """A folder with groups, where they are asked for; those of the first level have folders of classes."""
    group = request.columns.group
    if group is None:
        return folder.read(request)
    above = request.labelled and group == "1"
    source, root = folder.read(replace(request, labelled=request.labelled and not above)), part(request)
    source = labelled_below_groups(source, root) if above else source
    return grouped_by_path(source, [Path(name).relative_to(root) for name in source.names], group, root)


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


def _stored(request: Request) -> Source:
    path, known = request.path, request.known
    sidecar = store.verify(path)
    # (N, C, H, W) as stored -> (N, H, W, C) as arrays are given.
    images = store.read(path, np.arange(sidecar.count)).transpose(0, 2, 3, 1)
    if not request.labelled:
        return from_arrays(images, np.zeros(sidecar.count, np.int64), ONE_CLASS, str(path), known)
    # A set that did not name its classes may have been stored.
    numbers = tuple(str(i) for i in range(len(sidecar.classes)))
    classes = None if known and sidecar.classes == numbers else sidecar.classes
    return from_arrays(images, store.labels(path), classes, str(path), known)


READERS: dict[str, Callable[[Request], Source]] = {
    "beton": _stored,
    "csv": table.read_csv,
    "folder": _folder,
    "hdf5": hdf5.read,
    "jsonl": table.read_json_lines,
    "npz": npz.read,
    "parquet": parquet.read,
    "webdataset": webdataset.read,
    "zip": zip_archive.read,
}
