"""Images as they lie on disk: each is read, or it is told in a line what is wrong or left out."""

import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import numbered, read, save_folder, save_npz
from PIL import Image, features
from ranks import TINY
from typer.testing import CliRunner

from privimage.cli import app
from privimage.data import files
from privimage.data.private_store import ImageSet
from privimage.data.readers import holds_test_split, open_source
from privimage.data.request import Columns, Known
from privimage.data.transforms import Form
from privimage.errors import UserError

LABELS = np.arange(30) % 3
RAMP = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
CORNER = np.zeros((8, 8), bool)
CORNER[:4, :4] = True
ALPHA = np.where(CORNER, 255, 0).astype(np.uint8)


def one(name: str, save: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A folder of one class with one image."""

    def build(root: Path) -> Path:
        (root / "set" / "class0").mkdir(parents=True)
        save(root / "set" / "class0" / name)
        return root / "set"

    return build


def folder_and(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A folder of 30 good images in 3 classes, and something more."""

    def build(root: Path) -> Path:
        path = save_folder(root / "set", numbered(30), LABELS)
        change(path)
        return path

    return build


def arrays(**changes: Any) -> Callable[[Path], Path]:
    """An npz of 30 images, with some arrays replaced."""
    return lambda root: save_npz(root / "set.npz", **{"images": numbered(30), "labels": LABELS} | changes)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ALPHA).save(path, exif=exif, quality=100)


def deep(kind: type) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(RAMP.astype(kind)).save(path)


def palette(path: Path) -> None:
    image = Image.fromarray(np.where(CORNER, 0, 1).astype(np.uint8), "P")
    image.putpalette([200, 200, 200, 9, 9, 9])
    image.save(path, transparency=1)


def stacked(*channels: np.ndarray, mode: str) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(np.stack(channels, axis=2), mode).save(path)


def frames(path: Path) -> None:
    first, second = (Image.new("L", (8, 8), value) for value in (10, 240))
    first.save(path, save_all=True, append_images=[second])


def left_behind(path: Path) -> None:
    (path / "class0" / "._0.png").write_bytes(b"\0\5\x16\7")
    (path / "class0" / "Thumbs.db").write_bytes(b"x")
    (path / ".DS_Store").write_bytes(b"x")
    for place in (path / "__MACOSX", path / ".cache", path / "class1" / "__MACOSX"):
        place.mkdir()
        (place / "0.png").write_bytes(b"x")


def other_formats(path: Path) -> None:
    for suffix in (".gif", ".jp2", ".avif", ".JPG", ".pgm", ".tga"):
        Image.new("L", (8, 8), 9).convert("RGB" if suffix == ".avif" else "L").save(
            path / "class0" / f"x{suffix}"
        )


def telephone(path: Path) -> None:
    files.suffixes()  # lets Pillow write it, too
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path / "class0" / "IMG_0001.HEIC", quality=100)


def other_files(path: Path) -> None:
    for name in ("a.mov", "b.MOV", "notes.txt", "README"):
        (path / "class1" / name).write_bytes(b"x")


def loop(path: Path) -> None:
    (path / "class0" / "again").symlink_to(path / "class0", target_is_directory=True)


def packed(suffix: str) -> Callable[[Path], Path]:
    """What people give in place of a folder."""

    def build(root: Path) -> Path:
        path, inside = root / f"set{suffix}", save_folder(root / "set", numbered(30), LABELS)
        if suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted(inside.rglob("*.png")):
                    archive.write(file, file.relative_to(root))
        elif suffix == ".npy":
            np.save(path, numbered(30))
        else:
            with tarfile.open(path, "w:gz" if suffix == ".tgz" else "w") as archive:
                archive.add(inside, "set")
        return path

    return build


@dataclass(frozen=True)
class Case:
    """A set as somebody has it, and what comes of it: it is read (`holds`), or told (`told`)."""

    build: Callable[[Path], Path]
    told: str = ""
    holds: Callable[[ImageSet], bool] = lambda found: len(found.images) == 30
    notes: tuple[str, ...] = ()
    kind: str = "folder"
    form: dict = field(default_factory=dict)
    known: Known | None = None


WINDOW = {"window": (0, 63_000)}
NEED = r"not 8 bits; data\.window: \[low, high\] says"


def is_ramp(found: ImageSet) -> bool:
    return bool((found.images[0, 0] == np.rint(RAMP / 63_000 * 255)).all())


def is_opaque_in_the_corner(found: ImageSet) -> bool:
    seen = found.images[0, 0]
    return bool((seen[CORNER] == 200).all() and (seen[~CORNER] == 255).all())


def labels(names: str, numbers: np.ndarray = LABELS) -> Callable[[ImageSet], bool]:
    wanted = sorted(zip([image.tobytes() for image in numbered(30)], numbers.tolist(), strict=True))

    def holds(found: ImageSet) -> bool:
        pairs = sorted(zip([image.tobytes() for image in found.images], found.labels.tolist(), strict=True))
        return found.classes == tuple(names.split()) and pairs == wanted

    return holds


GREY200 = np.full((8, 8), 200, np.uint8)
TEN = np.arange(30) % 10
LIST = {
    "a JPEG with orientation 6": Case(
        one("0.jpg", turned), holds=lambda found: (found.images[0, 0, :4, 4:] > 250).all()
    ),
    "a 16-bit PNG": Case(one("0.png", deep(np.uint16)), told=f"0.png: its pixels are uint16, {NEED}"),
    "a 16-bit PNG and a window": Case(one("0.png", deep(np.uint16)), form=WINDOW, holds=is_ramp),
    "a 16-bit TIFF": Case(one("0.tif", deep(np.uint16)), told=f"0.tif: its pixels are uint16, {NEED}"),
    "a 16-bit TIFF and a window": Case(
        one("0.tif", deep(np.uint16)), form=WINDOW, holds=is_ramp, notes=("1 .tif: of several frames",)
    ),
    "a float TIFF": Case(one("0.tif", deep(np.float32)), told=f"0.tif: its pixels are float32, {NEED}"),
    "a float TIFF and a window": Case(
        one("0.tif", deep(np.float32)), form=WINDOW, holds=is_ramp, notes=("1 .tif: of several frames",)
    ),
    "RGBA": Case(
        one("0.png", stacked(GREY200, GREY200, GREY200, ALPHA, mode="RGBA")), holds=is_opaque_in_the_corner
    ),
    "LA": Case(one("0.png", stacked(GREY200, ALPHA, mode="LA")), holds=is_opaque_in_the_corner),
    "a palette with a transparent index": Case(one("0.png", palette), holds=is_opaque_in_the_corner),
    "what systems leave behind": Case(folder_and(left_behind)),
    "GIF, JPEG 2000, AVIF and others": Case(
        folder_and(other_formats),
        holds=lambda found: len(found.images) == 36,
        notes=("1 .gif: of several frames or pages the first is read",),
    ),
    "HEIC": Case(
        folder_and(telephone),
        holds=lambda found: (
            len(found.images) == 31 and ((found.images > 78) & (found.images < 84)).all((1, 2, 3)).any()
        ),
    ),
    "a GIF of two frames": Case(
        one("0.gif", frames), holds=lambda found: (found.images == 10).all(), notes=("1 .gif: of several",)
    ),
    "a TIFF of two pages": Case(
        one("0.tiff", frames), holds=lambda found: (found.images == 10).all(), notes=("1 .tiff: of several",)
    ),
    "files of other kinds": Case(
        folder_and(other_files), notes=("set: 4 files skipped: 2 .mov, 1 .txt, 1 without a suffix",)
    ),
    "nothing but other files": Case(
        one("a.mov", lambda path: path.write_bytes(b"x")),
        told="class0' has no image .1 file skipped: 1 .mov",
    ),
    "a link to nothing": Case(
        folder_and(lambda path: (path / "class1" / "z.png").symlink_to("gone.png")),
        told=r"class1/z\.png: not readable as an image \(a link to a file that is not there\)",
    ),
    "a link to a folder above": Case(folder_and(loop)),
    "images beside the class folders": Case(
        folder_and(lambda path: Image.new("L", (8, 8)).save(path / "stray.png")),
        notes=("1 file beside the class folders skipped, 1 of them images, the first stray.png",),
    ),
    "labels from 1 to 10": Case(
        arrays(labels=TEN + 1), kind="npz", holds=labels("1 2 3 4 5 6 7 8 9 10", TEN)
    ),
    "sensitive labels from 1 to 10": Case(
        arrays(labels=TEN + 1),
        kind="npz",
        known=Known(count=10),
        told="labels from 1 to 10 do not fit 10 classes; they count from 0: write labels - 1",
    ),
    "labels (N, 1)": Case(arrays(labels=LABELS[:, None]), kind="npz", holds=labels("0 1 2")),
    "labels as numbers in text": Case(arrays(labels=LABELS.astype(str)), kind="npz", holds=labels("0 1 2")),
    "labels as names": Case(arrays(labels=np.array(list("xyz"))[LABELS]), kind="npz", holds=labels("x y z")),
    "sensitive labels as names": Case(
        arrays(labels=np.array(list("xyz"))[LABELS]),
        kind="npz",
        known=Known(count=3),
        told=r"data\.sensitive\.classes: .*set\.npz has names for labels; state the names of all classes",
    ),
    "sensitive labels as stated names": Case(
        arrays(labels=np.array(list("xyz"))[LABELS]),
        kind="npz",
        known=Known(("w", "x", "y", "z")),
        holds=labels("w x y z", LABELS + 1),
    ),
    "labels that are whole floats": Case(
        arrays(labels=LABELS.astype("f8")), kind="npz", holds=labels("0 1 2")
    ),
    "labels that are no whole floats": Case(
        arrays(labels=LABELS + 0.5), kind="npz", told="label 0.5 of image 0 is not a whole number"
    ),
    "one-hot labels": Case(arrays(labels=np.eye(3)[LABELS]), kind="npz", holds=labels("0 1 2")),
    "sensitive one-hot labels": Case(
        arrays(labels=np.eye(4)[LABELS]), kind="npz", known=Known(), holds=labels("0 1 2 3")
    ),
    "several labels an image": Case(
        arrays(labels=np.ones((30, 3))), kind="npz", told="row has a single 1, and that of image 0 has not"
    ),
    "channels first": Case(
        arrays(images=numbered(30).transpose(0, 3, 1, 2)), kind="npz", holds=labels("0 1 2")
    ),
    "channels first or last": Case(
        arrays(images=np.zeros((30, 3, 9, 3), np.uint8)),
        kind="npz",
        told="could have their channels first or last",
    ),
    "flat images": Case(
        arrays(images=np.zeros((30, 64), np.uint8)),
        kind="npz",
        told=r"shape \(30, 64\); write them as \(N, H, W",
    ),
    "16-bit arrays": Case(
        arrays(images=numbered(30).astype(np.uint16) * 257),
        kind="npz",
        told=f"image 0: its pixels are uint16, {NEED}",
    ),
    "16-bit arrays and their whole range": Case(
        arrays(images=numbered(30).astype(np.uint16) * 257),
        kind="npz",
        form={"window": "full"},
        holds=labels("0 1 2"),
    ),
    "floats from -1 to 1, channels first": Case(
        arrays(images=numbered(30).transpose(0, 3, 1, 2) / 127.5 - 1),
        kind="npz",
        form={"window": (-1, 1)},
        holds=labels("0 1 2"),
    ),
    "a large PNG": Case(
        one("0.png", lambda path: Image.new("L", (20_000, 10_000), 77).save(path, compress_level=1)),
        holds=lambda found: (found.images == 77).all(),
    ),
    "a zip in place of a folder": Case(
        packed(".zip"), told=r"set\.zip: expected a folder .*; kind zip reads it"
    ),
    "the same zip": Case(packed(".zip"), kind="zip"),
    "a tar in place of a folder": Case(packed(".tar"), told=r"set\.tar: .*; kind webdataset reads it"),
    "a tar of class folders": Case(
        packed(".tar"),
        kind="webdataset",
        told="has no label: .*; a tar of a folder for each class is not read",
    ),
    "a packed tar": Case(packed(".tgz"), told=r"set\.tgz: .*; unpack it, or pack it as \.zip"),
    "an .npy in place of a folder": Case(packed(".npy"), told=r"set\.npy: .*; save its array in an npz"),
    "an .npy as npz": Case(packed(".npy"), kind="npz", told="one array, without labels; write np.savez"),
}


@pytest.mark.parametrize("name", LIST)
def test_what_people_have_is_read_or_told(tmp_path: Path, name: str) -> None:
    case = LIST[name]
    if name == "HEIC":
        pytest.importorskip("pillow_heif")
    if "AVIF" in name and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    path = case.build(tmp_path)
    if case.told:
        with pytest.raises(UserError, match=case.told) as caught:
            read(open_source(case.kind, path, "train", known=case.known), form=Form(8, 1, **case.form))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return
    source = open_source(case.kind, path, "train", known=case.known)
    assert case.holds(read(source, form=Form(8, 1, **case.form)))
    assert len(source.notes) == len(case.notes)
    for line, wanted in zip(source.notes, case.notes, strict=True):
        assert wanted in line and str(path) in line


@pytest.mark.parametrize(
    ("image", "label"),
    [("x_train", "y_train"), ("train_images", "train_labels"), ("x", "y"), ("pictures", "kind")],
)
def test_arrays_under_other_names(tmp_path: Path, image: str, label: str) -> None:
    np.savez(tmp_path / "set.npz", **{image: numbered(30), label: LABELS, "val_images": numbered(3)})
    columns = Columns("pictures", "kind") if image == "pictures" else Columns()
    source = open_source("npz", tmp_path / "set.npz", "train", columns=columns)
    assert labels("0 1 2")(read(source)) and "arrays that are not read: val_images" in source.notes[0]


def test_held_out_arrays_beside_those_for_training(tmp_path: Path) -> None:
    """Of Keras and MedMNIST; a file without them never gives its training images in their place."""
    rest = {"x_test": numbered(30)[21:], "y_test": LABELS[21:]}
    np.savez(tmp_path / "set.npz", x_train=numbered(30)[:21], y_train=LABELS[:21], **rest)
    assert holds_test_split("npz", tmp_path / "set.npz")
    train, test = (open_source("npz", tmp_path / "set.npz", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (21, 9) and (test.items == numbered(30)[21:, ..., 0]).all()
    np.savez(tmp_path / "two.npz", images=numbered(30), labels=LABELS, x_train=numbered(30), y_train=LABELS)
    with pytest.raises(UserError, match="image_column must name one of images, x_train"):
        open_source("npz", tmp_path / "two.npz", "train")
    for kind, path in (("npz", tmp_path / "two.npz"), ("zip", packed(".zip")(tmp_path))):
        assert not holds_test_split(kind, path)
        with pytest.raises(
            UserError, match=r"has no test .*; name the held-out images in data\.sensitive\.test"
        ):
            open_source(kind, path, "test")


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_other_parts_of_a_set_are_counted(tmp_path: Path, kind: str) -> None:
    save, end = (save_folder, "") if kind == "folder" else (save_npz, ".npz")
    for split in ("train", "test", "val"):
        save(tmp_path / f"{split}{end}", numbered(3), np.arange(3))
    (tmp_path / "readme.txt").write_text("x")
    source = open_source(kind, tmp_path, "train")
    left = "4 files skipped: 3 .png, 1 .txt" if kind == "folder" else "2 files skipped: 1 .npz, 1 .txt"
    assert len(source) == 3 and source.notes == (f"{tmp_path}: {left}",)


def test_a_pillow_without_a_format_is_told_and_no_image_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even under `skip_bad`: the whole kind would be missing."""
    path = one("0.avif", lambda file: file.write_bytes(b"x"))(tmp_path)
    files.suffixes.cache_clear()
    files.suffixes()
    monkeypatch.delitem(Image.EXTENSION, ".avif", raising=False)
    files.suffixes.cache_clear()
    with pytest.raises(UserError, match=r"0\.avif: this Pillow cannot read \.avif; pip install"):
        read(open_source("folder", path, "train"), skip_bad=True)


def test_without_its_package_heic_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = one("0.heic", lambda file: file.write_bytes(b"x"))(tmp_path)
    monkeypatch.setattr(files, "_with_heif", lambda: False)
    with pytest.raises(UserError, match=r"0\.heic: needs pillow-heif.*pip install 'privimage\[heif\]'"):
        read(open_source("folder", path, "train"), skip_bad=True)


def odd_files(root: Path) -> Path:
    """A folder of 40 files as they come from phones, cameras, microscopes and other people's computers."""
    path = save_folder(root / "mine", numbered(18), LABELS[:18])
    turned(path / "class0" / "phone.jpg")
    deep(np.uint16)(path / "class0" / "microscope.png")
    deep(np.uint16)(path / "class0" / "scanner.tif")
    deep(np.float32)(path / "class1" / "measured.tif")
    stacked(GREY200, GREY200, GREY200, ALPHA, mode="RGBA")(path / "class1" / "logo.png")
    stacked(GREY200, ALPHA, mode="LA")(path / "class1" / "grey.png")
    palette(path / "class2" / "icon.png")
    frames(path / "class2" / "moving.gif")
    Image.new("CMYK", (9, 9)).save(path / "class2" / "print.jpg")
    Image.new("RGB", (30, 10)).save(path / "class2" / "wide.jp2")
    left_behind(path)  # 6 files that nobody means
    other_files(path)  # 4
    (path / "class2" / "lost.png").symlink_to("gone.png")
    Image.new("L", (8, 8)).save(path / "stray.png")
    return path


def test_a_folder_of_40_odd_files_from_the_command_line(tmp_path: Path) -> None:
    path = odd_files(tmp_path)
    assert sum(len(names) for _, _, names in os.walk(path)) == 40

    def privimage(*more: str) -> tuple[int, list[str]]:
        sets = ("data.public.kind=folder", f"data.public.path={path}", f"run.dir={tmp_path / 'run'}")
        done = CliRunner().invoke(app, ["prepare", str(TINY), *sets, *more])
        return done.exit_code, [line for line in done.stderr.splitlines() if str(path) in line]

    # Each mistake is one line that names the file and the key, which may then be added.
    status, lines = privimage()
    assert status == 2 and len(lines) == 4
    assert "class0/microscope.png: its pixels are uint16, not 8 bits; data.window: [low, high]" in lines[-1]
    status, lines = privimage("data.window=[0, 63000]")
    assert status == 2 and "class2/lost.png: not readable as an image (a link to a file" in lines[-1]
    # With both settings, everything that can be read is, and the rest is counted.
    status, lines = privimage("data.window=[0, 63000]", "data.public.skip_bad=true")
    assert status == 0
    assert lines[:3] == [
        f"{path}: 1 file beside the class folders skipped, 1 of them images, the first stray.png",
        f"{path}: 4 files skipped: 2 .mov, 1 .txt, 1 without a suffix",
        f"{path}: 2 .tif, 1 .gif: of several frames or pages the first is read",
    ]
    assert "of 29 images were skipped, the first: " in lines[3]
