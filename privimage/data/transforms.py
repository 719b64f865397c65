"""Crop and resize images to the shape of the run, by constants, never by statistics of the set."""

import numpy as np
from PIL import Image

CELEBA_SIDES = {
    (178, 218): 140,
    (89, 109): 70,
}  # (width, height) of the aligned faces -> side of the usual centre crop


def shorter_side(image: Image.Image) -> int:
    """The side of the largest centred square, in pixels."""
    return min(image.size)


def celeba_side(image: Image.Image) -> int:
    """The side of CelebA's usual centre crop, in pixels.

    Raises ValueError for an image that is not one of its aligned faces.
    """
    if image.size not in CELEBA_SIDES:
        raise ValueError(
            f"aligned faces have 178x218 or 89x109 pixels, this has {image.width}x{image.height}"
        )
    return CELEBA_SIDES[image.size]


def to_array(image: Image.Image, side: int, resolution: int) -> np.ndarray:
    """Centre crop of `side` pixels and antialiased resize of a grey or RGB image.

    Uint8 (C, resolution, resolution).
    """
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
