"""A set decoded in shards: files of a few hundred images that several ranks write, and that survive a kill.

A shard is written whole or not at all. What is there already is not decoded again, whatever number of ranks
wrote it, and the shards in order are the set in order.
"""

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from privimage.data.decode import DamagedError, Decoder, Source, Workers
from privimage.data.transforms import to_jpeg
from privimage.distributed.agreement import gathered
from privimage.distributed.microbatch import block_size
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.storage.files import read_json, write_json, write_whole
from privimage.telemetry.progress import Progress

SHARD = 512  # images, fewer of large ones: a few seconds of work, so that a stop does not wait for long
SHOWN = 4  # shards from which on progress is shown; fewer are done before anyone looks


@dataclass(frozen=True)
class Shard:
    """Some images in order, their indices int64 (n,) and digests uint8 (n, 32 or 0).

    An image is a flat array uint8: its pixels (C H W,), or its JPEG. `problems` has a line for each image
    that did not decode and is left out.
    """

    images: list[np.ndarray]
    indices: np.ndarray
    digests: np.ndarray
    problems: tuple[str, ...]


def decode(
    source: Source,
    folder: Path,
    decoder: Decoder,
    workers: int | Literal["auto"],
    world: World,
    label: str,
    skip_bad: bool = False,
) -> None:
    """Decode all images of a source into shards below `folder`; all ranks of `world` call it together.

    Shards of another set, or of another shape, that lie there are removed first. Raises UserError that names
    an image which does not decode, unless `skip_bad`; Stopped when a stop was requested, with the finished
    shards kept.
    """
    size = shard_size(decoder.form.resolution)
    starts = range(0, len(source), size)
    workers = world.cores if workers == "auto" else workers
    names = source.digest_of_names()
    if world.is_main:
        _claim(folder, decoder, skip_bad, names, source.digest_of_labels())
    # The main rank tells what is there: another node's view of a shared folder may be older.
    there = world.broadcast_object({path.name for path in folder.iterdir()} if world.is_main else None)
    left = [start for start in starts if _name(start) not in there]
    shown = world.is_main and len(left) >= SHOWN
    # Shards are counted in the main rank's list of images. Where a node lists its copy otherwise, its ranks
    # leave the work to the others: their shards would hold other images.
    lists = gathered(world, names)
    at_work = [rank for rank, digest in enumerate(lists) if digest == lists[0]]
    place = at_work.index(world.rank) if world.rank in at_work else len(left)
    with (
        Workers(0 if isinstance(source.items, np.ndarray) else workers) as processes,
        Progress(label, len(source), max(0, len(source) - len(left) * size), shown) as bar,
    ):
        # In turns of a shard per process, after which all ranks know whether one of them was asked to stop.
        turn = max(1, processes.count) * len(at_work)
        for begun in range(0, len(left), turn):
            mine = left[begun : begun + turn][place :: len(at_work)]
            parts = [(start, min(start + size, len(source))) for start in mine]
            tasks = [
                (decoder, folder / _name(a), a, source.items[a:b], source.names[a:b], skip_bad)
                for a, b in parts
            ]
            for problem in processes.map(_write, tasks):
                if problem:
                    raise UserError(problem)
            if stop.agreed(world):
                raise Stopped(f"{label}: what was decoded is kept; run again to go on")
            bar.advance(min(size * turn, len(source) - bar.done))
    world.barrier()


def read(source: Source, folder: Path, resolution: int) -> Iterator[Shard]:
    """The shards of a set that was decoded to a resolution, in order."""
    for start in range(0, len(source), shard_size(resolution)):
        with np.load(folder / _name(start), allow_pickle=False) as file:
            content, problems = file["images"], tuple(map(str, file["problems"]))
            ends = np.cumsum([0, *file["sizes"]]).tolist()
            images = [content[begin:end] for begin, end in pairwise(ends)]
            yield Shard(images, file["indices"], file["digests"], problems)


def found(source: Source, folder: Path, resolution: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Indices int64 (n,), digests uint8 (n, 32) and problems of all shards in order, without their images."""
    problems: list[str] = []
    indices, digests = [], [np.zeros((0, 32), np.uint8)]
    for start in range(0, len(source), shard_size(resolution)):
        with np.load(folder / _name(start), allow_pickle=False) as file:
            indices.append(file["indices"])
            digests.append(file["digests"].reshape(len(indices[-1]), 32))
            problems += map(str, file["problems"])
    return np.concatenate(indices), np.concatenate(digests), problems


def shard_size(resolution: int) -> int:
    """How many images a shard has."""
    return block_size((resolution, resolution), SHARD)


def _name(start: int) -> str:
    return f"{start:09d}.npz"


def _claim(folder: Path, decoder: Decoder, skip_bad: bool, *digests: bytes) -> None:
    """Make the folder of the shards, and empty it if they are of a set of other `digests`."""
    told = {"set": [digest.hex() for digest in digests], "form": decoder.form.to_dict(), "shard": SHARD}
    told |= {"draft": decoder.draft, "jpeg": decoder.jpeg, "skip_bad": skip_bad}
    identity = folder / "source.json"
    if folder.exists() and (not identity.exists() or read_json(identity) != told):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(identity, told)


def _write(
    decoder: Decoder, path: Path, start: int, items: Sequence[Any], names: Sequence[str], skip_bad: bool
) -> str:
    """Decode the images from number `start` on into a shard.

    Returns the first problem, for which nothing is written, or an empty string.
    """
    images: list[np.ndarray] = []
    indices: list[int] = []
    digests: list[np.ndarray] = []
    problems: list[str] = []
    for index, (item, name) in enumerate(zip(items, names, strict=True), start):
        try:
            image, digest = decoder.decode(item, name)
        except UserError as error:
            if not (skip_bad and isinstance(error, DamagedError)):
                return str(error)
            problems.append(str(error))
            continue
        images.append(to_jpeg(image) if decoder.jpeg else image.reshape(-1))
        indices.append(index)
        digests.append(np.frombuffer(digest, np.uint8))
    np.savez(
        buffer := io.BytesIO(),
        images=np.concatenate([np.empty(0, np.uint8), *images]),
        sizes=np.array([len(image) for image in images], np.int64),
        indices=np.array(indices, np.int64),
        digests=np.stack(digests) if digests else np.zeros((0, 0), np.uint8),
        problems=np.array(problems, np.str_),
    )
    try:
        write_whole(path, buffer.getbuffer())
    except UserError as error:
        return str(error)
    return ""
