"""Image sets that are decoded one image at a time, by several processes where that helps."""

import errno
import hashlib
import json
import multiprocessing.context
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from privimage.data import pixels, transforms
from privimage.data.pixels import Values
from privimage.data.transforms import Form
from privimage.errors import UserError
from privimage.storage import owner_only

SHORT = 1000  # characters of what a worker process returns: less than a pipe takes at once
LOOK_SECONDS = 0.5  # between two looks of a worker process at the one that it works for
# Pixels from which on Pillow warns; it refuses images with twice as many, which are small files that would
# fill the memory. Slides and maps have hundreds of millions.
Image.MAX_IMAGE_PIXELS = 1 << 28
# What batch systems send to all processes of a job: the ranks decide what follows from it, not the workers.
IGNORED = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


@dataclass(frozen=True)
class Source:
    """An image set on disk or in memory.

    `opener(items[i])` is the i-th image, `names[i]` identifies it in messages, `labels[i]` is its class, and
    `groups[i]` names whom it belongs to, where the set says it (`data.sensitive.group`). `notes` are lines
    for the user: what is left out, and how.

    Items are what worker processes get (paths, arrays); `opener` and `side` are functions of a module, which
    worker processes import.
    """

    items: Any  # a sequence, of which slices can be taken; an array of images that are in memory
    opener: Callable[[Any], Image.Image | Values]
    names: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    side: Callable[[Image.Image], int] = transforms.shorter_side
    groups: Sequence[str] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def digest_of_names(self) -> bytes:
        """SHA-256 of the names in order."""
        return hashlib.sha256("\0".join(self.names).encode()).digest()

    def digest_of_labels(self) -> bytes:
        """SHA-256 of the number of images, the classes, and the labels and groups in order."""
        groups = None if self.groups is None else list(self.groups)
        digest = hashlib.sha256(json.dumps([len(self), self.classes, groups]).encode())
        digest.update(np.ascontiguousarray(self.labels, np.int64).data)
        return digest.digest()

    def image(self, index: int, form: Form) -> tuple[np.ndarray, bytes]:
        """The image as uint8 (C, resolution, resolution), and its digest; see `Decoder`.

        Raises UserError that names an image which does not decode, or needs a setting to be read.
        """
        return Decoder(self, form).decode(self.items[index], self.names[index])


class DamagedError(UserError):
    """An image that does not decode; `skip_bad` leaves it out."""


class Decoder:
    """How the items of a source become arrays uint8 (channels, resolution, resolution).

    With `draft`, JPEGs are decoded at a half, a quarter or an eighth of their size where twice the resolution
    is left, which is several times as fast; there is no digest then. Sensitive sets need the digest, the
    SHA-256 of an image's size and pixels as they were found: it identifies them in any form. With `jpeg`,
    arrays are kept as JPEGs in shards.
    """

    def __init__(self, source: Source, form: Form, draft: bool = False, jpeg: bool = False):
        self.opener, self.side, self.form, self.draft = source.opener, source.side, form, draft
        self.jpeg = jpeg

    def decode(self, item: Any, name: str) -> tuple[np.ndarray, bytes]:
        """The array and the digest of an item.

        Raises DamagedError with `name` for one that does not decode, and UserError for one that needs a
        setting, or that the machine could not read.
        """
        try:
            return self._decoded(item)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from None
        except MemoryError:
            raise UserError(f"{name}: too large for the memory of this machine") from None
        except Exception as error:  # decoders raise whatever they like on damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # A disk that fails, or rights that are missing, do not make an image damaged.
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise UserError(f"{name}: not readable ({error.strerror})") from None
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "of no kind that Pillow knows"
            if isinstance(error, FileNotFoundError):
                link = Path(name).is_symlink()
                reason = "a link to a file that is not there" if link else "no such file"
            raise DamagedError(f"{name}: not readable as an image ({reason})") from None

    def _decoded(self, item: Any) -> tuple[np.ndarray, bytes]:
        whole = self.opener(item)
        side, deep = None, False
        if isinstance(whole, Image.Image):
            side, width, deep = self.side(whole), whole.width, pixels.too_deep(whole)
            if self.draft:
                whole.draft("RGB", (2 * self.form.resolution, 2 * self.form.resolution))
                side = round(side * whole.width / width)
            whole.load()
        digest = b"" if self.draft else pixels.digest(whole)
        image = pixels.prepared(whole, self.form, deep)
        return transforms.to_array(image, self.side(image) if side is None else side, self.form), digest


class Workers:
    """Processes that decode, a context manager.

    They are started by a server process (multiprocessing's forkserver), not forked from this one, whose
    threads, locks and file descriptors they must not inherit; and they end when this process does. Without
    any (`count` 0) the work is done in this process.
    """

    def __init__(self, count: int):
        self.count = count
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.count:
            self.pool = ProcessPoolExecutor(
                self.count, _served(), initializer=_begin, initargs=(os.getpid(),)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def map(self, function: Callable[..., str], arguments: Iterable[tuple]) -> list[str]:
        """`function` of each tuple of arguments, in order.

        Results must be short (`SHORT`): a process that is killed while it hands over a longer one would leave
        half of it, and the pool would wait for the rest for ever. Raises UserError when a process dies.
        """
        if self.pool is None:
            return [function(*values) for values in arguments]
        try:
            futures = [self.pool.submit(_short, function, values) for values in arguments]
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(
                "a process that decodes images was killed (out of memory?); try fewer workers"
            ) from None


class _Process(multiprocessing.context.ForkServerProcess):
    """A process that does not import the program it is started by.

    multiprocessing imports it, for functions that are defined there. A user's script that calls
    `privimage.run` in its last line would begin another run in each process.
    """

    def start(self) -> None:
        program = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = program


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def _served() -> _Context:
    """A context whose processes come from a server process, which is started here if there is none."""
    context = _Context()
    context.set_forkserver_preload([__name__])
    # What is ignored at its start the server ignores, and so do all processes that come from it.
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return context
    before = {number: signal.signal(number, signal.SIG_IGN) for number in IGNORED}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return context


def _begin(parent: int) -> None:
    owner_only.close_process()  # the server may be older than this process's own restrictions
    # Blocked here and in all later threads, so that the thread below receives it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _short(function: Callable[..., str], values: tuple) -> str:
    return function(*values)[:SHORT]


def _end_with(parent: int) -> None:
    """End this process when `parent` asks for it, or has ended by whatever signal.

    A worker that outlives a killed rank would keep the node's cores and memory busy. A SIGTERM that comes
    from elsewhere (a batch system tells all processes of a job) is for the rank to act on.
    """
    handle = None
    with suppress(OSError):  # it has ended already, or the kernel has no such call
        handle = os.pidfd_open(parent)
    while True:
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
        gone = select.select([handle], [], [], 0)[0] if handle else not Path(f"/proc/{parent}").exists()
        if gone or (told is not None and told.si_pid == parent):
            os._exit(1)
