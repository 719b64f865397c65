"""Image sets that are decoded one image at a time, by several processes where that helps."""

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image

from privimage.data import transforms
from privimage.errors import UserError

CHUNK = 64  # images that a worker process is asked for at once
NOT_8_BIT = ("I", "F", "I;16", "I;16B", "I;16L")  # Pillow would cut these off at 255


@dataclass(frozen=True)
class Source:
    """An image set on disk or in memory.

    `whole(i)` is the i-th image, `names[i]` identifies it in messages, `labels[i]` is its class.
    """

    whole: Callable[[int], Image.Image]
    names: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    side: Callable[[Image.Image], int] = transforms.shorter_side

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int, resolution: int, channels: int) -> tuple[np.ndarray, bytes]:
        """The image as uint8 (C, resolution, resolution), and the SHA-256 of its size and RGB pixels before
        crop and resize.

        Raises UserError that names an image which does not decode or has not 8 bits a channel.
        """
        try:
            whole = self.whole(index)
            whole.load()
            if whole.mode in NOT_8_BIT:
                raise ValueError(f"its pixels are {whole.mode}, not 8 bits")
            colour = whole.convert("RGB")
            side = self.side(whole)
        except Exception as error:  # decoders raise whatever they like on damaged files
            raise UserError(
                f"{self.names[index]}: not readable as an image "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from None
        # Before crop and resize: the fingerprint of a set does not depend on the resolution it is used at.
        digest = hashlib.sha256(f"{colour.size}".encode() + colour.tobytes()).digest()
        return transforms.to_array(colour if channels == 3 else whole.convert("L"), side, resolution), digest


@dataclass(frozen=True)
class Decoded:
    """The `index`-th image and its digest, see `Source.image`.

    Or, where it does not decode, no image and the problem in one line.
    """

    index: int
    image: np.ndarray | None
    digest: bytes = b""
    problem: str = ""


@dataclass(frozen=True)
class Task:
    """What all images are decoded from and to."""

    source: Source
    resolution: int
    channels: int

    def one(self, index: int) -> Decoded:
        try:
            return Decoded(index, *self.source.image(index, self.resolution, self.channels))
        except UserError as error:
            return Decoded(index, None, problem=str(error))


_inherited: list[Task] = []  # in a worker process: what it was forked with


def decoded(source: Source, resolution: int, channels: int, workers: int) -> Iterator[Decoded]:
    """All images in order. `workers` processes decode ahead; 0 decodes in this one.

    Raises UserError when a worker process dies.
    """
    task = Task(source, resolution, channels)
    if workers == 0:
        yield from map(task.one, range(len(source)))
        return
    # Forked workers inherit the source: nothing is pickled on the way in, so sets in memory are not copied.
    context = multiprocessing.get_context("fork")
    pending: deque[Future[list[Decoded]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_inherited.append, initargs=(task,)) as pool:
        try:
            # Chunks are handed out and collected in order, so that results need no sorting.
            for start in range(0, len(source), CHUNK):
                pending.append(pool.submit(_chunk, start))
                if len(pending) > 3 * workers:  # bounded, or a slow writer would fill the memory
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that decodes images was killed (out of memory?); try fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunk(start: int) -> list[Decoded]:
    task = _inherited[-1]
    return [task.one(index) for index in range(start, min(start + CHUNK, len(task.source)))]
