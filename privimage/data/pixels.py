"""Images as files hold them, made upright, opaque and 8 bits a channel."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps

from privimage.data.transforms import Form
from privimage.errors import UserError

DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow with more than 8 bits
STRIP = 1 << 24  # pixels that are converted at once for a digest


@dataclass(frozen=True)
class Values:
    """Pixels of any type (H, W) or (H, W, 3), as arrays and medical images have them.

    `limits` are the least and the greatest value of their type, None for floats. If `inverted`, the greatest
    is black.
    """

    values: np.ndarray
    limits: tuple[float, float] | None
    inverted: bool = False


def of_array(values: np.ndarray) -> Image.Image | Values:
    """An image (H, W) or (H, W, 3 or 4) of any type of numbers; 4 channels are RGBA."""
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    return Values(values, type_limits(values.dtype))


def type_limits(dtype: np.dtype) -> tuple[float, float] | None:
    """The least and the greatest value of a type of numbers; None for floats."""
    if dtype.kind not in "iu":
        return None
    return float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)


def digest(image: Image.Image | Values) -> bytes:
    """SHA-256 of the size and the pixels as they were found, before anything is done to them.

    So it is the same whatever the settings, and a set has one ledger. Grey and palette images count as RGB,
    whose alpha is left out where there is none.
    """
    if isinstance(image, Values):
        found = hashlib.sha256(f"{image.values.shape}".encode())
        found.update(np.ascontiguousarray(image.values, np.float64).data)
        return found.digest()
    if image.mode in DEEP:
        return digest(_values(image))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    found = hashlib.sha256(f"{image.size}".encode())
    # In strips: a copy of a very large image would not have room beside it.
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        whole = rows >= image.height
        strip = image if whole else image.crop((0, top, image.width, min(top + rows, image.height)))
        found.update(strip.convert(mode).tobytes())
    return found.digest()


def too_deep(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has colours of 16 bits, of which Pillow drops the lower 8."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.mode in DEEP:
        return False
    how = image.tile[0][3]
    return ";16" in str(how[0] if isinstance(how, tuple) and how else how)


def prepared(image: Image.Image | Values, form: Form, deep_colours: bool = False) -> Image.Image:
    """A grey or RGB image of 8 bits a channel: upright, on the background, within the window.

    `deep_colours` says what `too_deep` has found. Raises UserError where `form.window` is needed.
    """
    if deep_colours and form.window != "full":
        wanted = "[low, high] can be had for grey images only" if form.window else "they need a window"
        raise UserError(f"its colours have 16 bits, and {wanted}; data.window: full takes their whole range")
    if isinstance(image, Image.Image):
        image = _upright(image)
        if image.mode in DEEP:
            image = _values(image)
    if isinstance(image, Values):
        image = _windowed(image, form)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*form.background, 255))
        image = Image.alpha_composite(below, image).convert("RGB")
    mode = "RGB" if form.channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    """As the orientation of its EXIF data says; a damaged EXIF block says nothing."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _values(image: Image.Image) -> Values:
    # Mode I holds what a file of 16 bits has, or 32.
    sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    values = np.asarray(image)
    return Values(values, (0.0, 65535.0) if sixteen else type_limits(values.dtype))


def _windowed(image: Values, form: Form) -> Image.Image:
    """Values from low to high become 0 to 255, others the nearest of them, what is no number black."""
    kind, limits, window = f"its pixels are {image.values.dtype}, not 8 bits", image.limits, form.window
    if window is None:
        full = f"; full takes {limits[0]:.0f} to {limits[1]:.0f}" if limits else ""
        raise UserError(f"{kind}; data.window: [low, high] says which values become black and white{full}")
    if window == "full":
        if limits is None:
            raise UserError(f"{kind}, and have no range; data.window: [low, high] is needed, not full")
        window = limits
    low, high = window
    share = np.clip((image.values.astype(np.float64) - low) / (high - low), 0, 1)
    share = np.nan_to_num(1 - share if image.inverted else share, nan=0.0)
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))
