"""Writers of stores: FFCV's format, and a NumPy file of records (image, label)."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PAGE_BYTES = 1 << 21  # FFCV's smallest page: files are padded to whole ones
Put = Callable[[np.ndarray, int], None]


@contextmanager
def writer(path: Path, suffix: str, capacity: int, shape: tuple[int, int, int], jpeg: bool) -> Iterator[Put]:
    """Write a store of at most `capacity` images of a shape (C, H, W), of JPEGs where the format can.

    The context gives a function that takes an image as bytes uint8 (n,), its pixels or its JPEG, and its
    label.
    """
    beton = suffix == ".beton"
    opened = _beton_writer(path, capacity, shape, jpeg) if beton else _npy_writer(path, capacity, shape)
    with opened as put:
        yield put
    # On disk before it is renamed: otherwise a power failure could leave a whole name on half a file.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _beton_writer(path: Path, capacity: int, shape: tuple[int, int, int], jpeg: bool) -> Iterator[Put]:
    """FFCV's writer without its worker processes, which deadlock when one of them raises or is
    killed.
    """
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    def encode(destination: np.ndarray, image: np.ndarray, malloc: Callable) -> None:
        destination["mode"], destination["height"], destination["width"] = IMAGE_MODES["jpg"], *shape[1:]
        destination["data_ptr"], place = malloc(image.nbytes)
        place[:] = image

    fields = {"image": NDArrayField(np.dtype("uint8"), shape), "label": IntField()}
    if jpeg:
        # The JPEGs are there already; FFCV knows a field by its class, which has to stay.
        fields["image"] = RGBImageField()
        fields["image"].encode = encode
    # What FFCV's writer does in worker processes is done here, in this one.
    writer = DatasetWriter(str(path), fields, page_size=PAGE_BYTES, num_workers=1)
    writer.num_samples = capacity
    writer.prepare()
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    metadata = np.zeros(capacity, writer.metadata_type)
    writer.metadata_sm = SimpleNamespace(
        buf=metadata.view(np.uint8)
    )  # in place of the memory that its processes would share
    allocator = MemoryAllocator(str(path), writer.data_region_start, PAGE_BYTES)
    written = 0

    def put(image: np.ndarray, label: int) -> None:
        nonlocal written
        handle_sample((image, label), written, metadata.dtype.names, metadata, allocator, fields)
        written += 1

    # The caller writes images one by one; leaving the block flushes the last page.
    with allocator:
        yield put
    writer.header["num_samples"] = written
    writer.finalize([allocator.allocations])
    if writer.header["alloc_table_ptr"] != allocator.offset + (allocator.my_page + 1) * PAGE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # FFCV ignores a short write


@contextmanager
def _npy_writer(path: Path, capacity: int, shape: tuple[int, int, int]) -> Iterator[Put]:
    # Image and label beside each other, so that one read fetches both.
    record = np.dtype([("image", np.uint8, shape), ("label", "<i8")])
    header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False}
    written = 0
    with open(path, "wb") as file:

        def put(image: np.ndarray, label: int) -> None:
            nonlocal written
            file.write(image.tobytes() + np.int64(label).astype("<i8").tobytes())
            written += 1

        np.lib.format.write_array_header_1_0(file, header | {"shape": (capacity,)})
        yield put
        file.seek(0)  # NumPy leaves room in the header for any count
        np.lib.format.write_array_header_1_0(file, header | {"shape": (written,)})
