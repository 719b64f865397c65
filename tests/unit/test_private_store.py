"""The sensitive set is decoded once, is the same wherever it resides, and never stands for another set."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, source_of
from PIL import Image

from privimage.config import Config
from privimage.data import private_store, shards
from privimage.data.decode import Decoder, Source
from privimage.data.pixels import Values
from privimage.data.private_store import ImageSet, open_set
from privimage.data.sensitive import Residence, SensitiveSet, residence
from privimage.data.transforms import Form
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.privacy.account import open_account
from privimage.privacy.plan import make_plan
from privimage.storage.array_file import ArrayFile
from privimage.storage.rundir import RunDir

IMAGES = numbered(1200, channels=3)
LABELS = np.random.default_rng(1).integers(0, 5, 1200)
KEY = {"stamp": [[1, 2]]}


def opened(folder: Path, key: dict = KEY, images: np.ndarray = IMAGES) -> ImageSet:
    return open_set(folder, key, lambda: source_of(images, LABELS), Form(8, 3), 0, ALONE, "read")


def refused() -> Source:
    raise AssertionError("the original was opened")


def again(folder: Path, key: dict = KEY) -> ImageSet:
    """The set without its original."""
    return open_set(folder, key, refused, Form(8, 3), 0, ALONE, "read")


def test_a_set_is_decoded_once(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "set"), again(tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "images.npy",
        "labels.npy",
        "set.json",
    ]
    assert (first.images[:] == second.images[:]).all() and (first.labels == second.labels).all()
    assert (first.content, first.fingerprint, first.classes) == (
        second.content,
        second.fingerprint,
        second.classes,
    )
    decoder = Decoder(source_of(IMAGES, LABELS), Form(8, 3))
    order = np.lexsort((LABELS, [decoder.decode(i, "")[1] for i in IMAGES]))
    assert (first.images[:].transpose(0, 2, 3, 1) == IMAGES[order]).all() and (
        first.labels == LABELS[order]
    ).all()


def test_what_was_decoded_before_a_kill_is_not_decoded_again(tmp_path: Path) -> None:
    """Of three parts the last is left to do, and gives the set that an undisturbed run has."""
    source = source_of(IMAGES, LABELS)
    shards.decode(source, tmp_path / "set.parts", Decoder(source, Form(8, 3)), 0, ALONE, "read")
    there = sorted((tmp_path / "set.parts").glob("*.npz"))
    assert len(there) == 3
    before = there[0].stat().st_mtime_ns
    there[-1].unlink()
    blind = Source([None] * 1024 + list(IMAGES[1024:]), source.opener, source.names, LABELS, source.classes)
    resumed = open_set(tmp_path / "set", KEY, lambda: blind, Form(8, 3), 0, ALONE, "read")
    assert before == before and not (tmp_path / "set.parts").exists()
    assert resumed.content == opened(tmp_path / "other").content


def test_parts_of_another_set_are_not_used(tmp_path: Path) -> None:
    other = source_of(IMAGES, (LABELS + 1) % 5)
    shards.decode(other, tmp_path / "set.parts", Decoder(other, Form(8, 3)), 0, ALONE, "read")
    assert opened(tmp_path / "set").content == opened(tmp_path / "fresh").content


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_an_altered_file_is_made_again(tmp_path: Path, name: str) -> None:
    content = opened(tmp_path / "set").content
    data = bytearray((tmp_path / "set" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "set" / name).write_bytes(data)
    with pytest.raises(AssertionError, match="opened"):
        again(tmp_path / "set")
    assert opened(tmp_path / "set").content == content


def test_a_lost_file_is_made_again(tmp_path: Path) -> None:
    content = opened(tmp_path / "set").content
    (tmp_path / "set" / "images.npy").unlink()
    assert opened(tmp_path / "set").content == content


def test_a_copy_is_the_same_set(tmp_path: Path) -> None:
    """Another inode and another time: its content is compared once, and then stands."""
    content = opened(tmp_path / "set").content
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "images.npy", (1, 1))
    assert again(tmp_path / "copy").content == content


def test_a_changed_original_is_read_again_and_a_missing_one_is_not_needed(tmp_path: Path) -> None:
    content = opened(tmp_path / "set").content
    assert again(tmp_path / "set", {"stamp": []}).content == content
    assert opened(tmp_path / "set", {"stamp": [[3, 4]]}, IMAGES[::-1]).content != content


def test_the_stamp_of_a_folder_changes_with_every_added_or_removed_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    os.utime(tmp_path / "a", (1, 1))
    before = private_store.stamp(tmp_path)
    assert private_store.stamp(tmp_path) == before
    (tmp_path / "a" / "2.png").touch()
    assert private_store.stamp(tmp_path) != before
    assert private_store.stamp(tmp_path / "nothing") == [] and private_store.stamp(None) == []


def test_an_array_file_reads_rows(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (50, 3, 5, 4), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    file = ArrayFile(tmp_path / "a.npy")
    assert (len(file), file.shape, file.dtype) == (50, array.shape, array.dtype)
    for key in (slice(None), slice(7, 19), slice(48, 90), slice(5, 5), slice(0, 50, 7), [3, 3, 49, 0], []):
        assert (file[key] == array[key]).all() and file[key].shape == array[
            np.array(key, int) if key == [] else key
        ].shape
    with open(tmp_path / "a.npy", "rb+") as cut:
        cut.truncate(1000)
    with pytest.raises(OSError, match=r"a\.npy: ends before row"):
        file[:]


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_batches_are_the_same_wherever_the_images_reside(tmp_path: Path, where: Residence) -> None:
    found = opened(tmp_path / "set")
    batches = SensitiveSet(found.images, found.labels, torch.device("cpu"), where)
    wanted = np.random.default_rng(2).permutation(1200)[:333].tolist()
    # Announced and taken in order; announced and not taken; not announced; empty.
    batches.begin(wanted, 50, seed=0)
    taken = [batches.__getitems__(wanted[start : start + 50]) for start in range(0, 333, 50)]
    assert (torch.cat([images for images, _, _ in taken]).numpy() == found.images[wanted]).all()
    assert (torch.cat([labels for _, labels, _ in taken]).numpy() == found.labels[wanted]).all()
    batches.begin(wanted, 50, seed=0)
    for indices in (wanted[50:60], [], [7]):
        images, labels, at = batches.__getitems__(indices)
        assert (images.numpy() == found.images[indices]).all() and at.tolist() == indices
        assert (labels.numpy() == found.labels[indices]).all()


def test_where_images_go_depends_on_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cpu = opened(tmp_path / "set").images, torch.device("cpu")
    size = int(np.prod(images.shape))
    for free, ranks, expected in ((4 * size, 1, "device"), (4 * size, 2, "disk"), (size, 1, "disk")):
        monkeypatch.setattr("privimage.telemetry.memory.available", lambda free=free: free)
        assert residence("auto", images, cpu, ranks) == expected
        assert residence("host", images, cpu, ranks) == "host"


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    source = source_of(IMAGES, LABELS)
    broken = Source([*IMAGES[:700], None, *IMAGES[701:]], source.opener, source.names, LABELS, source.classes)
    with pytest.raises(UserError, match=r"^image 700: not readable as an image"):
        open_set(tmp_path / "set", KEY, lambda: broken, Form(8, 3), 0, ALONE, "read")


def test_damaged_images_are_left_out_and_n_is_what_the_set_lists(
    tmp_path: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate of private steps is that of N, which is public; how many images are damaged is in no plan."""
    whole = source_of(IMAGES[:100], LABELS[:100])
    tiny_config.run.dir.mkdir()
    plans = []
    for name, damaged in (("whole", {}), ("damaged", {3: None, 70: None})):
        items = [damaged.get(index, image) for index, image in enumerate(IMAGES[:100])]
        source = replace(whole, items=items)
        found = open_set(
            tmp_path / name, KEY, lambda source=source: source, Form(8, 3), 0, ALONE, "read", True
        )
        assert (found.count, len(found.images), len(found.labels)) == (100, *[100 - len(damaged)] * 2)
        run = RunDir(tmp_path / f"run of {name}")
        plans.append(open_account(tiny_config, run, found, ALONE).plan.to_dict())
    assert plans[0] == plans[1] == make_plan(tiny_config, 100).to_dict()
    left = [index for index in range(100) if index not in (3, 70)]
    assert (
        found.content
        == open_set(
            tmp_path / "left",
            KEY,
            lambda: source_of(IMAGES[left], LABELS[left]),
            Form(8, 3),
            0,
            ALONE,
            "read",
        ).content
    )
    assert "2 of 100 images do not decode and are left out, first image 3: not" in capsys.readouterr().err
    with pytest.raises(UserError, match="image 3: not readable as an image"):
        open_set(tmp_path / "strict", KEY, lambda: source, Form(8, 3), 0, ALONE, "read")
    nothing = replace(whole, items=[None] * 100)
    with pytest.raises(UserError, match="not one image could be read, the first: image 0"):
        open_set(tmp_path / "nothing", KEY, lambda: nothing, Form(8, 3), 0, ALONE, "read", True)


def deep(item: np.ndarray) -> Values:
    return Values(item.astype(np.float32), None)


def test_what_is_not_the_fault_of_an_image_is_not_skipped(tmp_path: Path) -> None:
    """A missing setting, or a disk that fails, would empty the set without a word."""
    source = source_of(IMAGES[:10], LABELS[:10])
    for opener, told in ((deep, "data.window"), (refuse, "not readable (Permission denied)")):
        broken = replace(source, opener=opener, items=list(IMAGES[:10]))
        with pytest.raises(UserError, match=re.escape(told)):
            open_set(tmp_path / "set", KEY, lambda broken=broken: broken, Form(8, 3), 0, ALONE, "read", True)


def refuse(_: np.ndarray) -> Image.Image:
    raise PermissionError(13, "Permission denied")
