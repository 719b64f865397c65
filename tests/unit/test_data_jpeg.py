"""Large images are kept as JPEGs: the same labels and order, nearly the same pixels, far fewer bytes."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import source_of
from PIL import Image

from privimage.data import beton, shards, store
from privimage.data.decode import Source
from privimage.data.stream import PublicStream
from privimage.data.transforms import Form
from privimage.errors import UserError

COUNT, SIDE = 70, store.JPEG_FROM


def smooth(channels: int) -> np.ndarray:
    """Images uint8 (COUNT, SIDE, SIDE, channels) that change slowly, as photographs do."""
    coarse = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, channels), dtype=np.uint8)
    mode, size = "L" if channels == 1 else "RGB", (SIDE, SIDE)
    large = [
        Image.fromarray(image.squeeze(), mode).resize(size, Image.Resampling.BICUBIC) for image in coarse
    ]
    return np.stack([np.asarray(image).reshape(SIDE, SIDE, channels) for image in large])


LABELS = np.arange(COUNT) % 7


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A store, and its images uint8 (N, C, H, W) before they became JPEGs."""
    if missing := beton.ffcv_missing():
        pytest.skip(missing)
    path, images = tmp_path_factory.mktemp("jpeg") / "set.beton", smooth(request.param)
    store.write(source_of(images, LABELS), path, Form(SIDE, request.param), 0)
    return path, images.transpose(0, 3, 1, 2)


def test_images_are_nearly_what_they_were(made: tuple[Path, np.ndarray]) -> None:
    path, images = made
    which = np.array([69, 0, 17, 17, 33])
    error = np.abs(store.read(path, which).astype(int) - images[which])
    assert error.mean() < 2 and error.max() < 30
    assert (store.labels(path) == LABELS).all()
    assert path.stat().st_size < images.nbytes / 3 + (1 << 22)  # beside two pages of FFCV's


def test_a_stream_gives_the_images_that_are_read_in_order(made: tuple[Path, np.ndarray]) -> None:
    path, _ = made
    indices = np.random.default_rng(1).permutation(COUNT)[:20]
    stream = PublicStream(path, indices, np.arange(20), 8, 0, 1, torch.device("cpu"), 5, 1)
    batches = stream.batches()
    for step, (images, labels) in enumerate(islice(batches, 4)):
        assert images.is_contiguous() and labels.tolist() == stream.positions(step).tolist()
        assert (images.numpy() == store.read(path, indices[labels])).all()
    batches.close()


def test_a_store_that_was_begun_becomes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := beton.ffcv_missing():
        pytest.skip(missing)
    monkeypatch.setattr(shards, "SHARD", 64)  # 16 images of this size
    whole = source_of(smooth(3), LABELS)
    at_once = store.write(whole, tmp_path / "set.beton", Form(SIDE, 3), 0)
    # The last image does not decode: what comes before is kept.
    begun = Source([*whole.items[:-1], None], opened, whole.names, whole.labels, whole.classes)
    with pytest.raises(UserError, match="image 69: not readable"):
        store.write(begun, tmp_path / "again.beton", Form(SIDE, 3), 0)
    read = []

    def noted(image: np.ndarray) -> Image.Image:
        read.append(image)
        return Image.fromarray(image)

    rest = Source(whole.items, noted, whole.names, whole.labels, whole.classes)
    assert store.write(rest, tmp_path / "again.beton", Form(SIDE, 3), 0) == at_once
    assert len(read) == COUNT - 64


def opened(image: np.ndarray | None) -> Image.Image:
    if image is None:
        raise ValueError("broken")
    return Image.fromarray(image)


def test_without_ffcv_and_below_the_threshold_pixels_stay_as_they_are(tmp_path: Path) -> None:
    images = smooth(3)[:5]
    assert not store.write(source_of(images, LABELS[:5]), tmp_path / "set.npy", Form(SIDE, 3), 0).jpeg
    assert (store.read(tmp_path / "set.npy", np.arange(5)) == images.transpose(0, 3, 1, 2)).all()
    if not beton.ffcv_missing():
        small, form = images[:, : SIDE - 8, : SIDE - 8], Form(SIDE - 8, 3)
        assert not store.write(source_of(small, LABELS[:5]), tmp_path / "set.beton", form, 0).jpeg
        assert (store.read(tmp_path / "set.beton", np.arange(5)) == small.transpose(0, 3, 1, 2)).all()
