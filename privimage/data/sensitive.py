"""The sensitive set where private steps take their images from, and the random numbers of their losses."""

import statistics
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from privimage.storage.array_file import ArrayFile, Images
from privimage.telemetry import memory

Residence = Literal["device", "host", "disk"]
AHEAD = 2  # physical batches that are read while one is computed
# Shares of the free memory that the set may take: the rest is for gradients and activations.
OF_DEVICE, OF_HOST = 0.25, 0.5


class StepData(Dataset):
    """What private steps draw from: batches by lists of indices, which may be empty."""

    def begin(self, indices: list[int], size: int, seed: int) -> None:
        """A step begins, whose batches will be the pieces of `indices` of at most `size`, in order.

        What is random in them comes from `seed`, which no other step has.
        """


class SensitiveSet(StepData):
    """The sensitive images uint8 (N, C, H, W) and labels int64 (N,), as batches on one device.

    A batch is (images, labels, indices); an empty batch is a batch. The images are the same wherever they
    reside: all on the device, all in the memory of the host, or in their file, from which those of the next
    batches are read ahead.
    """

    def __init__(self, images: Images, labels: np.ndarray, device: torch.device, residence: Residence):
        self.device, self.labels = device, torch.from_numpy(labels).to(device)
        self.file: ArrayFile | None = None
        self.images: Tensor | None = None
        if residence == "disk" and isinstance(images, ArrayFile):
            self.file = images
        else:
            self.images = torch.from_numpy(images[:])
            if residence == "device":
                self.images = self.images.to(device)
            elif device.type == "cuda":
                self.images = self.images.pin_memory()
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="sensitive")
        self.waiting: deque[list[int]] = deque()
        self.reading: deque[tuple[list[int], Future[np.ndarray]]] = deque()

    def __len__(self) -> int:
        return len(self.labels)

    def begin(self, indices: list[int], size: int, seed: int) -> None:
        """See `StepData.begin`; nothing is random."""
        if self.file is None:
            return
        self.reading.clear()
        self.waiting = deque(indices[start : start + size] for start in range(0, len(indices), size))
        self._read_ahead(self.file)

    def _read_ahead(self, file: ArrayFile) -> None:
        while self.waiting and len(self.reading) <= AHEAD:
            piece = self.waiting.popleft()
            self.reading.append((piece, self.reader.submit(file.__getitem__, piece)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.tensor(indices, dtype=torch.int64, device=self.device)
        if self.images is not None:
            images = self.images[at.to(self.images.device)].to(self.device, non_blocking=True)
        else:
            images = self._read(indices)
        return images, self.labels[at], at

    def _read(self, indices: list[int]) -> Tensor:
        assert self.file is not None  # the images are in memory or in a file
        # The piece that was announced is on its way; anything else is read now.
        if self.reading and self.reading[0][0] == indices:
            rows = self.reading.popleft()[1].result()
            self._read_ahead(self.file)
        else:
            rows = self.file[indices]
        return torch.from_numpy(rows).to(self.device)


class GroupedSet(StepData):
    """The groups of a sensitive set: group g is all images i with groups[i] = g, numbered from 0.

    A batch is (images (B, m, C, H, W), labels (B, m), indices (B,) of groups), with m images of each group.
    """

    def __init__(self, images: SensitiveSet, groups: np.ndarray, per_group: int):
        """`groups` int64 (N,), one for each image; `per_group` is m."""
        self.images, self.per_group = images, per_group
        self.order = np.argsort(groups, kind="stable")  # images, group by group
        self.sizes = np.bincount(groups)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.chosen, self.places = np.zeros((0, per_group), np.int64), dict[int, int]()

    def __len__(self) -> int:
        return len(self.sizes)

    def choose(self, groups: list[int], seed: int) -> np.ndarray:
        """m images of each group, int64 (B, m): all different where it has as many, else each as often as any
        other, or once more.

        Those of a group are a function of the seed, its number and its images, whatever other groups there
        are.
        """
        at = np.array(groups, np.int64)
        sizes = self.sizes[at]
        # The images of these groups, one group after the other. Each is shuffled from the front, all at once
        # (Fisher and Yates), as far as m images; one that has fewer begins again.
        starts = np.cumsum(sizes) - sizes
        images = self.order[np.arange(sizes.sum()) + np.repeat(self.starts[at] - starts, sizes)]
        seeds, chosen = _mix(seed, at), np.empty((len(at), self.per_group), np.int64)
        for draw in range(self.per_group):
            done = draw % sizes
            front = starts + done
            other = front + (_mix(seeds, draw) % (sizes - done).astype(np.uint64)).astype(np.int64)
            images[front], images[other] = images[other], images[front]
            chosen[:, draw] = images[front]
        return chosen

    def begin(self, indices: list[int], size: int, seed: int) -> None:
        """See `StepData.begin`; which images of a group take part is drawn anew in each step."""
        self.chosen = self.choose(indices, seed)
        self.places = {group: place for place, group in enumerate(indices)}
        self.images.begin(self.chosen.ravel().tolist(), size * self.per_group, seed)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self.chosen[[self.places[group] for group in indices]]
        images, labels, _ = self.images.__getitems__(chosen.ravel().tolist())
        shape = (len(indices), self.per_group)
        at = torch.tensor(indices, dtype=torch.int64, device=self.images.device)
        return images.view(*shape, *images.shape[1:]), labels.view(shape), at


def residence(wanted: str, images: Images, device: torch.device, ranks_of_node: int) -> Residence:
    """Where the images go: `wanted`, or for `auto` the first of device, host and disk that has room.

    `ranks_of_node` processes share the memory of the host. Differs between ranks where their memory does.
    """
    if wanted in ("device", "host", "disk"):
        return wanted  # type: ignore[return-value]
    size = int(np.prod(images.shape))
    host = memory.available() / ranks_of_node
    if device.type == "cuda":
        if size <= OF_DEVICE * torch.cuda.mem_get_info(device)[0]:
            return "device"
        return "host" if size <= OF_HOST * host else "disk"
    return "device" if size <= OF_DEVICE * host else "disk"


class ImageDraws:
    """Random numbers that belong to an image, independent of the batch and the rank that process it.

    One generator is seeded again for each (seed, index); the seed changes with every step.
    """

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device)

    def normal(self, seed: int, indices: Tensor, size: int) -> Tensor:
        """Standard normal numbers (len(indices), size) for the images at `indices`."""
        draws = torch.empty(len(indices), size, device=self.generator.device)
        # One generator seeded per image: the draw of an image is the same in any batch, on any rank.
        for row, own in zip(draws, _mix(seed, indices.cpu().numpy()).tolist(), strict=True):
            self.generator.manual_seed(own)
            row.normal_(generator=self.generator)
        return draws


def _mix(seeds: int | np.ndarray, indices: int | np.ndarray) -> np.ndarray:
    """Hashes uint64 (n,) of pairs of numbers below 2^64, of which one or both are arrays (n,).

    The finaliser of SplitMix64.
    """
    seeds, indices = (np.atleast_1d(np.asarray(one)).astype(np.uint64) for one in (seeds, indices))
    value = seeds + (indices + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def dropped(normal: Tensor, probability: float) -> Tensor:
    """Mask (B,) of standard normal draws (B,) that fall into the lower tail of `probability`."""
    return (
        normal < statistics.NormalDist().inv_cdf(probability)
        if probability
        else torch.zeros_like(normal, dtype=torch.bool)
    )
