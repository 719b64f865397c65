"""Image sets in torchvision's own file layouts, downloaded by it where they are missing."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from privimage import torchvision_operators
from privimage.data.arrays import from_arrays, with_groups
from privimage.data.decode import Source
from privimage.data.request import ONE_CLASS, Known, Split
from privimage.data.transforms import celeba_side
from privimage.errors import UserError


def celeba(path: Path, group: str | None = None) -> Source:
    """All 202,599 faces, as in the paper; without labels, with the 10,177 persons where `group` is identity.

    Raises UserError for any other `group`, and where a face has no person.
    """
    if group not in (None, "identity"):
        raise UserError(
            f"data.sensitive.group: celeba knows whom a face belongs to by 'identity', not {group!r}"
        )
    torchvision_operators.declare()
    from torchvision.datasets import CelebA

    def faces() -> list[str]:
        places = (path / "celeba" / "img_align_celeba", path / "img_align_celeba", path)
        return next((found for place in places if (found := sorted(map(str, place.glob("*.jpg"))))), [])

    files = faces()
    if not files:
        _fetch("celeba", path, lambda: CelebA(str(path), split="all", download=True))
        files = faces()
    source = Source(files, Image.open, files, np.zeros(len(files), np.int64), ONE_CLASS, celeba_side)
    return with_groups(source, _identities(path, files), str(path)) if group else source


def _identities(path: Path, files: list[str]) -> list[str]:
    """The persons of faces, from CelebA's list of file names and numbers of persons."""
    places = [place / "identity_CelebA.txt" for place in (path / "celeba", path, path.parent)]
    listed = next((place for place in places if place.is_file()), None)
    if listed is None:
        raise UserError(f"data.sensitive.group: {path} has no identity_CelebA.txt")
    rows = [line.split() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    persons = {row[0]: row[-1] for row in rows if len(row) == 2}
    for file in files:
        if Path(file).name not in persons:
            raise UserError(f"data.sensitive.group: {listed} has no person for {Path(file).name}")
    return [persons[Path(file).name] for file in files]


def torchvision_set(kind: str, path: Path, split: Split, known: Known | None) -> Source:
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
    return from_arrays(np.asarray(found.data), np.asarray(found.targets), tuple(found.classes), name, known)


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
