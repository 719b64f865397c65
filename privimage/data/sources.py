"""Readers of public and sensitive sets: one list of images by kind, decoded one at a time."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from privimage.config import Config
from privimage.data import transforms
from privimage.errors import UserError

Split = Literal["train", "test"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
OWN_TEST_SPLIT = {"cifar10", "mnist", "fashion-mnist", "digits"}


@dataclass(frozen=True)
class Source:
    """Images that are decoded when asked for: `decode(i)` gives the whole i-th image, `names[i]` says which it is."""

    decode: Callable[[int], Image.Image]
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    crop: Callable[[Image.Image], int | None] = lambda image: None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int, resolution: int, channels: int) -> tuple[np.ndarray, bytes]:
        """The image as uint8 (C, resolution, resolution), and the SHA-256 of its pixels before the resize.

        Raises UserError that names an image which does not decode.
        """
        try:
            whole = self.decode(index)
            whole.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.names[index]}: not readable as an image ({error})") from None
        digest = hashlib.sha256(f"{whole.mode}{whole.size}".encode() + whole.tobytes()).digest()
        return transforms.to_array(whole, resolution, channels, self.crop(whole)), digest


@dataclass(frozen=True)
class ImageSet:
    """A whole set in memory: images uint8 (N, C, H, W), labels int64 (N,).

    The fingerprint is that of the content: the same for any order and any target resolution.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str


def read(source: Source, resolution: int, channels: int, workers: int = 2) -> ImageSet:
    """Decode all images. Raises UserError that names the first one that does not decode."""
    if not len(source):
        raise UserError("the image set is empty")
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        decoded = list(pool.map(lambda index: source.image(index, resolution, channels), range(len(source))))
    fingerprint = hashlib.sha256(b"".join(sorted(digest for _, digest in decoded))).hexdigest()
    return ImageSet(np.stack([image for image, _ in decoded]), source.labels.astype(np.int64), source.classes, fingerprint)


def has_test_split(config: Config) -> bool:
    """Whether there are held-out sensitive images to evaluate on."""
    sensitive = config.data.sensitive
    return sensitive.test_path is not None or sensitive.kind in OWN_TEST_SPLIT


def read_sensitive(config: Config, split: Split) -> ImageSet:
    """The sensitive set of a configuration, one split of it.

    Raises UserError for anything that is wrong with it, or if it has not the number of images or classes that were stated.
    """
    data, sensitive = config.data, config.data.sensitive
    path = sensitive.path if split == "train" or sensitive.test_path is None else sensitive.test_path
    found = read(open_source(sensitive.kind, path, split), data.resolution, data.channels, data.workers)
    if not sensitive.labelled:
        found = ImageSet(found.images, np.zeros_like(found.labels), ("all",), found.fingerprint)
    if split == "train":
        for name, stated, true in (("count", sensitive.count, len(found.images)), ("classes", sensitive.classes, len(found.classes))):
            if stated is not None and stated != true and (name == "count" or sensitive.labelled):
                raise UserError(f"data.sensitive.{name}: {stated} was stated, the data have {true}")
    return found


def open_source(kind: str, path: Path | None, split: Split = "train") -> Source:
    """Open a set by kind and path. Raises UserError, in one line that names path or key, for whatever is wrong with it."""
    if kind == "digits":
        return _digits(split)
    if path is None:
        raise UserError(f"data: kind {kind} needs a path")
    if kind in ("cifar10", "mnist", "fashion-mnist"):
        return _torchvision(kind, path, split)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return {"folder": _folder, "npz": _npz, "celeba": _celeba, "beton": _store}[kind](path)


def from_arrays(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], name: str, test_split: bool = False) -> Source:
    """A source of images uint8 (N, H, W) or (N, H, W, C) that are in memory. Raises UserError for what does not fit together."""
    if images.dtype == object:
        raise UserError(f"{name}: images of mixed sizes; resize them to one size first")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UserError(f"{name}: images must be uint8 of shape (N, H, W) or (N, H, W, 1 or 3), not {images.dtype} {images.shape}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(f"{name}: {len(images)} images, but labels are {labels.dtype} {labels.shape}; one whole number an image is needed")
    _check_labels(labels, classes, name)
    squeezed = images[:, :, :, 0] if images.ndim == 4 and images.shape[3] == 1 else images
    return Source(lambda index: Image.fromarray(squeezed[index]), [f"{name}: image {i}" for i in range(len(images))], labels, classes)


def _check_labels(labels: np.ndarray, classes: tuple[str, ...], name: str) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
        raise UserError(f"{name}: labels from {labels.min()} to {labels.max()} do not fit {len(classes)} classes")
    empty = np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(f"{name}: class {classes[empty[0]]!r} has no image")


def _npz(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "images" not in file:
                raise UserError(f"{path}: no array `images` (found: {', '.join(file.files)})")
            images = file["images"]
            labels = file["labels"] if "labels" in file else np.zeros(len(images), np.int64)
            names = tuple(str(c) for c in file["classes"]) if "classes" in file else None
    except (OSError, ValueError, EOFError, KeyError) as error:
        told = "images of mixed sizes, or objects; one uint8 array is needed" if "allow_pickle" in str(error) or "pickle" in str(error) else str(error)
        raise UserError(f"{path}: not readable as npz: {told}") from None
    if names is None and labels.dtype.kind in "iu" and len(labels):
        names = tuple(str(i) for i in range(int(labels.max()) + 1))
    return from_arrays(images, labels, names or ("all",), str(path))


def _folder(path: Path) -> Source:
    root = path / "train" if (path / "train").is_dir() else path
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    if not folders:
        raise UserError(f"{root}: expected a sub-folder of images for each class")
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        inside = sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(f"{folder}: class {folder.name!r} has no image")
        files += inside
        labels += [label] * len(inside)
    return Source(lambda index: Image.open(files[index]), files, np.array(labels), tuple(folder.name for folder in folders))


def _celeba(path: Path) -> Source:
    for root in (path / "celeba" / "img_align_celeba", path / "img_align_celeba", path):
        files = sorted(str(file) for file in root.glob("*.jpg"))
        if files:
            break
    else:
        raise UserError(f"{path}: no *.jpg of CelebA's aligned faces here, in img_align_celeba/ or in celeba/img_align_celeba/")

    def crop(image: Image.Image) -> int | None:
        return transforms.CELEBA_CROPS.get(image.size)

    return Source(lambda index: Image.open(files[index]), files, np.zeros(len(files), np.int64), ("face",), crop)


def _store(path: Path) -> Source:
    from privimage.data import store

    sidecar = store.verify(path)
    images = store.read(path, np.arange(sidecar.count)).transpose(0, 2, 3, 1)
    return from_arrays(images, store.labels(path), sidecar.classes, str(path))


def _torchvision(kind: str, path: Path, split: Split) -> Source:
    from torchvision import datasets

    maker = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[kind]
    try:
        try:
            found = maker(str(path), train=split == "train")
        except RuntimeError:
            found = maker(str(path), train=split == "train", download=True)
    except Exception as error:  # torchvision raises many kinds: no network, no space, damaged archives
        raise UserError(f"{path}: {kind} is not there and cannot be downloaded ({error}); unpack it there, or use kind npz or folder") from None
    return from_arrays(np.asarray(found.data), np.asarray(found.targets), tuple(found.classes), f"{path} ({kind})")


def _digits(split: Split) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    chosen = np.sort(order[:1437] if split == "train" else order[1437:])
    return from_arrays(images[chosen], digits.target[chosen], tuple("0123456789"), "UCI digits")
