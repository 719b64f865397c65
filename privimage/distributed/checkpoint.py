"""Atomic checkpoints: a digest in front of what torch.save wrote, a rename at the end."""

import hashlib
import io
from pathlib import Path

import torch

from privimage.distributed import told
from privimage.distributed.world import ALONE, World
from privimage.errors import UserError
from privimage.storage.files import write_whole

MAGIC = b"PRIVIMG1"


def save(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) whole or not at all.

    Raises UserError when the disk is full; the checkpoint that was there before is kept.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    write_whole(path, b"".join((MAGIC, hashlib.sha256(payload).digest(), payload)))


def load(path: Path, world: World = ALONE) -> dict | None:
    """The checkpoint that the main rank sees, on the device of each rank; None when there is none.

    All ranks call it together. Raises UserError that names a truncated or altered file.
    """
    data = told.content(path, world)
    if data is None:
        return None
    head, digest, payload = data[: len(MAGIC)], data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if head != MAGIC or hashlib.sha256(payload).digest() != digest:
        raise UserError(
            f"{path}: damaged checkpoint (its digest does not match); delete it to begin this stage again"
        )
    return torch.load(io.BytesIO(payload), map_location=world.device, weights_only=True)


def required(path: Path, stage: str, world: World = ALONE) -> dict:
    """`load` of what `stage` must have left at `path`.

    Raises UserError that says what to run where it is not there.
    """
    state = load(path, world)
    if state is None:
        raise UserError(f"{path}: no such file; run `privimage {stage}` first")
    return state
