"""Arrays in files that are larger than memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np


class ArrayFile:
    """An array in a .npy file, of which rows are read when they are asked for.

    ``array[5:9]`` and ``array[indices]`` are ordinary arrays, read by the system's positioned reads: unlike
    those of a memory map, the pages do not count as memory of this process. Threads may read at once.
    """

    def __init__(self, path: Path):
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self._offset, self._row = mapped.offset, mapped[:1].nbytes
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows by a slice of step 1, or by indices int64 (n,): (n, ...)."""
        if isinstance(key, slice):
            start, end, step = key.indices(len(self))
            if step != 1:
                return self[np.arange(start, end, step)]
            rows = np.empty((max(0, end - start), *self.shape[1:]), self.dtype)
            self._read(rows, start)
            return rows
        indices = np.asarray(key)
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        if len(indices) and (np.diff(indices) == 1).all():
            self._read(rows, int(indices[0]))  # neighbours: one read
            return rows
        for row, index in zip(rows, indices.tolist(), strict=True):
            self._read(row[None], index)
        return rows

    def _read(self, rows: np.ndarray, start: int) -> None:
        left = rows.reshape(-1).view(np.uint8).data
        at = self._offset + start * self._row
        # A read may return less than was asked for.
        while left:
            count = os.preadv(self._file, [left], at)
            if not count:
                raise OSError(f"{self.path}: ends before row {start + len(rows)}")
            left, at = left[count:], at + count


Images = ArrayFile | np.ndarray  # uint8 (N, C, H, W)
