"""The sensitive set of a run, decoded once and kept under `private/` for all its stages and restarts.

All ranks decode shards, on their own nodes; the main rank puts them in order into one array file, with the
digest that names the set's ledger and the one that identifies its content. Every rank reads that file, so two
ranks cannot have different copies.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np

from privimage.data import shards
from privimage.data.decode import Decoder, Source
from privimage.data.groups import grouping, numbered, units
from privimage.data.transforms import Form
from privimage.distributed import told
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.storage import owner_only
from privimage.storage.array_file import ArrayFile, Images
from privimage.storage.files import read_json, write_array, write_json
from privimage.telemetry.progress import say

READ_BYTES = 1 << 26  # that are read and hashed at once


@dataclass(frozen=True)
class ImageSet:
    """A decoded set: images uint8 (N, C, H, W), read from a file, and labels and groups int64 (N,).

    Images of one group stand for one unit of the promise; where images are the unit each is its own group.
    Groups are numbered from 0 in the order of their first images. `grouping` is a digest of which images
    belong together, empty where images are the unit.

    `fingerprint` is a digest of the images before crop and resize, independent of order, resolution, file
    format and labels; it names the ledger of the set. `content` is the SHA-256 of pixels, labels, groups and
    class names, in order: whatever is computed from the set is a function of it.

    `count` is N, the number of units that the set lists. It is public; how many of them are damaged and left
    out is not, nor is how many images a group has.
    """

    images: Images
    labels: np.ndarray
    groups: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str
    content: bytes
    count: int
    grouping: str = ""


def open_set(
    folder: Path,
    key: dict,
    source: Callable[[], Source],
    form: Form,
    workers: int | Literal["auto"],
    world: World,
    label: str,
    skip_bad: bool = False,
) -> ImageSet:
    """The set that is kept in `folder` under `key`; decoded from `source()` if it is not there yet.

    `key`, of plain values, says what the set is made from; what was made from anything else is made again.
    Its `stamp` changes with the original, and is empty where that is not at hand: what is kept stays then.
    All ranks call it together. Raises UserError that names an image which does not decode, unless `skip_bad`,
    which leaves such images out; and Stopped.
    """
    # The main rank decides whether the set is there: other nodes may see an older state of the folder.
    if not world.broadcast_object(_holds(folder, key) if world.is_main else None):
        decoded = source()
        parts = folder.with_name(f"{folder.name}.parts")
        if world.is_main:
            owner_only.folder(folder)
        decoder = Decoder(decoded, form)
        shards.decode(decoded, parts, decoder, workers, world, label, skip_bad)
        if world.is_main:
            _assemble(decoded, parts, decoder, folder, key)
            shutil.rmtree(parts)
        world.barrier()
    told.wait_until_seen(folder / "images.npy", world)
    known = world.broadcast_object(read_json(folder / "set.json") if world.is_main else None)

    def array(name: str) -> np.ndarray:
        return np.load(io.BytesIO(told.content(folder / name, world) or b""), allow_pickle=False)

    labels = array("labels.npy")
    return ImageSet(
        ArrayFile(folder / "images.npy"),
        labels,
        array("groups.npy") if known["grouping"] else np.arange(len(labels)),
        tuple(known["classes"]),
        known["fingerprint"],
        bytes.fromhex(known["content"]),
        known["count"],
        known["grouping"],
    )


def _holds(folder: Path, key: dict) -> bool:
    """Whether a folder holds the set of `key`, unaltered."""
    path = folder / "set.json"
    if not path.exists():
        return False
    known = read_json(path)
    if known["key"] != (key if key["stamp"] else key | {"stamp": known["key"]["stamp"]}):
        return False
    if known["stamps"] == _stamps(folder):
        return True
    # Copied, moved or touched since: what identifies the set is its content.
    try:
        content = _content(folder, tuple(known["classes"]))
    except (OSError, ValueError):
        return False
    if content.hex() != known["content"]:
        return False
    write_json(path, known | {"stamps": _stamps(folder)})
    return True


def _stamps(folder: Path) -> list:
    """What changes with every change of the files, as far as a file system notices."""
    files = [folder / name for name in ("images.npy", "labels.npy", "groups.npy")]
    if not all(file.exists() for file in files[:2]):
        return []
    files = [file for file in files if file.exists()]
    states = [file.stat() for file in files]
    return [[state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino] for state in states]


def _assemble(source: Source, parts: Path, decoder: Decoder, folder: Path, key: dict) -> None:
    """Write the images in the order of their contents, then of their labels, then of the names of groups.

    The order is the same for any names of files, and for any order in which a file system lists them.
    """
    indices, digests, problems = shards.found(source, parts, decoder.form.resolution)
    if problems:
        if not len(indices):
            raise UserError(f"not one image could be read, the first: {problems[0]}")
        # For the owner alone: the plan of a run and its release know the number of images with these.
        say(f"{len(problems)} of {len(source)} images do not decode and are left out, first {problems[0]}")
    labels = np.asarray(source.labels, np.int64)[indices]
    names = [""] * len(indices) if source.groups is None else [source.groups[i] for i in indices.tolist()]
    order = sorted(range(len(indices)), key=lambda i: (digests[i].tobytes(), labels[i], names[i]))
    fingerprint = hashlib.sha256(digests[order].tobytes()).hexdigest()
    place = np.zeros(len(source), np.int64)
    place[indices[order]] = np.arange(len(order))

    # Written beside and renamed: set.json, which comes last, vouches for both files.
    (folder / "set.json").unlink(missing_ok=True)
    part = folder / ".images.part.npy"
    shape = (len(indices), decoder.form.channels, decoder.form.resolution, decoder.form.resolution)
    try:
        _write_rows(part, shape, shards.read(source, parts, decoder.form.resolution), place)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{folder}: could not be written ({error.strerror}); make room and run again"
        ) from None
    part.replace(folder / "images.npy")
    write_array(folder / "labels.npy", labels[order])
    (folder / "groups.npy").unlink(missing_ok=True)
    together = ""
    if source.groups is not None:
        groups = numbered([names[i] for i in order])
        write_array(folder / "groups.npy", groups)
        together = grouping(digests[order], groups)
    content = _content(folder, source.classes)
    known = {
        "key": key,
        "classes": list(source.classes),
        "fingerprint": fingerprint,
        "content": content.hex(),
        "count": units(source),
        "grouping": together,
    }
    write_json(folder / "set.json", known | {"stamps": _stamps(folder)})


def _write_rows(path: Path, shape: tuple[int, ...], parts: Iterable[shards.Shard], place: np.ndarray) -> None:
    """Write a .npy of a shape, image i of the parts as row `place[i]`.

    Row by row, not through a memory map: the pages of a map would count as memory of this process. Raises
    OSError.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        begin, row = file.tell(), prod(shape[1:])
        for part in parts:
            for image, at in zip(part.images, place[part.indices].tolist(), strict=True):
                if os.pwrite(file.fileno(), image.data, begin + at * row) != row:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def _content(folder: Path, classes: tuple[str, ...]) -> bytes:
    """See `ImageSet.content`."""
    images, labels = ArrayFile(folder / "images.npy"), np.load(folder / "labels.npy", allow_pickle=False)
    digest = hashlib.sha256(json.dumps([images.shape, classes]).encode())
    rows = max(1, READ_BYTES // max(1, prod(images.shape[1:])))
    for start in range(0, len(images), rows):
        digest.update(images[start : start + rows].data)
    digest.update(np.ascontiguousarray(labels).data)
    if (folder / "groups.npy").exists():
        digest.update(np.ascontiguousarray(np.load(folder / "groups.npy", allow_pickle=False)).data)
    return digest.digest()


def stamp(path: Path | None) -> list:
    """Modification times and sizes of a file, or of a folder and its sub-folders: changes with every added or
    removed image.
    """
    if path is None or not path.exists():
        return []
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    states = [place.stat() for place in (path, *inside)]
    return [[state.st_mtime_ns, state.st_size] for state in states]
