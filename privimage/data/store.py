"""The prepared public set.

One file in FFCV's format, or a memory-mapped .npy where FFCV's compiled part is missing.

Both hold uint8 (C, H, W) images of one shape with their labels, and stand beside a sidecar NAME.json. They
are written whole or not at all, and checked before they are used: FFCV itself reads damaged files without an
error.
"""

import errno
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from privimage import torchvision_operators
from privimage.data.decode import Source, decoded
from privimage.errors import UserError
from privimage.storage.files import read_json, write_json
from privimage.telemetry.progress import Progress, say

PAGE_BYTES = 1 << 21  # FFCV's smallest page: files are padded to whole ones
Put = Callable[[np.ndarray, int], None]


@dataclass(frozen=True)
class Sidecar:
    """What is known of a store without opening it.

    Images, their shape (C, H, W), class names, bytes and digest of the file.
    """

    count: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    size: int
    sha256: str


def import_ffcv() -> None:
    """Import FFCV and keep the number of torch's threads.

    Its import sets that number to one. Raises ImportError or OSError.
    """
    threads = torch.get_num_threads()
    try:
        torchvision_operators.declare()
        import ffcv  # noqa: F401
    finally:
        torch.set_num_threads(threads)


def ffcv_installed() -> bool:
    """Whether FFCV and its compiled part are there, without importing them, which takes seconds."""
    # Only the file names are looked at: importing FFCV compiles with numba.
    spec = importlib.util.find_spec("ffcv")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return any(any(Path(folder).glob("_libffcv*")) for folder in folders)


def ffcv_missing() -> str:
    """Why FFCV cannot be used here; empty if it can."""
    try:
        import_ffcv()
    except (ImportError, OSError) as error:
        return f"FFCV's compiled part is not installed or does not load ({error})"
    return ""


def write(
    source: Source, path: Path, resolution: int, channels: int, workers: int, skip_bad: bool = False
) -> Sidecar:
    """Write a store, whose format its suffix (.beton or .npy) says, and its sidecar.

    What was there before is kept until the end.

    Raises UserError for an image that does not decode, unless `skip_bad` (they are counted and named), for a
    class that is left without an image, for a full disk, and for a .beton where FFCV is missing.
    """
    if path.suffix not in (".beton", ".npy"):
        raise UserError(f"{path}: a store ends in .beton or .npy")
    _need_ffcv(path)
    shape = (channels, resolution, resolution)
    temporary = path.with_name(f".{path.name}.part")
    kept: list[int] = []
    bad: list[str] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            Progress(path.name, len(source)) as bar,
            _writer(temporary, path.suffix, len(source), shape) as put,
        ):
            # Images arrive in order and are written at once; memory does not grow with the set.
            for result in decoded(source, resolution, channels, workers):
                if result.image is not None:
                    put(result.image, int(source.labels[result.index]))
                    kept.append(result.index)
                elif skip_bad:
                    bad.append(result.problem)
                else:
                    raise UserError(result.problem)
                bar.advance(skipped=str(len(bad)))
        _require_all_classes(source, kept, bad, path)
        sidecar = Sidecar(len(kept), shape, source.classes, temporary.stat().st_size, _digest(temporary))
        # The sidecar goes first and comes last, so that it never describes another file.
        _sidecar_path(path).unlink(missing_ok=True)  # never a new file beside an old sidecar
        temporary.replace(path)
        write_json(_sidecar_path(path), asdict(sidecar))
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    if bad:
        say(f"{path}: {len(bad)} of {len(source)} images were skipped, the first: {bad[0]}")
    return sidecar


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


@contextmanager
def _writer(path: Path, suffix: str, capacity: int, shape: tuple[int, int, int]) -> Iterator[Put]:
    # On disk before it is renamed: otherwise a power failure could leave a whole name on half a file.
    with (_beton_writer if suffix == ".beton" else _npy_writer)(path, capacity, shape) as put:
        yield put
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _beton_writer(path: Path, capacity: int, shape: tuple[int, int, int]) -> Iterator[Put]:
    """FFCV's writer without its worker processes, which deadlock when one of them raises or is
    killed.
    """
    from ffcv.fields import IntField, NDArrayField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    # Raw pixels, not JPEGs: images are small, and decoding would cost more than reading.
    fields = {"image": NDArrayField(np.dtype("uint8"), shape), "label": IntField()}
    # What FFCV's writer does in worker processes is done here, in this one.
    writer = DatasetWriter(str(path), fields, page_size=PAGE_BYTES, num_workers=1)
    writer.num_samples = capacity
    writer.prepare()
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    metadata = np.zeros(capacity, writer.metadata_type)
    writer.metadata_sm = SimpleNamespace(
        buf=metadata.view(np.uint8)
    )  # in place of the memory that its processes would share
    allocator = MemoryAllocator(str(path), writer.data_region_start, PAGE_BYTES)
    written = 0

    def put(image: np.ndarray, label: int) -> None:
        nonlocal written
        handle_sample((image, label), written, metadata.dtype.names, metadata, allocator, fields)
        written += 1

    # The caller writes images one by one; leaving the block flushes the last page.
    with allocator:
        yield put
    writer.header["num_samples"] = written
    writer.finalize([allocator.allocations])
    if writer.header["alloc_table_ptr"] != allocator.offset + (allocator.my_page + 1) * PAGE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # FFCV ignores a short write


@contextmanager
def _npy_writer(path: Path, capacity: int, shape: tuple[int, int, int]) -> Iterator[Put]:
    # Image and label beside each other, so that one read fetches both.
    record = np.dtype([("image", np.uint8, shape), ("label", "<i8")])
    header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False}
    written = 0
    with open(path, "wb") as file:

        def put(image: np.ndarray, label: int) -> None:
            nonlocal written
            file.write(image.tobytes() + np.int64(label).astype("<i8").tobytes())
            written += 1

        np.lib.format.write_array_header_1_0(file, header | {"shape": (capacity,)})
        yield put
        file.seek(0)  # NumPy leaves room in the header for any count
        np.lib.format.write_array_header_1_0(file, header | {"shape": (written,)})


def described(path: Path, shape: tuple[int, int, int] | None = None) -> Sidecar:
    """The sidecar of a store, which is not read.

    Raises UserError for a missing or truncated one, or another `shape`.
    """
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


def labels(path: Path) -> np.ndarray:
    """The labels of a store, int64 (N,)."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")["label"].astype(np.int64)
    return _metadata(path)["f1"].astype(np.int64)


def read(path: Path, indices: np.ndarray) -> np.ndarray:
    """Some images of a store, uint8 (len(indices), C, H, W), in the order of `indices`."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")["image"][indices]
    # Images lie at known offsets in the file: a sliding window over its bytes is an array of all of them.
    shape = _sidecar(path).shape
    content = np.memmap(path, dtype=np.uint8, mode="r")
    starts = _metadata(path)["f0"][indices]
    return np.lib.stride_tricks.sliding_window_view(content, int(np.prod(shape)))[starts].reshape(-1, *shape)


def _metadata(path: Path) -> np.ndarray:
    """FFCV's table of a .beton: f0, where in the file each image begins; f1, its label."""
    import_ffcv()
    from ffcv.reader import Reader

    return Reader(str(path)).metadata


def _need_ffcv(path: Path) -> None:
    if path.suffix == ".beton" and (missing := ffcv_missing()):
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
