"""Image sets in HDF5 files: a dataset of images, one of labels."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from privimage.data import labels, pixels
from privimage.data.arrays import channels_first, with_groups
from privimage.data.decode import Source
from privimage.data.npz import CLASSES, chosen
from privimage.data.pixels import Values
from privimage.data.request import Request
from privimage.errors import UserError

CACHE_BYTES = 1 << 26  # of decompressed chunks, which hold many images each


def read(request: Request) -> Source:
    """Datasets of images and labels under the usual names, of class names and groups where they are there.

    Images stay in the file until they are decoded. Raises UserError for a damaged file, missing datasets, and
    where h5py is missing.
    """
    path, columns = request.path, request.columns
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"{path}: needs h5py, which is not installed; pip install 'privimage[hdf5]'"
        ) from None
    if not h5py.is_hdf5(path):
        raise UserError(f"{path}: not an HDF5 file, or damaged")
    with h5py.File(path) as file:
        names = [name for name in file if isinstance(file[name], h5py.Dataset)]
        image, label = chosen(names, path, request)
        wanted = [image, *([label] if request.labelled else []), *([columns.group] if columns.group else [])]
        if missing := [name for name in wanted if name not in names]:
            raise UserError(f"{path}: no dataset {missing[0]!r} (found: {', '.join(names[:10])})")
        first = channels_first(file[image].shape, file[image].dtype, str(path))
        count = len(file[image])
        numbers, classes = labels.none(count)
        if request.labelled:
            raw = _array(file[label])
            if len(raw) != count:
                raise UserError(f"{path}: {count} images need as many labels; found {raw.shape}")
            numbers, classes = labels.numbered(raw, _names(file, names), str(path), request.known)
        groups = _array(file[columns.group]) if columns.group else None
    items = [(str(path), image, index, first) for index in range(count)]
    texts = [f"{path}: {image} {index}" for index in range(count)]
    source = Source(items, opened, texts, numbers, classes)
    return with_groups(source, groups, str(path)) if groups is not None else source


def _names(file: Any, names: list[str]) -> tuple[str, ...] | None:
    named = next((name for name in CLASSES if name in names), None)
    return tuple(map(str, _array(file[named]))) if named else None


def _array(dataset: Any) -> np.ndarray:
    """A dataset in memory; texts as str."""
    return dataset.asstr()[:] if dataset.dtype.kind in "OS" else dataset[:]


def opened(item: tuple[str, str, int, bool]) -> Image.Image | Values:
    """An image of a file."""
    path, name, index, first = item
    found = _file(path, os.stat(path).st_mtime_ns)[name][index]  # noqa: PTH116
    if first:
        found = found.transpose(1, 2, 0)
    return pixels.of_array(
        np.ascontiguousarray(found[..., 0] if found.ndim == 3 and found.shape[2] == 1 else found)
    )


@lru_cache(maxsize=1)
def _file(path: str, modified_ns: int) -> Any:
    """A file, which each process opens once."""
    import h5py

    return h5py.File(Path(path), rdcc_nbytes=CACHE_BYTES)
