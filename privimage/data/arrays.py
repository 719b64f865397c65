"""Image sets from arrays."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from privimage.data import labels as label_reading
from privimage.data import pixels
from privimage.data.decode import Source
from privimage.data.request import Known
from privimage.errors import UserError

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
NOBODY = {"", "nan", "None", "<NA>"}  # missing values, as text


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...] | None,
    name: str,
    known: Known | None,
) -> Source:
    """Images of any type of numbers in memory, of a shape that `channels_first` knows, and their labels.

    Raises UserError for what does not fit.
    """
    first = channels_first(images.shape, images.dtype, name)
    if len(labels) != len(images):
        raise UserError(f"{name}: {len(images)} images need as many labels; found {labels.shape}")
    numbers, classes = label_reading.numbered(labels, classes, name, known)
    pictures = images.transpose(0, 2, 3, 1) if first else images
    # Pillow wants grey images without a channel axis.
    grey = pictures.ndim == 4 and pictures.shape[3] == 1
    names = [f"{name}: image {i}" for i in range(len(images))]
    return Source(pictures[..., 0] if grey else pictures, pixels.of_array, names, numbers, classes)


def channels_first(shape: tuple[int, ...], dtype: np.dtype, name: str) -> bool:
    """Whether images of a shape are (N, C, H, W), not (N, H, W) or (N, H, W, C).

    Raises UserError for any other shape, for one that could be either, and for what are not numbers.
    """
    wanted = "(N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels"
    if dtype.kind not in "uif":
        raise UserError(f"{name}: images are {dtype}; write them as uint8 of shape {wanted}")
    last, first = (len(shape) == 4 and shape[axis] in CHANNELS for axis in (3, 1))
    if len(shape) != 3 and not last and not first:
        raise UserError(f"{name}: images have the shape {tuple(shape)}; write them as {wanted}")
    if last and first:
        raise UserError(f"{name}: images of shape {tuple(shape)} could have their channels first or last")
    if len(shape) == 4 and shape[3 if last else 1] == 4 and dtype != np.uint8:
        raise UserError(f"{name}: images of 4 channels must be uint8 (RGBA), not {dtype}")
    if shape[0] == 0:
        raise UserError(f"{name}: holds no image")
    return first


def with_groups(source: Source, groups: Sequence | np.ndarray, name: str) -> Source:
    """The same images, each of which belongs to one of `groups` (N,).

    Raises UserError for another number of them, and for an image that belongs to nobody.
    """
    if np.shape(groups) != (len(source),):
        raise UserError(f"{name}: {len(source)} images need as many groups; found {np.shape(groups)}")
    named = [str(group) for group in groups]
    # A missing value is no group: all images without a name would count as one person.
    nobody = next((i for i, group in enumerate(named) if group in NOBODY), None)
    if nobody is not None:
        reason = f"{source.names[nobody]} belongs to no group ({named[nobody]!r})"
        raise UserError(f"data.sensitive.group: {reason}")
    return replace(source, groups=named)
