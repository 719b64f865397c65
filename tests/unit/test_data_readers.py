"""Sets are read as they are, whatever the kind; what is wrong with one is told in one line that names it."""

import dataclasses
import gzip
import io
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from data_sets import numbered, read, read_sensitive, save_folder, save_npz, source_of
from PIL import Image
from ranks import TINY

from privimage import torchvision_operators
from privimage.config import Config, load
from privimage.data import shards, store
from privimage.data.decode import Decoder, Source
from privimage.data.private_store import ImageSet
from privimage.data.readers import open_source
from privimage.data.sources import form, has_test_split, open_sensitive, sensitive_source
from privimage.data.transforms import Form
from privimage.distributed.world import ALONE
from privimage.errors import UserError

LABELS = np.arange(30) % 3


def opened(
    kind: str,
    path: Path | None,
    resolution: int = 8,
    channels: int = 1,
    labelled: bool = True,
    workers: int = 0,
) -> ImageSet:
    return read(open_source(kind, path, "train", labelled), resolution, channels, workers)


def pairs(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    """The images (N, C, H, W) with their labels, in an order that does not depend on theirs."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def holds(found: ImageSet, images: np.ndarray, labels: np.ndarray) -> bool:
    """Whether a set is made of images (N, H, W, C) with these labels, in whatever order."""
    return pairs(found.images, found.labels) == pairs(images.transpose(0, 3, 1, 2), labels)


def told(kind: str, path: Path | None, **more) -> str:
    """The message that a bad set ends in."""
    with pytest.raises(UserError) as caught:
        opened(kind, path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_and_folder_hold_the_same_images(tmp_path: Path, channels: int) -> None:
    images = numbered(30, channels=channels)
    from_npz = opened(
        "npz",
        save_npz(tmp_path / "set.npz", images, LABELS, classes=np.array(["x", "y", "z"])),
        channels=channels,
    )
    from_folder = opened("folder", save_folder(tmp_path / "set", images, LABELS), channels=channels)
    assert holds(from_npz, images, LABELS)
    assert (from_folder.images == from_npz.images).all() and (from_folder.labels == from_npz.labels).all()
    assert from_npz.classes == ("x", "y", "z") and from_folder.classes == ("class0", "class1", "class2")
    assert from_folder.fingerprint == from_npz.fingerprint


def test_grey_npz_without_a_channel_axis(tmp_path: Path) -> None:
    images = numbered(30)
    assert holds(opened("npz", save_npz(tmp_path / "set.npz", images[..., 0], LABELS)), images, LABELS)


def test_grey_and_colour_are_made_from_each_other(tmp_path: Path) -> None:
    grey = opened("npz", save_npz(tmp_path / "grey.npz", numbered(30), LABELS), channels=3).images
    assert grey.shape == (30, 3, 8, 8) and (grey[:, :1] == grey).all()
    white = np.full((3, 8, 8, 3), 255, np.uint8)
    assert (opened("npz", save_npz(tmp_path / "white.npz", white, np.arange(3))).images == 255).all()


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    """Order, resolution, labels, workers do not matter; a changed pixel, a missing or doubled image do."""
    images, shuffled = numbered(30, resolution=16), np.random.default_rng(1).permutation(30)
    content = read(source_of(images, LABELS), 16, 1, 0).fingerprint
    assert read(source_of(images[shuffled], LABELS), 8, 3, 0).fingerprint == content
    assert read(source_of(images, LABELS), 16, 1, 2).fingerprint == content
    changed = images.copy()
    changed[17, 5, 5] ^= 1
    others = [changed, images[:29], np.concatenate([images, images[:1]]), images.reshape(30, 8, 32, 1)]
    fingerprints = {
        read(source_of(other, np.arange(len(other)) % 3), 8, 1, 0).fingerprint for other in others
    }
    assert len(fingerprints | {content}) == 5


def test_workers_change_neither_images_nor_order() -> None:
    images, labels = numbered(300), np.arange(300) % 3
    alone, shared = (read(source_of(images, labels), 8, 1, workers) for workers in (0, 3))
    assert (
        (alone.images == shared.images).all()
        and (alone.labels == shared.labels).all()
        and holds(alone, images, labels)
    )


def test_the_order_is_that_of_the_content_then_of_the_label() -> None:
    """Two nodes whose file systems list in another order have the same set.

    One label more or less is another content.
    """
    images, shuffled = numbered(30), np.random.default_rng(1).permutation(30)
    images[1] = images[0]  # with the labels 0 and 1
    first, other = (
        read(source_of(images, LABELS), 8, 1, 0),
        read(source_of(images[shuffled], LABELS[shuffled]), 8, 1, 0),
    )
    assert (
        (first.images == other.images).all()
        and (first.labels == other.labels).all()
        and first.content == other.content
    )
    relabelled = np.where(np.arange(30) == 7, (LABELS + 1) % 3, LABELS)
    renamed = read(dataclasses.replace(source_of(images, LABELS), classes=("u", "v", "w")), 8, 1, 0)
    contents = {
        first.content,
        read(source_of(images, relabelled), 8, 1, 0).content,
        read(source_of(images[1:], LABELS[1:]), 8, 1, 0).content,
        renamed.content,
    }
    assert len(contents) == 4


def test_train_and_test_below_one_folder(tmp_path: Path, tiny_config: Config) -> None:
    images = numbered(30)
    for kind, save in (("folder", save_folder), ("npz", save_npz)):
        for split, part in (("train", slice(0, 21)), ("test", slice(21, 30))):
            (tmp_path / kind).mkdir(exist_ok=True)
            save(tmp_path / kind / (split + (".npz" if kind == "npz" else "")), images[part], LABELS[part])
        config = with_sensitive(tiny_config, kind=kind, path=tmp_path / kind, classes=3)
        assert has_test_split(config)
        assert (
            len(read_sensitive(config, "train").images) == 21
            and len(read_sensitive(config, "test").images) == 9
        )
        elsewhere = with_sensitive(
            tiny_config, kind="folder", path=tmp_path / "folder" / "train", test_path=tmp_path / kind
        )
        if kind == "folder":
            assert len(read_sensitive(elsewhere, "test").images) == 9


def with_sensitive(config: Config, **settings) -> Config:
    sensitive = config.data.sensitive.model_copy(update=settings)
    return config.model_copy(update={"data": config.data.model_copy(update={"sensitive": sensitive})})


def test_training_images_are_never_taken_for_held_out_ones(tmp_path: Path, tiny_config: Config) -> None:
    path = save_npz(tmp_path / "set.npz", numbered(30), LABELS)
    store.write(source_of(numbered(30), LABELS), tmp_path / "set.npy", Form(8, 1), 0)
    for kind, place in (
        ("npz", path),
        ("folder", save_folder(tmp_path / "set", numbered(30), LABELS)),
        ("beton", tmp_path / "set.npy"),
    ):
        config = with_sensitive(tiny_config, kind=kind, path=place)
        assert not has_test_split(config)
        with pytest.raises(UserError, match=r"data\.sensitive\.test_path"):
            read_sensitive(config, "test")
        if kind != "beton":
            with pytest.raises(UserError, match="has no test"):
                open_source(kind, place, "test")


@pytest.mark.parametrize(("key", "value"), [("count", 31), ("classes", 4)])
def test_data_that_contradict_what_was_stated_are_refused(
    tmp_path: Path, tiny_config: Config, key: str, value: int
) -> None:
    path = save_npz(tmp_path / "set.npz", numbered(30), LABELS, classes=np.array(NAMES))
    config = with_sensitive(tiny_config, kind="npz", path=path, **{key: value})
    with pytest.raises(UserError, match=f"data.sensitive.{key}: {value}"):
        read_sensitive(config, "train")


NAMES = ["x", "y", "z"]


def unnamed(kind: str, folder: Path, labels: np.ndarray) -> Path:
    """A set that does not name its classes."""
    folder.mkdir(exist_ok=True)
    images = numbered(len(labels))
    if kind == "npz":
        return save_npz(folder / "set.npz", images, labels)
    was = open_source("npz", save_npz(folder / "was.npz", images, labels), "train")
    store.write(was, folder / "set.npy", Form(8, 1), 0)
    return folder / "set.npy"


@pytest.mark.parametrize("kind", ["npz", "beton"])
def test_sensitive_classes_are_never_counted_from_the_labels(
    tmp_path: Path, tiny_config: Config, kind: str
) -> None:
    """Otherwise the only image of the last class would decide how many classes are released."""
    without_the_last = LABELS[LABELS < 2]
    for name, labels in (("all", LABELS), ("fewer", without_the_last)):
        path = unnamed(kind, tmp_path / name, labels)
        with pytest.raises(UserError, match=r"data\.sensitive\.classes: needed, since .*set\.np"):
            read_sensitive(with_sensitive(tiny_config, kind=kind, path=path), "train")
        found = read_sensitive(with_sensitive(tiny_config, kind=kind, path=path, classes=3), "train")
        assert found.classes == ("0", "1", "2") and holds(found, numbered(len(labels)), labels)
    with pytest.raises(UserError, match=r"labels from 0 to 2 do not fit 2 classes"):
        read_sensitive(
            with_sensitive(tiny_config, kind=kind, path=unnamed(kind, tmp_path, LABELS), classes=2), "train"
        )
    assert read_sensitive(
        with_sensitive(tiny_config, kind=kind, path=path, labelled=False), "train"
    ).classes == ("all",)


def test_a_sensitive_class_that_is_named_may_have_no_image(tmp_path: Path, tiny_config: Config) -> None:
    path = save_folder(tmp_path / "set", numbered(30), LABELS)
    (path / "class1b").mkdir()
    found = read_sensitive(with_sensitive(tiny_config, kind="folder", path=path), "train")
    assert found.classes == ("class0", "class1", "class1b", "class2") and np.bincount(
        found.labels
    ).tolist() == [10, 10, 0, 10]
    path = save_npz(tmp_path / "set.npz", numbered(30), LABELS, classes=np.array([*NAMES, "w"]))
    assert read_sensitive(with_sensitive(tiny_config, kind="npz", path=path), "train").classes == (
        *NAMES,
        "w",
    )
    (tmp_path / "bare" / "class0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"bare: holds no image"):
        read_sensitive(with_sensitive(tiny_config, kind="folder", path=tmp_path / "bare"), "train")


def test_held_out_images_have_the_labels_of_the_classes_of_their_names(
    tmp_path: Path, tiny_config: Config
) -> None:
    train = save_folder(tmp_path / "train", numbered(30), LABELS)
    test = save_folder(tmp_path / "test", numbered(30), LABELS)
    (test / "class0").rename(tmp_path / "taken away")
    config = with_sensitive(tiny_config, kind="folder", path=train, test_path=test)
    held_out = read_sensitive(config, "test")
    assert held_out.classes == ("class0", "class1", "class2") and set(held_out.labels) == {1, 2}
    (test / "class1").rename(test / "other")
    with pytest.raises(
        UserError, match=rf"data\.sensitive\.test_path: {test}: its class 'other' is no class of the training"
    ):
        read_sensitive(config, "test")


def test_held_out_arrays_are_counted_by_the_names_of_the_training_images(
    tmp_path: Path, tiny_config: Config
) -> None:
    train = save_npz(tmp_path / "train.npz", numbered(30), LABELS, classes=np.array(NAMES))
    for name, labels, classes in (("turned", 2 - LABELS, NAMES[::-1]), ("bare", LABELS, None)):
        more = {} if classes is None else {"classes": np.array(classes)}
        test = save_npz(tmp_path / f"{name}.npz", numbered(30), labels, **more)
        found = read_sensitive(with_sensitive(tiny_config, kind="npz", path=train, test_path=test), "test")
        assert found.classes == tuple(NAMES) and holds(found, numbered(30), LABELS)
    twice = save_npz(tmp_path / "twice.npz", numbered(30), LABELS, classes=np.array(["x", "x", "z"]))
    with pytest.raises(UserError, match=r"its class 'x' is not one class of the training"):
        read_sensitive(with_sensitive(tiny_config, kind="npz", path=train, test_path=twice), "test")


def test_a_set_without_labels_is_one_class(tmp_path: Path) -> None:
    images = numbered(30)
    np.savez(tmp_path / "set.npz", images=images)
    flat = save_folder(tmp_path / "flat", images, np.zeros(30, int)) / "class0"
    for kind, path in (("npz", tmp_path / "set.npz"), ("folder", flat), ("folder", flat.parent)):
        found = opened(kind, path, labelled=False)
        assert found.classes == ("all",) and (found.labels == 0).all() and len(found.images) == 30


def test_digits_are_divided_for_good() -> None:
    train, test = (read(open_source("digits", None, split), 8, 1, 0) for split in ("train", "test"))
    assert (len(train.images), len(test.images)) == (1437, 360)
    assert set(np.unique(test.images)) <= {round(v * 255 / 16) for v in range(17)}
    assert test.fingerprint.startswith("1e1244da57792017"), "the held-out digits are others than before"
    assert (np.bincount(test.labels) >= 25).all()


def test_mnist_as_torchvision_keeps_it(tmp_path: Path, shared_data: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (shared_data / "mnist").glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    source = open_source("mnist", tmp_path, "test")
    assert len(source) == 10_000 and len(source.classes) == 10
    assert np.bincount(source.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_a_set_that_is_not_there_and_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_operators.declare()
    from torchvision import datasets

    def refused(*arguments) -> None:
        raise RuntimeError("no way out\nof here")

    monkeypatch.setattr(datasets.CIFAR10, "download", refused)
    assert told("cifar10", tmp_path / "nothing") == (
        f"{tmp_path / 'nothing'}: cifar10 is not there as torchvision keeps it, and cannot be "
        "downloaded (no way out)"
    )


def test_faces_are_cropped_and_others_named(tmp_path: Path) -> None:
    place = tmp_path / "img_align_celeba"
    place.mkdir()
    face = np.zeros((109, 89, 3), np.uint8)
    face[19:89, 9:79] = 255  # the 70x70 at the centre
    Image.fromarray(face).save(place / "000001.jpg", quality=100)
    assert (opened("celeba", tmp_path, resolution=32, channels=3, labelled=False).images > 250).all()
    Image.new("RGB", (64, 64)).save(place / "000002.jpg")
    assert "000002.jpg" in told("celeba", tmp_path, resolution=32, channels=3) and "64x64" in told(
        "celeba", tmp_path
    )


@pytest.mark.parametrize("kind", ["folder", "npz", "beton"])
def test_a_missing_path(tmp_path: Path, kind: str) -> None:
    assert told(kind, tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such file or folder"


@pytest.mark.parametrize(
    ("arrays", "names"),
    [
        ({"images": numbered(30), "labels": LABELS[:29]}, "30 images"),
        ({"images": numbered(30), "labels": LABELS + 0.5}, "label 0.5 of image 0"),
        ({"images": numbered(30), "labels": LABELS - 1}, "from -1 to 1"),
        ({"images": numbered(30), "labels": LABELS, "classes": np.array(["x", "y"])}, "2 classes"),
        (
            {"images": numbered(30), "labels": LABELS, "classes": np.array(["x", "y", "z", "w"])},
            "class 'w' has no image",
        ),
        ({"images": numbered(30), "labels": np.where(LABELS == 1, 2, LABELS)}, "class '1' has no image"),
        ({"images": numbered(30).astype(np.float32), "labels": LABELS}, "float32"),
        ({"images": numbered(30).reshape(30, 2, 4, 8), "labels": LABELS}, "(30, 2, 4, 8)"),
        ({"images": np.empty((0, 8, 8), np.uint8), "labels": np.empty(0, int)}, "no image"),
        ({"pictures": numbered(30), "labels": LABELS}, "no array 'images'"),
        ({"images": numbered(30)}, "no array 'labels'"),
    ],
)
def test_an_npz_that_does_not_fit_together(tmp_path: Path, arrays: dict, names: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    message = told("npz", tmp_path / "set.npz")
    assert str(tmp_path / "set.npz") in message and names in message


def test_images_of_mixed_sizes(tmp_path: Path) -> None:
    mixed = np.empty(2, object)
    mixed[:] = [np.zeros((8, 8), np.uint8), np.zeros((9, 9), np.uint8)]
    np.savez(tmp_path / "set.npz", images=mixed, labels=np.arange(2), allow_pickle=True)
    assert "mixed sizes" in told("npz", tmp_path / "set.npz")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"not a zip",
        lambda data: data[:300] + bytes(200) + data[500:],
    ],
    ids=["half", "text", "hole"],
)
def test_a_damaged_npz(tmp_path: Path, damage) -> None:
    path = save_npz(tmp_path / "set.npz", numbered(30), LABELS)
    path.write_bytes(damage(path.read_bytes()))
    assert told("npz", path).startswith(f"{path}: not readable as npz")


def test_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    assert "not readable (File name too long)" in told("folder", tmp_path / ("long" * 100))


def test_a_folder_without_classes_and_one_with_an_empty_class(tmp_path: Path) -> None:
    path = save_folder(tmp_path / "set", numbered(30), LABELS)
    assert "sub-folder" in told("folder", path / "class0")
    (path / "class9").mkdir()
    assert "class 'class9' has no image" in told("folder", path)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbered(1, 64, 3)[0]).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", jpeg()[:600], b"\x89PNG\r\n\x1a\n" + bytes(40)],
    ids=["empty", "text", "cut off", "head of a PNG"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, content: bytes, workers: int) -> None:
    path = save_folder(tmp_path / "set", numbered(30), LABELS)
    (path / "class1" / "zz.jpg").write_bytes(content)
    assert str(path / "class1" / "zz.jpg") in told("folder", path, workers=workers)


def deadly(number: int) -> Image.Image:
    """An image; the process that opens number 100 is killed."""
    if number == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return Image.new("L", (8, 8))


def test_a_worker_that_is_killed_ends_the_reading() -> None:
    source = Source(list(range(300)), deadly, ["image"] * 300, np.zeros(300, int), ("all",))
    with pytest.raises(UserError, match="killed"):
        read(source, 8, 1, 2)


def test_groups_of_images_are_read_from_an_array(tmp_path: Path, tiny_config: Config) -> None:
    patients = np.arange(30) // 4
    path = save_npz(tmp_path / "set.npz", numbered(30), LABELS, classes=np.array(NAMES), patient=patients)
    config = with_sensitive(tiny_config, kind="npz", path=path, group="patient")
    assert sensitive_source(config, "train").groups == [str(patient) for patient in patients]
    assert sensitive_source(with_sensitive(config, group=None), "train").groups is None
    with pytest.raises(UserError, match=r"set.npz: no array 'person' \(found: images, labels, classes"):
        sensitive_source(with_sensitive(config, group="person"), "train")
    short = save_npz(
        tmp_path / "short.npz", numbered(30), LABELS, classes=np.array(NAMES), patient=patients[:9]
    )
    with pytest.raises(UserError, match=r"short.npz: 30 images need as many groups; found \(9,\)"):
        sensitive_source(with_sensitive(config, path=short), "train")
    with pytest.raises(UserError, match=r"data\.sensitive\.group: kind digits"):
        sensitive_source(with_sensitive(config, kind="digits"), "train")


def test_a_set_that_is_read_otherwise_is_decoded_again(tmp_path: Path, tiny_config: Config) -> None:
    """What is kept of a set is named by every setting that changes its pixels."""
    path = save_folder(tmp_path / "set", numbered(30), LABELS)
    transparent = np.arange(8 * 12 * 4).reshape(8, 12, 4) % 251
    Image.fromarray(transparent.astype(np.uint8)).save(path / "class0" / "wide.png")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path / "class0" / "deep.png")
    config = with_sensitive(tiny_config, kind="folder", path=path)
    contents = []
    for change in ({}, {"window": (0, 50_000)}, {"background": (0, 0, 0)}, {"fit": "squash"}, {"fit": "pad"}):
        data = config.data.model_copy(update={"window": (0, 65_535)} | change)
        other = config.model_copy(update={"data": data})
        contents.append(open_sensitive(other, "train", ALONE, tmp_path / "kept").content)
        # Parts that a kill left behind are of one form only.
        source = sensitive_source(other, "train")
        shards.decode(
            source, tmp_path / "kept" / "train.parts", Decoder(source, form(other)), 0, ALONE, "read"
        )
        (tmp_path / "kept" / "train" / "set.json").unlink()
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("data.window=[5, 1]", "data.window: the first value must be smaller than the second"),
        ("data.window=auto", "data.window: input should be a valid tuple, not 'auto'"),
        ("data.background=[0, 0, 256]", "data.background.2: input should be less than or equal to 255"),
        ("data.fit=stretch", "data.fit: input should be 'crop', 'pad' or 'squash'"),
        ("data.sensitive.classes=[a, b, a]", "data.sensitive.classes: a list of names, each once"),
        ("data.sensitive.classes=0", "data.sensitive.classes: input should be greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load(TINY, [setting])
    assert "\n" not in str(caught.value)
