"""Bring images to the shape of the run, by constants, never by statistics of the set."""

import io
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image

Fit = Literal["crop", "pad", "squash"]
JPEG_QUALITY = 95  # a pixel is off by 2 levels on average, at a quarter of the size
CELEBA_SIDES = {
    (178, 218): 140,
    (89, 109): 70,
}  # (width, height) of the aligned faces -> side of the usual centre crop


@dataclass(frozen=True)
class Form:
    """What all images become: uint8 (channels, resolution, resolution), and how.

    `fit` is for images that are not square: a centred square is cut out, bars of `background` are added, or
    the image is squashed. `background`, red, green and blue from 0 to 255, is also what transparent pixels
    show. `window` says which values of 16-bit and float pixels become black and white; `full` is the range of
    their type, None refuses such images.
    """

    resolution: int
    channels: int
    fit: Fit = "crop"
    background: tuple[int, int, int] = (255, 255, 255)
    window: tuple[float, float] | Literal["full"] | None = None

    def to_dict(self) -> dict:
        """As JSON reads it back: lists in place of tuples."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


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


def to_array(image: Image.Image, side: int, form: Form) -> np.ndarray:
    """Fit and antialiased resize of a grey or RGB image; `side` is that of the centred square to cut out.

    Uint8 (C, resolution, resolution).
    """
    square = {"crop": _cropped, "pad": _padded, "squash": lambda *_: image}[form.fit](image, side, form)
    if square.size != (form.resolution, form.resolution):
        square = square.resize((form.resolution, form.resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _cropped(image: Image.Image, side: int, form: Form) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _padded(image: Image.Image, side: int, form: Form) -> Image.Image:
    """Bars are added after the resize, so that their edges stay sharp."""
    scale = form.resolution / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    bars = Image.new("RGB", (form.resolution, form.resolution), form.background).convert(image.mode)
    inside = image.resize((width, height), Image.Resampling.LANCZOS)
    bars.paste(inside, ((form.resolution - width) // 2, (form.resolution - height) // 2))
    return bars


def to_jpeg(image: np.ndarray) -> np.ndarray:
    """The JPEG of an image uint8 (C, H, W), as bytes uint8 (n,)."""
    pixels = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    # Colour in full resolution: halved, it would be the largest error by far.
    pixels.save(buffer := io.BytesIO(), "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return np.frombuffer(buffer.getbuffer(), np.uint8)
