"""Image sets in NumPy's files, under the usual names."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from privimage.data import files
from privimage.data.arrays import from_arrays, with_groups
from privimage.data.decode import Source
from privimage.data.request import ONE_CLASS, Columns, Request, Split, part
from privimage.errors import UserError

# Arrays of images and of their labels: ours, those of Keras and of MedMNIST, and what people write.
PAIRS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("images", "labels"),
        ("x_train", "y_train"),
        ("train_images", "train_labels"),
        ("x", "y"),
        ("X", "y"),
        ("data", "labels"),
    ),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}
CLASSES = ("classes", "class_names")


def holds_test_split(path: Path) -> bool:
    """Whether a file has held-out images too, under their usual names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return any(image in file.files for image, _ in PAIRS["test"])
    except Exception:  # whatever is wrong with it is told when it is read
        return False


def read(request: Request) -> Source:
    """Arrays of images and labels, of class names and groups where they are there.

    Raises UserError for a damaged file, and for names of arrays that are missing or could be either.
    """
    # A file may hold both splits, a folder has a file for each.
    path, split = request.path, request.split
    skipped: list[str] = []
    if path.is_dir():
        path, split = part(request, ".npz"), "train"
        skipped = files.others(request.path, {str(path)}, "test")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return _single(found, path, request)
        with found as file:
            source = _read(dict.fromkeys(file.files), file, path, split, request)
            return replace(source, notes=(*source.notes, *files.notes(str(request.path), (), skipped)))
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have their own for a damaged file
        reason = "no NumPy file, or objects in it" if "pickle" in str(error) else error
        raise UserError(f"{path}: not readable as npz ({reason})") from None


def _single(images: np.ndarray, path: Path, request: Request) -> Source:
    if request.labelled:
        raise UserError(
            f"{path}: one array, without labels; write np.savez(file, images=..., labels=...), or read it "
            "with labelled: false"
        )
    return from_arrays(images, np.zeros(len(images), np.int64), ONE_CLASS, str(path), request.known)


def _read(names: dict, file: np.lib.npyio.NpzFile, path: Path, split: Split, request: Request) -> Source:
    def array(name: str) -> np.ndarray:
        try:
            return file[name]
        except ValueError:
            raise UserError(
                f"{path}: {name} are objects, not one array (images of mixed sizes?); bring them to one "
                "size first"
            ) from None

    image, label = chosen(list(names), path, request, split)
    group = request.columns.group
    # Say what is missing, and what is there instead.
    wanted = [image, *([label] if request.labelled else []), *([group] if group else [])]
    if missing := [name for name in wanted if name not in names]:
        hint = "; a set without labels is read with labelled: false" if missing == ["labels"] else ""
        there = f"{', '.join(list(names)[:10])}{', ...' if len(names) > 10 else ''}"
        raise UserError(f"{path}: no array {missing[0]!r} (found: {there}){hint}")
    images = array(image)
    labels = array(label) if request.labelled else np.zeros(len(images), np.int64)
    named = next((name for name in CLASSES if name in names), None)
    classes = tuple(map(str, array(named))) if named else None
    # Images of other arrays have other names: what was decoded of one is never taken for another.
    name = str(path) if image == "images" else f"{path}: {image}"
    source = from_arrays(images, labels, classes if request.labelled else ONE_CLASS, name, request.known)
    others = {name for pair in (*PAIRS["train"], *PAIRS["test"]) for name in pair} | set(CLASSES)
    if left := [name for name in names if name not in {*wanted, *others}]:
        source = replace(source, notes=(f"{path}: arrays that are not read: {', '.join(left[:10])}",))
    return with_groups(source, array(group), str(path)) if group else source


def chosen(names: list[str], path: Path, request: Request, split: Split = "train") -> tuple[str, str]:
    """The names of the arrays of images and labels."""
    given = request.columns if split == "train" else Columns()
    there = [pair for pair in PAIRS[split] if pair[0] in names and given.image in (None, pair[0])]
    if split == "test" and not there:
        reason = "has no test images; name the held-out images in data.sensitive.test_path"
        raise UserError(f"{path}: {reason}")
    several = list(dict.fromkeys(image for image, _ in there))
    if len(several) > 1:
        raise UserError(
            f"{path}: image_column must name one of {', '.join(several)}, which may all be images"
        )
    image, label = there[0] if there else (given.image or "images", "labels")
    return image, given.label or label
