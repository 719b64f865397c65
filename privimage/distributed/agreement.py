"""Checks that all ranks hold the same data, by comparing digests in one all-reduce."""

from typing import Protocol

import torch
from torch import Tensor

from privimage.errors import UserError


class Ranks(Protocol):
    """The part of `World` that collective operations need."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def cores(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def all_reduce_(self, tensor: Tensor) -> Tensor: ...


def gathered(ranks: Ranks, payload: bytes) -> list[bytes]:
    """The `payload` of each rank, all of one length, in order.

    One all-reduce of W x n numbers, which all ranks call together.
    """
    # Each rank writes its own row; the sum over ranks is the table of all.
    rows = torch.zeros(ranks.size, len(payload), dtype=torch.int64, device=ranks.device)
    rows[ranks.rank] = torch.tensor(list(payload), dtype=torch.int64, device=ranks.device)
    return [bytes(row) for row in ranks.all_reduce_(rows).tolist()]


def all_the_same(ranks: Ranks, digest: bytes, what: str, remedy: str) -> None:
    """Raise UserError, on all ranks, where a rank's `digest` of `what` is not that of the main rank."""
    require_equal(gathered(ranks, digest), what, remedy)


def require_equal(digests: list[bytes], what: str, remedy: str) -> None:
    """Raise UserError that names the ranks whose digest is not that of rank 0."""
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        payload = (
            f"rank{'s' if len(others) > 1 else ''} "
            f"{', '.join(others[:20])}{' ...' if len(others) > 20 else ''}"
        )
        raise UserError(f"{what} are not the same on all ranks: {payload} differ from rank 0; {remedy}")
