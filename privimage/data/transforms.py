"""Bring an image to the shape of the run: constant crops and an antialiased resize, never statistics of the set."""

import numpy as np
from PIL import Image

CELEBA_CROPS = {(178, 218): 140, (89, 109): 70}  # (width, height) of the aligned faces -> side of the centre crop


def to_array(image: Image.Image, resolution: int, channels: int, crop: int | None = None) -> np.ndarray:
    """Centre crop (of the shorter side unless `crop` pixels are given), resize, grey or RGB: uint8 (C, resolution, resolution)."""
    image = image.convert("L" if channels == 1 else "RGB")
    side = crop or min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC if side < resolution else Image.Resampling.BOX if side % resolution == 0 else Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1).copy()
