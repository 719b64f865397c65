"""Medical images in DICOM files, by pydicom: pixels, and nothing else of what such a file says."""

from contextlib import suppress

import numpy as np
from PIL import Image

from privimage.data.pixels import Values
from privimage.errors import UserError

SUFFIXES = {".dcm", ".dicom"}
RESCALE_SLOPE, RESCALE_INTERCEPT = 0x00281053, 0x00281052
PREAMBLE = 128  # bytes before the letters by which a file is known


def is_dicom(path: str) -> bool:
    """Whether a file is one, by its head."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(PREAMBLE)
        return file.read(4) == b"DICM"
    return False


def read(path: str) -> Image.Image | Values:
    """The first frame of a file: colours as an image, grey values after rescale slope and intercept.

    The window comes from the configuration, never from the file. The limits of grey values are those of the
    bits that are stored. Raises UserError where pydicom is missing, and whatever pydicom raises.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_rescale, pixel_array
    except ImportError:
        raise UserError("needs pydicom, which is not installed; pip install 'privimage[dicom]'") from None
    # Of the data set, only what describes the pixels is read: no name, no date, no text that a warning could
    # show.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    about = pydicom.Dataset()
    values = pixel_array(path, ds_out=about, index=0, specific_tags=[RESCALE_SLOPE, RESCALE_INTERCEPT])
    if values.ndim == 3:
        return Image.fromarray(values) if values.dtype == np.uint8 else Values(values, None)
    bits, signed = int(about.BitsStored), int(about.PixelRepresentation) == 1
    limits = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    inverted = about.PhotometricInterpretation == "MONOCHROME1"
    low, high = (float(value) for value in apply_rescale(limits, about))
    if bits == 8 and (low, high) == (0, 255):
        grey = values.astype(np.uint8)
        return Image.fromarray(255 - grey if inverted else grey)
    return Values(apply_rescale(values, about), (min(low, high), max(low, high)), inverted)
