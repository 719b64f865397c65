"""Files that are written whole or not at all."""

import io
import json
import os
from pathlib import Path

import numpy as np

from privimage.errors import UserError


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file, mode 0600, whole or not at all: a temporary file beside it, fsync, rename.

    Raises UserError when the disk is full.
    """
    # In the same folder, so that the rename is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: could not be written ({error.strerror}); what was there before is kept, make room and "
            "run again"
        ) from None
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: dict) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array of any shape as .npy, whole or not at all."""
    np.save(buffer := io.BytesIO(), array)
    write_whole(path, buffer.getvalue())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays of any shape by name as a compressed .npz, whole or not at all."""
    np.savez_compressed(buffer := io.BytesIO(), allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())


def read_json(path: Path) -> dict:
    """Read JSON. Raises UserError that names a missing or damaged file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: damaged, not readable as JSON") from None
