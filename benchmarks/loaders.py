"""Images a second.

The public stream (FFCV) against torchvision's ImageFolder and DataLoader on the same 20,000 JPEGs of 32x32.

    python benchmarks/loaders.py [--images FOLDER] [--rounds 7] [--workers 2]

FOLDER has a sub-folder of images for each class; without it, rendered characters are used. Both deliver
shuffled batches of float32 in [-1, 1] with labels. Epochs of the two alternate in one run, after a first one
of each that is not counted (FFCV compiles in it).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from privimage import torchvision_operators
from privimage.data import store
from privimage.data.glyphs import character_classes, glyph_source
from privimage.data.readers import open_source
from privimage.data.stream import PublicStream
from privimage.data.transforms import Form
from privimage.models.edm import to_unit

RESOLUTION = 32


def as_jpegs(images: Path | None, folder: Path, count: int) -> None:
    """Write `count` images of the set as 32x32 JPEGs in class sub-folders."""
    source = (
        open_source("folder", images, "train")
        if images
        else glyph_source(RESOLUTION, -(-count // len(character_classes())))
    )
    for position in range(count):
        index = position * len(source) // count
        pixels, _ = source.image(index, Form(RESOLUTION, 3))
        place = folder / f"{source.labels[index]:04d}"
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(place / f"{position:05d}.jpg", quality=90)


def stream_epoch(path: Path, batch_size: int, workers: int) -> Callable[[], int]:
    """An epoch of the public stream; returns the number of images."""
    labels = store.labels(path)
    stream = PublicStream(path, range(len(labels)), labels, batch_size, 0, 1, torch.device("cpu"), 0, workers)
    batches = stream.batches()

    def epoch() -> int:
        seen = 0
        while seen < len(labels):
            images, targets = next(batches)
            to_unit(images)
            seen += len(targets)
        return seen

    return epoch


def torchvision_epoch(folder: Path, batch_size: int, workers: int) -> Callable[[], int]:
    """An epoch of ImageFolder, as its documentation has it; returns the number of images."""
    torchvision_operators.declare()
    from torchvision import datasets, transforms

    to_float = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    dataset = datasets.ImageFolder(str(folder), to_float)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: sum(len(targets) for _, targets in loader)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder with a sub-folder of images for each class")
    parser.add_argument("--count", type=int, default=20_000, help="images (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="of each of the two (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted epochs of each (default %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place, "jpegs"), Path(place, "images.beton")
        folder.mkdir()
        as_jpegs(given.images, folder, given.count)
        store.write(open_source("folder", folder, "train"), path, Form(RESOLUTION, 3), given.workers)
        epochs = {
            "ImageFolder": torchvision_epoch(folder, given.batch_size, given.workers),
            "stream": stream_epoch(path, given.batch_size, given.workers),
        }
        rates: dict[str, list[float]] = {name: [] for name in epochs}
        for _ in range(1 + given.rounds):
            for name, epoch in epochs.items():
                begun = time.perf_counter()
                rates[name].append(epoch() / (time.perf_counter() - begun))
    print(
        f"{given.count} JPEGs of {RESOLUTION}x{RESOLUTION}, batches of {given.batch_size}, {given.workers} "
        f"workers, {given.rounds} rounds"
    )
    for name, (first, *rest) in rates.items():
        print(
            f"{name:12} first epoch {first:9,.0f} images/s   later, median {statistics.median(rest):9,.0f}  "
            f" from {min(rest):,.0f} to {max(rest):,.0f}"
        )
    print(
        "ratio of the medians "
        f"{statistics.median(rates['stream'][1:]) / statistics.median(rates['ImageFolder'][1:]):.1f} (goal: "
        "at least 8)"
    )


if __name__ == "__main__":
    main()
