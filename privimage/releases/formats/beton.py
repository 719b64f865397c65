"""FFCV's format, of raw pixels (C, H, W) and labels."""

from pathlib import Path

from privimage.data import beton, writers
from privimage.releases.formats.base import Format
from privimage.releases.synthetic import SyntheticSet


def _write(folder: Path, synthetic: SyntheticSet) -> None:
    images = synthetic.images.transpose(0, 3, 1, 2)
    beton.import_ffcv()
    with writers.writer(folder / "synthetic.beton", ".beton", len(images), images.shape[1:], False) as put:
        for image, label in zip(images, synthetic.labels, strict=True):
            put(image, int(label))


def _missing() -> str:
    return "" if beton.ffcv_installed() else "FFCV; tools/install_ffcv.sh"


BETON = Format(
    title="FFCV",
    write=_write,
    files=(r"synthetic\.beton",),
    load='from ffcv.loader import Loader\n\nloader = Loader("release/synthetic.beton", batch_size=64, '
    "drop_last=False)",
    missing=_missing,
)
