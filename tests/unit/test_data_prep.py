"""The scripts of data_prep/, on real files where they are at hand."""

import gzip
import runpy
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_sets import numbered, save_folder, save_npz
from PIL import Image
from ranks import REPOSITORY

from privimage.data import beton, store

FORMAT = ".npy" if beton.ffcv_missing() else ".beton"


@dataclass
class Done:
    """How a script ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a script of data_prep/ in this process."""

    def run(name: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(REPOSITORY / "data_prep")
        capsys.readouterr()
        try:
            runpy.run_path(str(REPOSITORY / "data_prep" / f"{name}.py"), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code
        return Done(status, *capsys.readouterr())

    return run


def some_images(archive: Path, folder: Path, count: int) -> list[Path]:
    """The first images of one of the real archives."""
    with tarfile.open(archive) as tar:
        for member in islice((m for m in tar if m.name.endswith(".jpg")), count):
            tar.extract(member, folder, filter="data")
    return sorted(folder.rglob("*.jpg"))


def test_imagenet_keeps_the_class_index(script, shared_data: Path, tmp_path: Path) -> None:
    """Real photographs, one for each of some ImageNet classes, whose file names say which."""
    root = tmp_path / "imagenet" / "train"
    index_of = {}
    for file in some_images(next((shared_data / "imagenet-sample").glob("*.tar")), tmp_path / "raw", 24):
        index, wnid = file.stem.split("_")
        index_of[wnid] = int(index)
        (root / wnid).mkdir(parents=True)
        file.rename(root / wnid / file.name)
    done = script("imagenet", root.parent, tmp_path / f"set{FORMAT}", "--resolution", 32)
    assert done.status == 0, done.err
    sidecar = store.verify(tmp_path / f"set{FORMAT}")
    assert sidecar.classes == tuple(sorted(index_of)) and sidecar.shape == (3, 32, 32)
    assert [index_of[sidecar.classes[label]] for label in store.labels(tmp_path / f"set{FORMAT}")] == sorted(
        index_of.values()
    )


def test_faces(script, shared_data: Path, tmp_path: Path) -> None:
    files = some_images(next((shared_data / "celeba10k").glob("*.tar.xz")), tmp_path / "faces", 40)
    done = script("celeba", files[0].parent, tmp_path / f"set{FORMAT}", "--resolution", 64)
    assert done.status == 0, done.err
    sidecar = store.verify(tmp_path / f"set{FORMAT}")
    assert (sidecar.count, sidecar.shape, sidecar.classes) == (40, (3, 64, 64), ("all",))


def test_real_handwriting_comes_through_unchanged(script, shared_data: Path, tmp_path: Path) -> None:
    images = np.frombuffer(
        gzip.decompress((shared_data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes()),
        np.uint8,
        offset=16,
    ).reshape(-1, 28, 28)
    labels = np.frombuffer(
        gzip.decompress((shared_data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes()),
        np.uint8,
        offset=8,
    )
    save_npz(tmp_path / "test.npz", images, labels)
    done = script(
        "npz", tmp_path, tmp_path / f"set{FORMAT}", "--split", "test", "--resolution", 28, "--channels", 1
    )
    assert done.status == 0, done.err
    assert (store.labels(tmp_path / f"set{FORMAT}") == labels).all()
    assert (store.read(tmp_path / f"set{FORMAT}", np.arange(10_000))[:, 0] == images).all()


def test_a_bad_image_ends_in_one_line_unless_it_is_to_be_skipped(script, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "set", numbered(12), np.arange(12) % 3)
    (folder / "class1" / "bad.jpg").write_bytes(b"nothing")
    done = script("folder", folder, tmp_path / "out.npy", "--resolution", 8, "--channels", 1)
    assert done.status == 2 and not (tmp_path / "out.npy").exists()
    told = done.err.strip().splitlines()
    assert len(told) == 1 and "bad.jpg" in told[0]
    done = script("folder", folder, tmp_path / "out.npy", "--resolution", 8, "--channels", 1, "--skip-bad")
    assert done.status == 0 and "1 of 13" in done.err and "bad.jpg" in done.err
    assert store.verify(tmp_path / "out.npy").count == 12


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "celeba", "mnist", "fashion_mnist", "npz", "folder"])
def test_every_script_explains_itself(script, name: str) -> None:
    done = script(name, "--help")
    assert done.status == 0 and "--skip-bad" in done.out


def test_what_is_wrong_with_the_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    """As users start it."""
    npz = save_npz(tmp_path / "set.npz", numbered(12), np.arange(11))
    command = [
        sys.executable,
        REPOSITORY / "data_prep" / "npz.py",
        npz,
        tmp_path / "out.npy",
        "--resolution",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and str(npz) in done.stderr


def test_deep_images_are_written_within_a_window(script, tmp_path: Path) -> None:
    place, out = tmp_path / "set" / "class0", tmp_path / f"set{FORMAT}"
    place.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((8, 16), 1000 * number, np.uint16)).save(place / f"{number}.png")
    settings = ("--resolution", 8, "--channels", 1, "--workers", 0)
    refused = script("folder", tmp_path / "set", out, *settings)
    assert refused.status == 2 and "its pixels are uint16, not 8 bits" in refused.err
    assert script("folder", tmp_path / "set", out, *settings, "--window", 5, 5).status == 2
    done = script("folder", tmp_path / "set", out, *settings, "--fit", "squash", "--window", 0, 2000)
    assert done.status == 0 and store.read(out, np.arange(3))[:, 0, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("given", [False, True])
def test_images_are_dealt_out_to_artificial_persons(script, tmp_path: Path, given: bool) -> None:
    source = ()
    if given:
        (tmp_path / "given").mkdir()
        for name, count in (("train", 30), ("test", 10)):
            save_npz(tmp_path / "given" / f"{name}.npz", numbered(count), np.arange(count) % 5)
        source = ("--source", tmp_path / "given")
    done = script("persons", tmp_path / "made", "--images", 4, *source)
    assert done.status == 0, done.err
    train, test = (dict(np.load(tmp_path / "made" / f"{name}.npz")) for name in ("train", "test"))
    sizes = np.unique(train["person"], return_counts=True)[1]
    assert sorted(set(sizes)) == ([2, 4] if given else [1, 4]) and (sizes != 4).sum() == 1
    assert not set(train["person"]) & set(test["person"])
    assert len(train["images"]) == (30 if given else 1437) and len(test["labels"]) == (10 if given else 360)
    wrong = script("persons", tmp_path / "made", "--images", 4, "--source", tmp_path / "none")
    assert wrong.status == 2 and wrong.err.strip().endswith("none: no such file or folder")
