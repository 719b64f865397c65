"""Small image sets for the tests of the data plane."""

import atexit
import os
import secrets
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from privimage.config import Config
from privimage.data.decode import Source
from privimage.data.private_store import ImageSet, open_set
from privimage.data.request import Split
from privimage.data.sources import open_sensitive
from privimage.data.transforms import Form
from privimage.distributed.world import ALONE


def numbered(count: int, resolution: int = 8, channels: int = 1) -> np.ndarray:
    """Images uint8 (N, H, W, C) of noise, of which the first two pixels say which one it is."""
    images = np.random.default_rng(0).integers(
        0, 256, (count, resolution, resolution, channels), dtype=np.uint8
    )
    images[:, 0, 0], images[:, 0, 1] = (np.arange(count) // 256)[:, None], (np.arange(count) % 256)[:, None]
    return images


def numbers(images: np.ndarray) -> np.ndarray:
    """Which of `numbered` the images (N, C, H, W) are."""
    return images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]


def source_of(images: np.ndarray, labels: np.ndarray) -> Source:
    """A source of images (N, H, W, C) with classes named by letters."""
    squeezed = images[..., 0] if images.shape[3] == 1 else images
    classes = tuple(chr(ord("a") + i) for i in range(int(labels.max()) + 1))
    return Source(squeezed, Image.fromarray, [f"image {i}" for i in range(len(images))], labels, classes)


def read(
    source: Source,
    resolution: int = 8,
    channels: int = 1,
    workers: int = 0,
    form: Form | None = None,
    skip_bad: bool = False,
) -> ImageSet:
    """A source as a run decodes it, into a folder that is gone when this process ends."""
    folder, form = Path(scratch(), secrets.token_hex(8)), form or Form(resolution, channels)
    return _in_memory(open_set(folder, {"stamp": []}, lambda: source, form, workers, ALONE, "read", skip_bad))


def read_sensitive(config: Config, split: Split) -> ImageSet:
    """One split of the sensitive set of a configuration, decoded into such a folder."""
    return _in_memory(open_sensitive(config, split, ALONE, Path(scratch(), secrets.token_hex(8))))


def _in_memory(found: ImageSet) -> ImageSet:
    return replace(found, images=found.images[:])


@cache
def scratch() -> str:
    """A folder of this process."""
    folder = tempfile.mkdtemp(prefix="privimage-sets-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def linked_folder(root: Path) -> Path:
    """A folder of 2,000 PNG files of 400x300 in three classes: links to 30 different ones, to save disk."""
    images = np.random.default_rng(0).integers(0, 256, (30, 300, 400, 3), dtype=np.uint8)
    different = sorted(save_folder(root / "some", images, np.arange(30) % 3).rglob("*.png"))
    for number in range(2000):
        kind = root / "set" / "abc"[number % 3]
        kind.mkdir(parents=True, exist_ok=True)
        os.link(different[number % 30], kind / f"{number:05d}.png")
    return root / "set"


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray, **more: np.ndarray) -> Path:
    """An .npz as users bring it."""
    np.savez(path, images=images, labels=labels, **more)
    return path


def save_folder(path: Path, images: np.ndarray, labels: np.ndarray, suffix: str = ".png") -> Path:
    """The same as a folder with a sub-folder for each class."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = path / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(place / f"{i:04d}{suffix}")
    return path
