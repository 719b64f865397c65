"""Letters and digits drawn from the fonts inside matplotlib: a public set that needs no download.

Handwriting differs from print by weight, slant and smooth distortion, so these are what is varied (Simard,
Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual document analysis",
2003). The frame is that of the UCI digits: a bitmap four times as large as the image, filled from top to
bottom, averaged over blocks of 4x4.
"""

import string
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from privimage.data.decode import Source

OVERSAMPLING = 4  # the UCI digits were 32x32 bitmaps before they became 8x8 images
SIZE = 64  # pixels of the type in which a character is drawn before it is distorted
MARGIN = 16  # room around it, for thick strokes
WAVES = 4  # cosines along each axis that make up the smooth distortion
WIDEST = 0.85  # of the frame; a wider character is made narrower
ALIKE = ("0Oo", "1Il", "Cc", "Kk", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")  # one shape, one class
STYLES = (
    "SANS-SERIF",
    "SANS-SERIF ITALIC",
    "MONOSPACE",
    "SCRIPT",
    "BOLD SCRIPT",
)  # faces among STIX's mathematical letters
AMPLITUDES = 0.15 / np.maximum(
    1, np.add.outer(np.arange(WAVES), np.arange(WAVES))
)  # long waves are stronger than short ones
CHARACTERS = string.digits + string.ascii_letters
# What is varied evenly between two bounds: the angle in degrees, the shear, the logarithm of the aspect, how
# much thicker strokes are in radii, the height in the frame, and how far it lies down and across in it.
LOW = np.array([-12, -0.3, -0.4, 0, 0.92, -0.03, -0.06])
HIGH = np.array([12, 0.3, 0.4, 0.1, 1.04, 0.03, 0.06])
OF_TURN = 3  # as many of them are drawn before the waves


@dataclass(frozen=True)
class Glyph:
    """One drawn character: what is drawn, and how."""

    character: str
    face: int  # in `faces`
    evenly: np.ndarray  # (7,) in [0, 1]: where between `LOW` and `HIGH`
    waves: np.ndarray  # (2, WAVES, WAVES), standard normal


def character_classes() -> tuple[str, ...]:
    """The classes, each as the string of its characters: digits first, then letters.

    Characters of one shape share a class.
    """
    merged = {character: group for group in ALIKE for character in group}
    return tuple(dict.fromkeys(merged.get(c, c) for c in CHARACTERS))


@lru_cache(maxsize=1)
def faces() -> tuple[tuple[Path, dict[str, str]], ...]:
    """All faces, each as its font file and the code points that draw the characters it has."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    found = []
    for file in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        if (
            file.stem == "cmsy10"
        ):  # calligraphic capitals; other signs in the places of digits and small letters
            found.append((file, {c: c for c in string.ascii_uppercase}))
        elif (
            file.stem.startswith(("DejaVu", "STIXGeneral", "cm"))
            and not file.stem.endswith("Display")
            and file.stem != "cmex10"
        ):
            found.append((file, {c: c for c in CHARACTERS}))
        if file.stem == "STIXGeneral":
            held = [chr(code) for code in FT2Font(str(file)).get_charmap() if 0x1D400 <= code <= 0x1D7FF]
            for style in STYLES:
                named = [c for c in held if unicodedata.name(c).rsplit(" ", 2)[0] == f"MATHEMATICAL {style}"]
                found.append((file, {unicodedata.normalize("NFKC", c): c for c in named}))
    return tuple(found)


@lru_cache(maxsize=64)
def holders(character: str) -> list[int]:
    """The faces that have a character."""
    return [i for i, (_, code_points) in enumerate(faces()) if character in code_points]


@lru_cache(maxsize=256)
def _outline(face: int, character: str) -> np.ndarray:
    """A printed character as signed distances from its outline in pixels, float32 (H, W), positive inside."""
    from scipy.ndimage import distance_transform_edt

    file, code_points = faces()[face]
    font = ImageFont.truetype(str(file), SIZE)
    left, top, right, bottom = font.getbbox(code_points[character])
    canvas = Image.new("L", (int(right - left) + 2 * MARGIN, int(bottom - top) + 2 * MARGIN))
    ImageDraw.Draw(canvas).text((MARGIN - left, MARGIN - top), code_points[character], font=font, fill=255)
    ink = np.asarray(canvas) > 127
    return (distance_transform_edt(ink) - distance_transform_edt(~ink)).astype(np.float32)


def _waves(places: np.ndarray) -> np.ndarray:
    return np.cos(np.pi / 2 * (places[:, None] + 1) * np.arange(WAVES))


COARSE = np.linspace(-1.8, 1.8, 48)
COARSE_WAVES = _waves(COARSE)


def render(characters: str, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """One of `characters` in a random face, distorted.

    Uint8 (resolution, resolution), bright strokes on black.
    """
    character = characters[rng.integers(len(characters))]
    known = holders(character)
    face = known[rng.integers(len(known))]
    turn, waves = rng.random(OF_TURN), rng.normal(0, 1, (2, WAVES, WAVES))
    return draw(Glyph(character, face, np.append(turn, rng.random(len(LOW) - OF_TURN)), waves), resolution)


def draw(glyph: Glyph, resolution: int) -> np.ndarray:
    """The image of a glyph: uint8 (resolution, resolution), bright strokes on black."""
    from scipy.ndimage import map_coordinates

    outline = _outline(glyph.face, glyph.character)
    height, width = outline.shape
    radius = max(height, width) / 2 - MARGIN
    degrees, shear, aspect, thicker, fills, down, across = LOW + glyph.evenly * (HIGH - LOW)
    angle, aspect, weight = np.deg2rad(degrees), np.exp(aspect), thicker * radius
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array(
        [[1, shear], [0, 1]]
    )
    bend = glyph.waves * AMPLITUDES

    def place(
        y: np.ndarray, x: np.ndarray, waves_y: np.ndarray, waves_x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where in `outline` the rows y and columns x of the distorted character come from.

        They count from its centre in radii.
        """
        from_x = turn[0, 0] * x + turn[0, 1] * y[:, None] + waves_y @ bend[0] @ waves_x.T
        from_y = turn[1, 0] * x + turn[1, 1] * y[:, None] + waves_y @ bend[1] @ waves_x.T
        return from_y * radius + (height - 1) / 2, from_x * (radius / aspect) + (width - 1) / 2

    # Once coarsely, to see what the distorted character extends to, and once in the frame that it then fills.
    near_y, near_x = (np.rint(p).astype(int) for p in place(COARSE, COARSE, COARSE_WAVES, COARSE_WAVES))
    coarse = outline[near_y.clip(0, height - 1), near_x.clip(0, width - 1)] > -weight
    (top, bottom), (left, right) = (COARSE[np.flatnonzero(coarse.any(axis))[[0, -1]]] for axis in (1, 0))
    step = COARSE[1] - COARSE[0]
    scale_y = (bottom - top + step) / fills
    scale_x = max(scale_y, (right - left + step) / WIDEST)
    frame = (np.arange(OVERSAMPLING * resolution) + 0.5) / (OVERSAMPLING * resolution) - 0.5
    y = (top + bottom) / 2 + (frame - down) * scale_y
    x = (left + right) / 2 + (frame - across) * scale_x
    bitmap = map_coordinates(outline, place(y, x, _waves(y), _waves(x)), order=1, cval=-np.inf) > -weight
    blocks = bitmap.reshape(resolution, OVERSAMPLING, resolution, OVERSAMPLING).mean((1, 3))
    return np.rint(blocks * 255).astype(np.uint8)


def glyph_source(resolution: int, images_per_class: int) -> Source:
    """The whole set, the same every time, rendered when asked for.

    More images of a class begin with the same ones.
    """
    classes = character_classes()
    items = [
        (characters, label, number, resolution)
        for label, characters in enumerate(classes)
        for number in range(images_per_class)
    ]
    return Source(
        items,
        _drawn,
        [f"glyphs: image {i}" for i in range(len(items))],
        np.repeat(np.arange(len(classes)), images_per_class),
        classes,
    )


def _drawn(item: tuple[str, int, int, int]) -> Image.Image:
    characters, label, number, resolution = item
    return Image.fromarray(render(characters, resolution, np.random.default_rng([label, number])))
