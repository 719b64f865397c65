"""Batches of public images for training on any number of ranks, resumable at any step."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.data import store

SPAN = 256  # batches that FFCV is given at once: starting it anew takes time


class PublicStream:
    """An endless sequence of batches over the images at `indices` of a store, with `labels` given by the caller.

    The images are visited in one random permutation after another, derived from (seed, epoch). Step t takes the next global
    batch; rank r of W takes the r-th part of it. So no image is left out or repeated within an epoch, the global batches do
    not depend on how the work is shared, and any step can be returned to.
    """

    def __init__(
        self, path: Path, indices: np.ndarray, labels: np.ndarray, batch_size: int, rank: int, size: int, device: torch.device, seed: int, workers: int
    ):
        """`batch_size` is that of one rank. Raises UserError for a store that is missing, truncated or altered."""
        store.verify(path)
        self.path, self.indices, self.labels = path, np.asarray(indices), torch.as_tensor(labels)
        self.batch_size, self.rank, self.size, self.device, self.seed, self.workers = batch_size, rank, size, device, seed, workers
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def batches(self, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from `step` on, without end: images uint8 (B, C, H, W) and labels int64 (B,) on the device."""
        images = self._from_npy(step) if self.path.suffix == ".npy" else self._from_beton(step)
        for offset, batch in enumerate(images):
            labels = self.labels[self.positions(step + offset)]
            yield batch.to(self.device), labels.to(self.device)

    def positions(self, step: int) -> np.ndarray:
        """Which of the indices this rank takes at a step: int64 (B,)."""
        start = (step * self.size + self.rank) * self.batch_size
        place = np.arange(start, start + self.batch_size)
        epochs, within = place // len(self.indices), place % len(self.indices)
        return np.concatenate([self._permutation(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)])

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.indices))

    def _from_npy(self, step: int) -> Iterator[Tensor]:
        images = np.load(self.path, mmap_mode="r")
        while True:
            yield torch.from_numpy(images[self.indices[self.positions(step)]])
            step += 1

    def _from_beton(self, step: int) -> Iterator[Tensor]:
        import numba

        numba.config.THREADING_LAYER = "omp"  # the work queue aborts when two loaders run
        from ffcv.fields.decoders import NDArrayDecoder
        from ffcv.loader import Loader
        from ffcv.transforms import ToTensor

        order = _order(self, step)
        loader = Loader(
            str(self.path),
            batch_size=self.batch_size,
            num_workers=max(self.workers, 1),
            os_cache=True,
            order=order,
            pipelines={"image": [NDArrayDecoder(), ToTensor()], "label": None},
        )
        while True:
            for (images,) in loader:
                yield images.clone()  # FFCV fills the same buffer again
            order.step += SPAN


def _order(stream: PublicStream, step: int):
    """FFCV wants an instance of its class that answers itself when called with the loader."""
    from ffcv.traversal_order.base import TraversalOrder

    class Order(TraversalOrder):
        def __init__(self) -> None:
            self.step = step

        def __call__(self, loader) -> "Order":
            return self

        def sample_order(self, epoch: int) -> np.ndarray:
            spans = [stream.indices[stream.positions(at)] for at in range(self.step, self.step + SPAN)]
            return np.concatenate(spans).astype(np.uint64)

    return Order()
