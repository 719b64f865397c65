"""A store is written whole or not at all, is read as it was written, and damage is seen before its pixels
are.
"""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_sets import numbered, source_of
from PIL import Image

from privimage.data import beton, shards, store
from privimage.data.decode import Source
from privimage.data.transforms import Form
from privimage.errors import UserError

IMAGES = numbered(300, channels=3)
LABELS = np.random.default_rng(1).integers(0, 5, 300)


@pytest.fixture(params=[".npy", ".beton"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where to write a store of each format."""
    if request.param == ".beton" and (missing := beton.ffcv_missing()):
        pytest.skip(missing)
    return tmp_path / f"set{request.param}"


def written(path: Path, workers: int = 0) -> store.Sidecar:
    return store.write(source_of(IMAGES, LABELS), path, Form(8, 3), workers)


def with_bad(bad: set[int], labels: np.ndarray = LABELS) -> Source:
    """A source of which some images do not decode."""
    items = [None if index in bad else image for index, image in enumerate(IMAGES)]
    return Source(items, opened, source_of(IMAGES, labels).names, labels, source_of(IMAGES, labels).classes)


def opened(image: np.ndarray | None) -> Image.Image:
    if image is None:
        raise ValueError("broken")
    return Image.fromarray(image)


def test_images_and_labels_come_back(path: Path) -> None:
    sidecar = written(path)
    assert store.verify(path) == sidecar
    assert (sidecar.count, sidecar.shape, sidecar.classes) == (300, (3, 8, 8), tuple("abcde"))
    wanted = np.array([299, 0, 17, 17, 256])
    assert (store.read(path, wanted) == IMAGES[wanted].transpose(0, 3, 1, 2)).all()
    assert (store.labels(path) == LABELS).all() and store.labels(path).dtype == np.int64


def test_ffcv_reads_what_was_written(tmp_path: Path) -> None:
    """Images that fill more than one of FFCV's pages, read by its own loader as its documentation has it."""
    if missing := beton.ffcv_missing():
        pytest.skip(missing)
    from ffcv.loader import Loader, OrderOption

    images = np.random.default_rng(0).integers(0, 256, (90, 120, 120, 3), dtype=np.uint8)
    store.write(source_of(images, np.arange(90) % 7), tmp_path / "set.beton", Form(120, 3), 0)
    read = [
        (image.numpy().copy(), label.numpy().copy())
        for image, label in Loader(
            str(tmp_path / "set.beton"), 10, num_workers=1, order=OrderOption.SEQUENTIAL
        )
    ]
    assert (np.concatenate([image for image, _ in read]) == images.transpose(0, 3, 1, 2)).all()
    assert (np.concatenate([label for _, label in read])[:, 0] == np.arange(90) % 7).all()


def test_workers_do_not_change_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 8)  # more parts than processes
    alone = written(path)
    assert written(path.with_stem("again"), workers=3).sha256 == alone.sha256


def test_the_first_bad_image_is_named_and_nothing_is_lost(path: Path) -> None:
    before = written(path)
    with pytest.raises(UserError, match=r"^image 70: not readable as an image \(broken\)$"):
        store.write(with_bad({70, 200}), path, Form(8, 3), 2)
    assert store.verify(path) == before
    beside = {file.name for file in path.parent.iterdir()} - {f".{path.name}.parts"}
    assert beside == {path.name, f"{path.name}.json"}


def test_bad_images_are_skipped_and_counted_when_that_was_asked_for(
    path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = {0, 70, 299}
    sidecar = store.write(with_bad(bad), path, Form(8, 3), 2, skip_bad=True)
    kept = np.setdiff1d(np.arange(300), list(bad))
    assert sidecar.count == 297
    assert (store.labels(path) == LABELS[kept]).all()
    assert (store.read(path, np.arange(297)) == IMAGES[kept].transpose(0, 3, 1, 2)).all()
    told = capsys.readouterr().err.replace("\n", " ")
    assert "3 of 300" in told and "image 0" in told


def test_a_class_whose_images_are_all_bad_is_told(path: Path) -> None:
    labels = np.where(np.arange(300) == 5, 1, 0)
    with pytest.raises(UserError, match="class 'b'"):
        store.write(with_bad({5}, labels), path, Form(8, 3), 0, skip_bad=True)
    assert not path.exists()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB; what is written beyond is cut off or refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(path: Path, small_disk: None) -> None:
    many = numbered(2000, channels=3)
    with pytest.raises(UserError, match=r"could not be written"):
        store.write(source_of(many, np.zeros(2000, int)), path, Form(8, 3), 0)
    assert [file.name for file in path.parent.iterdir()] == [f".{path.name}.parts"]


def test_a_page_that_ffcv_wrote_in_part_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := beton.ffcv_missing():
        pytest.skip(missing)
    from ffcv.memory_allocator import MemoryAllocator

    whole = MemoryAllocator.flush_page

    def cut(self: MemoryAllocator) -> None:
        whole(self)
        if self.my_page >= 0:
            self.fp.truncate(self.offset + 4096)

    monkeypatch.setattr(MemoryAllocator, "flush_page", cut)
    with pytest.raises(UserError, match="No space left"):
        written(tmp_path / "set.beton")


def flip_a_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [3, 4096, -1])
def test_an_altered_store_is_refused(path: Path, at: int) -> None:
    written(path)
    store.verify(path)
    flip_a_bit(path, at)
    with pytest.raises(UserError, match=f"^{path}: altered"):
        store.verify(path)


def test_a_truncated_store_is_refused(path: Path) -> None:
    size = written(path).size
    with open(path, "rb+") as file:
        file.truncate(size - 20_000)
    with pytest.raises(UserError, match=f"^{path}: truncated or altered .{size - 20_000} bytes, {size}"):
        store.verify(path)


@pytest.mark.parametrize(
    "sidecar",
    [
        None,
        "{",
        "[]",
        '{"count": 3}',
        json.dumps({"count": "many", "shape": [1], "classes": [], "size": 1, "sha256": ""}),
    ],
)
def test_a_store_without_a_sound_sidecar_is_refused(path: Path, sidecar: str | None) -> None:
    written(path)
    beside = path.with_name(f"{path.name}.json")
    if sidecar is None:
        beside.unlink()
    else:
        beside.write_text(sidecar)
    with pytest.raises(UserError, match=f"{path.name}.json"):
        store.verify(path)


def test_a_missing_store(path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        store.verify(path)


def test_without_ffcv_the_message_names_what_is_missing_and_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ffcv", None)
    with pytest.raises(UserError, match=r"FFCV's compiled part.*data\.store=npy"):
        written(tmp_path / "set.beton")
    assert written(tmp_path / "set.npy").count == 300


def test_a_store_of_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.beton or \.npy"):
        written(tmp_path / "set.bin")
