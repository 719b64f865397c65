"""FFCV: whether it is there, and what its files hold."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from privimage import torchvision_operators

if TYPE_CHECKING:
    from ffcv.reader import Reader


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


def labels(path: Path) -> np.ndarray:
    """The labels of a .beton, int64 (N,)."""
    return _reader(path).metadata["f1"].astype(np.int64)


def images(path: Path, indices: np.ndarray, shape: tuple[int, int, int], jpeg: bool) -> np.ndarray:
    """The images of a shape (C, H, W) at `indices` of a .beton, uint8 (len(indices), C, H, W)."""
    reader, content = _reader(path), np.memmap(path, dtype=np.uint8, mode="r")
    places = reader.metadata["f0"][indices]
    if jpeg:
        return _decoded(content, reader.alloc_table, places["data_ptr"], shape)
    # Images lie at known offsets in the file: a sliding window over its bytes is an array of all of them.
    return np.lib.stride_tricks.sliding_window_view(content, int(np.prod(shape)))[places].reshape(-1, *shape)


def _decoded(
    content: np.ndarray, table: np.ndarray, starts: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """The images of the JPEGs that begin at `starts` in the bytes of a file.

    By FFCV's own decoder, so that they are those of a stream to the bit.
    """
    from ffcv.libffcv import imdecode

    order = np.argsort(table["ptr"])
    sizes = table["size"][order][np.searchsorted(table["ptr"], starts, sorter=order)]
    decoded = np.empty((len(starts), *shape), np.uint8)
    pixels = np.empty((*shape[1:], 3), np.uint8)  # of grey images too
    for image, start, size in zip(decoded, starts.tolist(), sizes.tolist(), strict=True):
        imdecode(content[start : start + size], pixels, *shape[1:], *shape[1:])
        image[:] = pixels[..., : shape[0]].transpose(2, 0, 1)
    return decoded


def _reader(path: Path) -> "Reader":
    """FFCV's tables of a .beton. `metadata`: f0, where each image is in the file, and f1, its label."""
    import_ffcv()
    from ffcv.reader import Reader

    return Reader(str(path))
