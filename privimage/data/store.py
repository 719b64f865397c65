"""The prepared public set on disk: an FFCV .beton, or a memory-mapped .npy where FFCV's compiled part is missing.

Both hold uint8 (C, H, W) images of one shape and stand beside a sidecar `NAME.json` (count, shape, classes, size, SHA-256) and
`NAME.labels.npy`; they are written whole or not at all, and checked before they are used: FFCV itself reads a damaged
file without a word.
"""

import hashlib
import importlib.util
import os
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import Array
from pathlib import Path

import numpy as np

from privimage.data.sources import Source
from privimage.errors import UserError
from privimage.progress import Progress, say
from privimage.rundir import read_json, write_json, write_whole


@dataclass(frozen=True)
class Sidecar:
    """What is known of a store without opening it. `shape` is (C, H, W)."""

    count: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    size: int
    sha256: str


def ffcv_missing() -> str:
    """Why FFCV cannot be used here; empty if it can."""
    if importlib.util.find_spec("ffcv") is None:
        return "FFCV is not installed"
    try:
        import ffcv.libffcv  # noqa: F401
    except (ImportError, OSError) as error:
        return f"FFCV's compiled part does not load ({error})"
    return ""


def write(source: Source, path: Path, resolution: int, channels: int, workers: int = 1, skip_bad: bool = False) -> tuple[Sidecar, list[str]]:
    """Write a store (`path` ends in .beton or .npy) and its sidecar; returns it and the names of images that were left out.

    Raises UserError for an image that does not decode, unless `skip_bad`, and for a .beton where FFCV is missing.
    """
    if path.suffix not in (".beton", ".npy"):
        raise UserError(f"{path}: a store ends in .beton or .npy")
    if path.suffix == ".beton" and (missing := ffcv_missing()):
        raise UserError(f"{path}: {missing}; see `make install`, or write a .npy, which needs no compiled part")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = np.arange(len(source))
    bad: list[str] = []
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        while True:
            failed = (_write_beton if path.suffix == ".beton" else _write_npy)(source, kept, temporary, resolution, channels, workers)
            if not len(failed):
                break
            if not skip_bad:
                source.image(int(failed[0]), resolution, channels)
                raise UserError(f"{source.names[failed[0]]}: could not be read a moment ago; run again")
            bad += [source.names[i] for i in failed]
            kept = np.setdiff1d(kept, failed)
            if not len(kept):
                raise UserError(f"{path}: not one image could be decoded")
        sidecar = Sidecar(len(kept), (channels, resolution, resolution), source.classes, temporary.stat().st_size, _sha256(temporary))
        path.with_name(f"{path.name}.json").unlink(missing_ok=True)  # never a new file beside an old sidecar
        np.save(labels := temporary.with_suffix(".labels.npy"), source.labels[kept].astype(np.int64))
        write_whole(path.with_name(f"{path.name}.labels.npy"), labels.read_bytes())
        labels.unlink()
        os.replace(temporary, path)
        write_json(path.with_name(f"{path.name}.json"), asdict(sidecar))
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
    if bad:
        say(f"{path}: left out {len(bad)} images that do not decode, the first is {bad[0]}")
    return sidecar, bad


class _Guarded:
    """A data set for FFCV's writer whose workers must not raise: it waits for a dead worker for ever."""

    def __init__(self, source: Source, kept: np.ndarray, resolution: int, channels: int):
        self.source, self.kept, self.shape = source, kept, (channels, resolution, resolution)
        self.failed = Array("b", len(kept), lock=False)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        index = int(self.kept[position])
        try:
            return self.source.image(index, self.shape[1], self.shape[0])[0], int(self.source.labels[index])
        except Exception:
            self.failed[position] = 1
            return np.zeros(self.shape, np.uint8), 0


def _write_beton(source: Source, kept: np.ndarray, path: Path, resolution: int, channels: int, workers: int) -> np.ndarray:
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter

    guarded = _Guarded(source, kept, resolution, channels)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    fields = {"image": NDArrayField(np.dtype("uint8"), guarded.shape), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=max(workers, 1)).from_indexed_dataset(guarded)
    return kept[np.flatnonzero(np.frombuffer(guarded.failed, dtype=np.int8))]


def _write_npy(source: Source, kept: np.ndarray, path: Path, resolution: int, channels: int, workers: int) -> np.ndarray:
    guarded = _Guarded(source, kept, resolution, channels)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(kept), *guarded.shape))
    with Progress(path.name.split(".")[1], len(kept)) as bar:
        for position in range(len(kept)):
            images[position] = guarded[position][0]
            bar.advance()
    images.flush()
    return kept[np.flatnonzero(np.frombuffer(guarded.failed, dtype=np.int8))]


def verify(path: Path) -> Sidecar:
    """The sidecar of a store whose file is as it was written. Raises UserError for a missing, truncated or altered file."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    sidecar = read_json(path.with_name(f"{path.name}.json"))
    known = Sidecar(sidecar["count"], tuple(sidecar["shape"]), tuple(sidecar["classes"]), sidecar["size"], sidecar["sha256"])
    status = path.stat()
    if status.st_size != known.size:
        raise UserError(f"{path}: truncated or altered ({status.st_size} bytes, {known.size} were written); prepare it again")
    if _sha256_of(path, status.st_mtime_ns) != known.sha256:
        raise UserError(f"{path}: altered (its digest does not match); prepare it again")
    return known


@lru_cache(maxsize=8)
def _sha256_of(path: Path, modified: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def labels(path: Path) -> np.ndarray:
    """The labels of a store, int64 (N,), without touching the images."""
    try:
        return np.load(path.with_name(f"{path.name}.labels.npy"))
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path}.labels.npy: missing or damaged; prepare the set again") from None


def read(path: Path, indices: np.ndarray) -> np.ndarray:
    """Some images of a store, uint8 (len(indices), C, H, W), in the order of `indices`."""
    sidecar = read_json(path.with_name(f"{path.name}.json"))
    shape = tuple(sidecar["shape"])
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")[indices]
    from ffcv.reader import Reader

    starts = Reader(str(path)).metadata["f0"][indices]
    content = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(np.prod(shape))
    images = np.empty((len(indices), *shape), np.uint8)
    for image, start in zip(images, starts.tolist(), strict=True):
        image[:] = content[start : start + length].reshape(shape)
    return images
