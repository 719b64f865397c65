"""Images that belong together: to one person, one patient, one household."""

import hashlib
from collections.abc import Sequence

import numpy as np

from privimage.data.decode import Source
from privimage.errors import UserError


def units(source: Source) -> int:
    """The number of groups of a set, or of its images where it names no groups."""
    return len(source) if source.groups is None else len(set(source.groups))


def numbered(names: Sequence[str]) -> np.ndarray:
    """Groups numbered in the order in which their first images come: int64 (N,)."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def grouping(digests: np.ndarray, groups: np.ndarray) -> str:
    """A digest of which images belong together, whatever their order, labels, and the names of the groups.

    digests uint8 (N, 32) of the images, groups int64 (N,).
    """
    members: dict[int, list[bytes]] = {}
    for digest, group in zip(digests, groups.tolist(), strict=True):
        members.setdefault(group, []).append(digest.tobytes())
    of_groups = sorted(hashlib.sha256(b"".join(sorted(one))).digest() for one in members.values())
    return hashlib.sha256(b"".join(of_groups)).hexdigest()


def require_apart(train: Source, test: Source) -> None:
    """Raise UserError if a group is in both sets: what is measured on one would not be about strangers."""
    if train.groups is None or test.groups is None:
        return
    if shared := set(train.groups) & set(test.groups):
        raise UserError(
            f"data.sensitive.group: {len(shared)} of the {units(test)} groups of the held-out images are in "
            "the training images too; accuracy and memorisation would be measured on people who were trained "
            "on: divide the set by group"
        )
