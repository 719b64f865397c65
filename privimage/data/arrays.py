"""Image sets from arrays, and what is known of their classes."""

from dataclasses import replace

import numpy as np
from PIL import Image

from privimage.data.decode import Source
from privimage.data.request import Known
from privimage.errors import UserError


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...] | None,
    name: str,
    known: Known | None,
) -> Source:
    """Images uint8 (N, H, W) or (N, H, W, C) in memory, and labels (N,).

    Raises UserError for what does not fit.
    """
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3))
    ):
        raise UserError(
            f"{name}: images must be uint8 of shape (N, H, W) or (N, H, W, 1 or 3), not {images.dtype} "
            f"{images.shape}"
        )
    if len(images) == 0:
        raise UserError(f"{name}: holds no image")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name}: {len(images)} images need as many labels, whole numbers; found {labels.dtype} "
            f"{labels.shape}"
        )
    # Classes that the file does not name: by number.
    if classes is None:
        classes = _unnamed(labels, name, known)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"{name}: labels from {labels.min()} to {labels.max()} do not fit {len(classes)} classes"
        )
    empty = np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=len(classes)) == 0)
    if len(empty) and known is None:
        raise UserError(f"{name}: class {classes[empty[0]]!r} has no image")
    # Pillow wants grey images without a channel axis.
    grey = images.ndim == 4 and images.shape[3] == 1
    pixels = images[..., 0] if grey else images
    return Source(
        pixels,
        Image.fromarray,
        [f"{name}: image {i}" for i in range(len(images))],
        labels.astype(np.int64),
        classes,
    )


def with_groups(source: Source, groups: np.ndarray, name: str) -> Source:
    """The same images, of which each belongs to one of `groups` (N,). Raises UserError for another shape."""
    if groups.shape != (len(source),):
        raise UserError(f"{name}: {len(source)} images need as many groups; found {groups.shape}")
    return replace(source, groups=[str(group) for group in groups])


def _unnamed(labels: np.ndarray, name: str, known: Known | None) -> tuple[str, ...]:
    """The classes of a set that does not name them. Raises UserError where they must not be counted."""
    if known and known.names is not None:
        return known.names
    if known and known.count is None:
        raise UserError(
            f"data.sensitive.classes: needed, since {name} does not name its classes"
            " (an npz does by an array 'classes'); counted from the labels, they could tell whether"
            " a single image is in the set"
        )
    return tuple(str(i) for i in range(known.count if known and known.count else int(labels.max()) + 1))
