"""Letters and digits drawn from the fonts inside matplotlib: a public set that needs no download.

Handwriting differs from print by strokes of even width, by slant and by smooth distortion, so these are what is varied (Simard, Steinkraus
and Platt, "Best practices for convolutional neural networks applied to visual document analysis", 2003). The frame is that of the UCI
digits: a bitmap four times as large as the image, filled from top to bottom, averaged over blocks of 4x4.
"""

import string
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, map_coordinates

from privimage.data.sources import Source, from_arrays

IMAGES_PER_CLASS = 400
OVERSAMPLING = 4  # the UCI digits were 32x32 bitmaps before they became 8x8 images
SIZE = 48  # pixels of the type in which a character is drawn before it is distorted
MARGIN = 12  # room around it, for thick strokes
WAVES = 4  # smooth distortion: cosines of at most 1.5 periods across the frame
ALIKE = ("0Oo", "1Il", "Cc", "Kk", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")  # one shape, one class
STYLES = ("SANS-SERIF", "SANS-SERIF ITALIC", "MONOSPACE", "SCRIPT", "BOLD SCRIPT")  # faces among STIX's mathematical letters


def character_classes() -> tuple[str, ...]:
    """The classes, each as the string of its characters: digits first, then letters; characters of one shape share a class."""
    merged = {character: group for group in ALIKE for character in group}
    return tuple(dict.fromkeys(merged.get(c, c) for c in string.digits + string.ascii_letters))


@lru_cache(maxsize=1)
def faces() -> tuple[tuple[Path, dict[str, str]], ...]:
    """All faces, each as its font file and the code point that draws a character."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    characters = string.digits + string.ascii_letters
    found = []
    for file in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        if file.stem == "cmsy10":  # calligraphic capitals; other signs in the places of digits and small letters
            found.append((file, {c: c for c in string.ascii_uppercase}))
        elif file.stem.startswith(("DejaVu", "STIXGeneral", "cm")) and not file.stem.endswith("Display") and file.stem != "cmex10":
            found.append((file, {c: c for c in characters}))
        if file.stem == "STIXGeneral":
            held = [chr(code) for code in FT2Font(str(file)).get_charmap() if 0x1D400 <= code <= 0x1D7FF]
            for style in STYLES:
                named = [c for c in held if unicodedata.name(c).rsplit(" ", 2)[0] == f"MATHEMATICAL {style}"]
                found.append((file, {plain: c for c in named if (plain := unicodedata.normalize("NFKC", c)) in characters}))
    return tuple(found)


def thin(ink: np.ndarray) -> np.ndarray:
    """Centre lines, one pixel wide, of a bitmap, bool (H, W), that keeps a pixel off its border.

    Zhang and Suen, "A fast parallel algorithm for thinning digital patterns", 1984.
    """
    while True:
        before = ink
        for lower_right in (True, False):
            around = [np.roll(ink, shift, (0, 1)) for shift in ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))]
            north, east, south, west = around[::2]
            count = np.sum(around, 0)
            rises = np.sum([~a & b for a, b in zip(around, around[1:] + around[:1], strict=True)], 0)
            inner = (east & south & (north | west)) if lower_right else (north & west & (east | south))
            ink = ink & ~((count >= 2) & (count <= 6) & (rises == 1) & ~inner)
        if (ink == before).all():
            return ink


@lru_cache(maxsize=256)
def _drawn(face: int, character: str, pen: bool) -> np.ndarray:
    """Signed distance in pixels, float32 (H, W), positive inside: of the printed shape, or of its centre lines for a pen to follow."""
    file, code_points = faces()[face]
    font = ImageFont.truetype(str(file), SIZE)
    left, top, right, bottom = font.getbbox(code_points[character])
    canvas = Image.new("L", (int(right - left) + 2 * MARGIN, int(bottom - top) + 2 * MARGIN))
    ImageDraw.Draw(canvas).text((MARGIN - left, MARGIN - top), code_points[character], font=font, fill=255)
    ink = np.asarray(canvas) > 127
    if pen:
        return -distance_transform_edt(~thin(ink)).astype(np.float32)
    return (distance_transform_edt(ink) - distance_transform_edt(~ink)).astype(np.float32)


def render(characters: str, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """One of the characters in a random face, distorted: uint8 (resolution, resolution), bright strokes on black."""
    character = characters[rng.integers(len(characters))]
    choice = [i for i, (_, code_points) in enumerate(faces()) if character in code_points]
    pen = bool(rng.random() < 0.5)
    field = _drawn(choice[rng.integers(len(choice))], character, pen)
    height, width = field.shape
    radius = (max(height, width) - 2 * MARGIN) / 2
    weight = rng.uniform(0.1, 0.2) * radius if pen else rng.uniform(-0.02, 0.05) * radius

    angle, shear, aspect = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(-0.3, 0.3), np.exp(rng.uniform(-0.3, 0.3))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array([[1, shear], [0, 1]])
    waves = rng.normal(0, 0.1, (2, WAVES, WAVES))
    filled, across, down = rng.uniform(0.92, 1.04), rng.uniform(-0.06, 0.06), rng.uniform(-0.03, 0.03)

    def warped(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Ink at the rows y and columns x of the distorted character, in units of its radius."""
        cos_y, cos_x = (np.cos(np.pi / 2 * np.arange(WAVES) * (v[:, None] + 1) / 1) for v in (y, x))
        bent = [cos_y @ w @ cos_x.T for w in waves]
        from_x = turn[0, 0] * x + turn[0, 1] * y[:, None] + bent[0]
        from_y = turn[1, 0] * x + turn[1, 1] * y[:, None] + bent[1]
        return map_coordinates(field, [from_y * radius + (height - 1) / 2, from_x * radius / aspect + (width - 1) / 2], order=1, cval=-1e3) > -weight

    span = np.linspace(-1.6, 1.6, 48)
    ink = warped(span, span)
    rows, columns = (span[np.flatnonzero(ink.any(axis))] for axis in (1, 0))
    middle, size = [(r[0] + r[-1]) / 2 if r.size else 0.0 for r in (rows, columns)], [max(np.ptp(r), 0.1) if r.size else 1.0 for r in (rows, columns)]
    side = OVERSAMPLING * resolution
    frame = (np.arange(side) + 0.5) / side - 0.5
    scale = size[0] / filled
    stretch = max(scale, size[1] / 0.85)  # a wide character is made narrower rather than cut
    bitmap = warped(middle[0] + (frame - down) * scale, middle[1] + (frame - across) * stretch)
    blocks = bitmap.reshape(resolution, OVERSAMPLING, resolution, OVERSAMPLING).mean((1, 3))
    return np.rint(blocks * 255).astype(np.uint8)


def glyph_source(resolution: int) -> Source:
    """The whole set, the same every time: `IMAGES_PER_CLASS` images of each class."""
    classes = character_classes()
    rng = np.random.default_rng(0)
    images = np.stack([render(characters, resolution, rng) for characters in classes for _ in range(IMAGES_PER_CLASS)])
    return from_arrays(images, np.repeat(np.arange(len(classes)), IMAGES_PER_CLASS), classes, "glyphs")
