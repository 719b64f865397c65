"""The prepared public set.

One file in FFCV's format, or a memory-mapped .npy where FFCV's compiled part is missing.

Both hold uint8 (C, H, W) images of one shape with their labels, and stand beside a sidecar NAME.json. They
are written whole or not at all, and checked before they are used: FFCV itself reads damaged files without an
error.
"""

import contextlib
import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from privimage.data import beton, shards
from privimage.data.decode import Decoder, Source
from privimage.data.transforms import Form
from privimage.data.writers import writer
from privimage.distributed import told
from privimage.distributed.world import ALONE, World
from privimage.errors import UserError
from privimage.storage.files import read_json, write_json
from privimage.telemetry.progress import say

# Pixels of a side from which on a .beton keeps JPEGs: a million raw images of 256 x 256 are 197 GB. Smaller
# ones would cost more to decode than to read.
JPEG_FROM = 128


@dataclass(frozen=True)
class Sidecar:
    """What is known of a store without opening it.

    Images, their shape (C, H, W), class names, bytes and digest of the file, and whether it holds JPEGs.
    """

    count: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    size: int
    sha256: str
    jpeg: bool = False


def write(
    source: Source,
    path: Path,
    form: Form,
    workers: int | Literal["auto"],
    skip_bad: bool = False,
    world: World = ALONE,
) -> Sidecar:
    """Write a store, whose format its suffix (.beton or .npy) says, and its sidecar.

    Pixels are kept as they are; but a .beton keeps JPEGs of images of `JPEG_FROM` pixels a side and more.
    All ranks of `world` decode, the main rank puts the file together. What was there before is kept until
    the end; what was decoded is kept in .NAME.parts beside it, so that a stop or a mistake loses nothing.

    Raises UserError for an image that does not decode, unless `skip_bad` (they are counted and named), for a
    class that is left without an image, for a full disk, and for a .beton where FFCV is missing; Stopped when
    a stop was requested.
    """
    if path.suffix not in (".beton", ".npy"):
        raise UserError(f"{path}: a store ends in .beton or .npy")
    _need_ffcv(path)
    parts = path.with_name(f".{path.name}.parts")
    jpeg = path.suffix == ".beton" and form.resolution >= JPEG_FROM
    decoder = Decoder(source, form, draft=True, jpeg=jpeg)
    shards.decode(source, parts, decoder, workers, world, f"{path.parent.name or '.'}/{path.name}", skip_bad)
    if world.is_main:
        _assemble(source, parts, path, decoder)
        shutil.rmtree(parts)
    world.barrier()
    for file in (path, _sidecar_path(path)):
        told.wait_until_seen(file, world)
    return described(path)


def _assemble(source: Source, parts: Path, path: Path, decoder: Decoder) -> None:
    """Put the shards of a set into its store, in order."""
    temporary = path.with_name(f".{path.name}.part")
    shape = (decoder.form.channels, decoder.form.resolution, decoder.form.resolution)
    kept: list[int] = []
    bad: list[str] = []
    try:
        with writer(temporary, path.suffix, len(source), shape, decoder.jpeg) as put:
            for shard in shards.read(source, parts, shape[1]):
                for image, index in zip(shard.images, shard.indices.tolist(), strict=True):
                    put(image, int(source.labels[index]))
                kept += shard.indices.tolist()
                bad += shard.problems
        _require_all_classes(source, kept, bad, path)
        size, digest = temporary.stat().st_size, _digest(temporary)
        sidecar = Sidecar(len(kept), shape, source.classes, size, digest, decoder.jpeg)
        # The sidecar goes first and comes last, so that it never describes another file.
        _sidecar_path(path).unlink(missing_ok=True)
        temporary.replace(path)
        write_json(_sidecar_path(path), asdict(sidecar))
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    if bad:
        say(f"{path}: {len(bad)} of {len(source)} images were skipped, the first: {bad[0]}")


def _require_all_classes(source: Source, kept: list[int], bad: list[str], path: Path) -> None:
    """Raise UserError for a class of which no image was kept."""
    given, classes = source.labels, len(source.classes)
    # Classes that were empty from the start are not counted: those of sensitive sets may be.
    before, left = (np.bincount(labels, minlength=classes) for labels in (given, given[kept]))
    empty = np.flatnonzero((before > 0) & (left == 0))
    if len(empty):
        raise UserError(
            f"{path}: not one image of class {source.classes[empty[0]]!r} could be read; the first bad "
            f"one: {bad[0]}"
        )


def described(path: Path, shape: tuple[int, int, int] | None = None) -> Sidecar:
    """The sidecar of a store, which is not read.

    Raises UserError for a missing or truncated one, or another `shape`.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a prepared store; kind folder reads it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not _sidecar_path(path).is_file():
        reason = f"its sidecar {_sidecar_path(path).name} is missing, and without it damage could not be seen"
        raise UserError(f"{path}: {reason}; prepare it again")
    # Size and shape are checked without reading the file; `verify` reads it.
    sidecar = _sidecar(path)
    if (size := path.stat().st_size) != sidecar.size:
        raise UserError(
            f"{path}: truncated or altered ({size} bytes, {sidecar.size} were written); prepare it again"
        )
    if shape and sidecar.shape != shape:
        reason = f"data.channels and data.resolution ask for {shape}"
        raise UserError(f"{path}: holds images of shape {sidecar.shape}, {reason}")
    return sidecar


def verify(path: Path) -> Sidecar:
    """The sidecar of a store that is as it was written.

    Raises UserError for a missing, truncated or altered file.
    """
    sidecar, status = described(path), path.stat()
    if _digest_of_version(path, status.st_mtime_ns, status.st_ino) != sidecar.sha256:
        raise UserError(f"{path}: altered (its SHA-256 is not the one in its sidecar); prepare it again")
    _need_ffcv(path)
    return sidecar


def at_hand(path: Path, scratch: Path | None, world: World) -> Path:
    """A verified store for training: the one at `path`, or its copy in the folder `scratch` of this node.

    It is read and compared with its digest once per node. All ranks call it together. Raises UserError for a
    missing, truncated or altered store, and for a folder without room.
    """
    copy = None if scratch is None else scratch / f"{described(path).sha256[:16]}{path.suffix}"
    if world.is_first_of_node:
        if copy is not None and not copy.exists():
            _copy(path, copy)
        verify(copy or path)
    world.barrier()
    return copy or path


def _copy(path: Path, copy: Path) -> None:
    part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, part)
        shutil.copyfile(_sidecar_path(path), _sidecar_path(copy))
        part.replace(copy)
    except OSError as error:
        raise UserError(f"data.scratch: {copy.parent}: no copy could be made ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):  # it became the copy, or was never begun
            part.unlink()


def labels(path: Path) -> np.ndarray:
    """The labels of a store, int64 (N,)."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")["label"].astype(np.int64)
    return beton.labels(path)


def read(path: Path, indices: np.ndarray) -> np.ndarray:
    """Some images of a store, uint8 (len(indices), C, H, W), in the order of `indices`."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")["image"][indices]
    sidecar = _sidecar(path)
    return beton.images(path, indices, sidecar.shape, sidecar.jpeg)


def _need_ffcv(path: Path) -> None:
    if path.suffix == ".beton" and (missing := beton.ffcv_missing()):
        raise UserError(
            f"{path}: {missing}; install it (tools/install_ffcv.sh), or use data.store=npy, which needs no "
            "compiled part"
        )


def _sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sidecar(path: Path) -> Sidecar:
    content = read_json(_sidecar_path(path))
    try:
        return Sidecar(
            int(content["count"]),
            tuple(content["shape"]),
            tuple(content["classes"]),
            int(content["size"]),
            content["sha256"],
            bool(content.get("jpeg", False)),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{_sidecar_path(path)}: damaged, not the sidecar of a store") from None


@lru_cache(maxsize=8)
def _digest_of_version(path: Path, modified_ns: int, inode: int) -> str:
    """The digest is computed once for each version of a file."""
    return _digest(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
