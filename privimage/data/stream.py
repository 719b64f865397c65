"""Batches of public images for training on any number of ranks, resumable at any step."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from queue import Empty

import numpy as np
import torch
from torch import Tensor

from privimage.data import beton, store
from privimage.errors import UserError

# batches of one pass of FFCV's loader: starting a pass takes milliseconds, short epochs would feel it
SPAN = 256


class PublicStream:
    """An endless sequence of batches over the images at `indices` of a store, with `labels` given by the
    caller.

    The images are visited in one random permutation after another, derived from (seed, epoch). Step t takes
    the next global batch; rank r of W takes the r-th part of it. So within an epoch no image is left out or
    repeated, a global batch does not depend on how the work is shared, sets smaller than a batch need no
    special case, and any step can be returned to.
    """

    def __init__(
        self,
        path: Path,
        indices: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        rank: int,
        size: int,
        device: torch.device,
        seed: int,
        workers: int,
    ):
        """`labels` int64 has one label for each of `indices`; `batch_size` is that of one rank.

        Raises UserError for a store that is missing or truncated, and for indices that it does not hold.
        """
        self.sidecar = store.described(path)
        count = self.sidecar.count
        if len(indices) == 0 or np.min(indices) < 0 or np.max(indices) >= count:
            raise UserError(
                f"{path}: holds {count} images, and {len(indices)} were asked for that are not all among them"
            )
        if len(labels) != len(indices):
            raise ValueError(f"{len(indices)} indices with {len(labels)} labels")
        self.path, self.indices, self.labels = (
            path,
            np.asarray(indices),
            torch.as_tensor(np.asarray(labels, dtype=np.int64)),
        )
        self.batch_size, self.rank, self.size, self.device, self.seed, self.workers = (
            batch_size,
            rank,
            size,
            device,
            seed,
            workers,
        )
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)
        self.waited = 0.0  # seconds that training has waited for images

    def batches(self, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches from `step` on, forever: images uint8 (B, C, H, W), labels int64 (B,), on device."""
        # Labels are looked up here, not read from the file: the caller has replaced them (selected classes).
        images = self._from_npy(step) if self.path.suffix == ".npy" else self._from_beton(step)
        for at in itertools.count(step):
            asked = time.perf_counter()
            batch = next(images)
            self.waited += time.perf_counter() - asked
            yield batch.to(self.device), self.labels[self.positions(at)].to(self.device)

    def positions(self, step: int) -> np.ndarray:
        """Which of the indices this rank takes at a step: int64 (B,)."""
        # Places in the endless sequence of permutations: epoch and position within it.
        start = (step * self.size + self.rank) * self.batch_size
        place = np.arange(start, start + self.batch_size)
        epochs, within = np.divmod(place, len(self.indices))
        return np.concatenate(
            [self._permutation(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.indices))

    def _from_npy(self, step: int) -> Iterator[Tensor]:
        images = np.load(self.path, mmap_mode="r")["image"]
        while True:
            yield torch.from_numpy(images[self.indices[self.positions(step)]])
            step += 1

    def _from_beton(self, step: int) -> Iterator[Tensor]:
        beton.import_ffcv()
        with _threads_of_torch_kept():
            loader = _loader(self.path, self.batch_size, self.workers, self.sidecar.jpeg)
            while True:
                # FFCV iterates over an order that is fixed per pass: a span of steps at a time.
                loader.traversal_order.order = np.concatenate(
                    [self.indices[self.positions(at)] for at in range(step, step + SPAN)]
                )
                batches = iter(loader)
                try:
                    for _ in range(SPAN):
                        _wait(batches)
                        yield self._images(next(batches)[0])
                finally:
                    _end(batches)
                step += SPAN

    def _images(self, batch: Tensor) -> Tensor:
        """A copy of a batch, whose buffer FFCV fills again, as (B, C, H, W)."""
        if not self.sidecar.jpeg:
            return batch.clone()
        # Decoded JPEGs are (B, H, W, 3), grey ones too.
        channels = self.sidecar.shape[0]
        return batch[..., :channels].permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


_patches = 0  # streams that are being read by FFCV, for which its function is replaced
_original = None


@contextmanager
def _threads_of_torch_kept() -> Iterator[None]:
    """While a stream is read, FFCV sets its own number of threads alone, and not also that of torch.

    FFCV has no setting for it, so its function is replaced meanwhile.
    """
    global _patches, _original
    import numba
    from ffcv.pipeline.compiler import Compiler

    def set_num_threads(cls: type[Compiler], count: int) -> None:
        cls.num_threads = count
        numba.set_num_threads(count)

    if _patches == 0:
        _original = Compiler.__dict__["set_num_threads"]
        Compiler.set_num_threads = classmethod(set_num_threads)
    _patches += 1
    try:
        yield
    finally:
        _patches -= 1
        if _patches == 0:
            Compiler.set_num_threads = _original


def _loader(path: Path, batch_size: int, workers: int, jpeg: bool):
    """FFCV's loader of the images alone, in the order that its `traversal_order.order` says."""
    import numba

    # The default, a work queue, aborts when two loaders run.
    numba.config.THREADING_LAYER = "threadsafe"  # type: ignore[attr-defined]
    from ffcv.fields.decoders import NDArrayDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order.base import TraversalOrder

    class Order(TraversalOrder):
        """FFCV wants an instance of its class that answers itself when called with the loader."""

        order = np.zeros(SPAN * batch_size, np.int64)

        def __init__(self) -> None:
            pass

        def __call__(self, loader: Loader) -> "Order":
            return self

        def sample_order(self, epoch: int) -> np.ndarray:
            return self.order.astype(np.uint64)

    # numba refuses more threads than it was started with.
    threads = min(max(workers, 1), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    # No transform of ours: one that raises, or that is compiled and comes after ToTensor, would never return.
    decoder = SimpleRGBImageDecoder() if jpeg else NDArrayDecoder()
    pipelines = {"image": [decoder, ToTensor()], "label": None}
    return Loader(
        str(path),
        batch_size=batch_size,
        num_workers=threads,
        os_cache=True,
        order=Order(),
        pipelines=pipelines,
    )


def _end(batches) -> None:
    """End a pass that may have been left early.

    Otherwise FFCV's thread would never end.
    """
    batches.iter_ixes = iter(())
    batches.close()
    for _ in range(
        25
    ):  # bounded: when Python itself ends, the thread no longer runs and is still called alive
        if not batches.is_alive():
            return
        with suppress(Empty):
            batches.output_queue.get(timeout=0.02)


def _wait(batches) -> None:
    """Wait for the next batch. Raises RuntimeError when FFCV's thread has ended early.

    FFCV itself would wait forever.
    """
    while batches.output_queue.empty():
        if not batches.is_alive() and batches.output_queue.empty():
            raise RuntimeError("FFCV's loader stopped early; its error is above")
        time.sleep(0.0002)
