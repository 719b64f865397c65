"""Pixels of every kind become 8 bits by stated constants: upright, on a background, within a window."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import read
from PIL import Image

from privimage.commands import init
from privimage.data import pixels
from privimage.data.decode import Source
from privimage.data.transforms import Form
from privimage.errors import UserError

RAMP = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)  # 0 to 63,000
CORNER = np.zeros((8, 8), bool)
CORNER[:4, :4] = True


def decoded(path: Path, form: Form) -> np.ndarray:
    """A file as uint8 (C, H, W)."""
    source = Source([str(path)], Image.open, [str(path)], np.zeros(1, np.int64), ("a",))
    return source.image(0, form)[0]


def turned(path: Path) -> None:
    """White in the top left corner as it is stored, to be shown turned by a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    white = np.where(CORNER, 255, 0).astype(np.uint8)
    Image.fromarray(white).save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_photographs_stand_upright(tmp_path: Path, suffix: str) -> None:
    turned(tmp_path / f"a{suffix}")
    seen = decoded(tmp_path / f"a{suffix}", Form(8, 1))[0]
    assert (seen[:4, 4:] > 250).all() and (seen[:, :4] < 5).all() and (seen[4:] < 5).all()


def rgba(path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, np.where(CORNER, 255, 0)
    Image.fromarray(pixels).save(path)


def grey_alpha(path: Path) -> None:
    pixels = np.zeros((8, 8, 2), np.uint8)
    pixels[..., 0], pixels[..., 1] = 200, np.where(CORNER, 255, 0)
    Image.fromarray(pixels, "LA").save(path)


def palette(path: Path) -> None:
    image = Image.fromarray(np.where(CORNER, 0, 1).astype(np.uint8), "P")
    image.putpalette([200, 0, 0, 9, 9, 9])
    image.save(path, transparency=1)


@pytest.mark.parametrize(
    ("save", "opaque"), [(rgba, (200, 0, 0)), (grey_alpha, (200, 200, 200)), (palette, (200, 0, 0))]
)
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 255)])
def test_transparent_pixels_show_the_background(
    tmp_path: Path, save: Callable[[Path], None], opaque: tuple, background: tuple
) -> None:
    save(tmp_path / "a.png")
    seen = decoded(tmp_path / "a.png", Form(8, 3, background=background)).transpose(1, 2, 0)
    assert (seen[CORNER] == opaque).all() and (seen[~CORNER] == background).all()
    grey = decoded(tmp_path / "a.png", Form(8, 1))[0]
    assert (grey[~CORNER] == 255).all() and (grey[CORNER] < 210).all()


def test_half_transparent_pixels_are_mixed_and_cmyk_is_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert (np.abs(decoded(tmp_path / "half.png", Form(8, 3)).astype(int) - 127) <= 1).all()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert decoded(tmp_path / "cmyk.jpg", Form(8, 3))[:, 0, 0].tolist() == [255, 0, 0]


def png_of_16_bit_colours(path: Path) -> None:
    """Pillow writes none."""
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in RAMP)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*chunks, (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(file)


DEEP = {
    "16.png": lambda path: Image.fromarray(RAMP).save(path),
    "16.tif": lambda path: Image.fromarray(RAMP).save(path),
    "float.tif": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pixels_need_a_window_and_become_what_it_says(tmp_path: Path, name: str) -> None:
    DEEP[name](tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: its pixels are .*, not 8 bits; data\.window: \[low, hi"):
        decoded(tmp_path / name, Form(8, 1))
    seen = decoded(tmp_path / name, Form(8, 1, window=(10_000, 53_000)))[0]
    assert (seen == np.rint(np.clip((RAMP - 10_000.0) / 43_000, 0, 1) * 255)).all()
    if name == "float.tif":
        with pytest.raises(UserError, match=r"have no range; data\.window: \[low, high\]"):
            decoded(tmp_path / name, Form(8, 1, window="full"))
    else:
        assert (decoded(tmp_path / name, Form(8, 3, window="full"))[1] == np.rint(RAMP / 65535 * 255)).all()


def test_deep_colours_are_taken_whole_or_told(tmp_path: Path) -> None:
    """Pillow has their upper 8 bits only: their whole range, and nothing within a window."""
    png_of_16_bit_colours(tmp_path / "a.png")
    for window in (None, (0, 1000)):
        with pytest.raises(UserError, match=r"a\.png: its colours have 16 bits.*data\.window: full"):
            decoded(tmp_path / "a.png", Form(8, 3, window=window))
    assert (decoded(tmp_path / "a.png", Form(8, 3, window="full"))[2] == RAMP >> 8).all()


def test_a_window_is_constant_whatever_the_other_images(tmp_path: Path) -> None:
    for number, factor in enumerate((1, 2)):
        Image.fromarray(RAMP // factor).save(tmp_path / f"{number}.png")
    form = Form(8, 1, window=(0, 63_000))
    first, second = (decoded(tmp_path / f"{number}.png", form).astype(int) for number in (0, 1))
    assert (np.abs(first - 2 * second) <= 2).all() and second.max() < 130


def test_what_is_no_number_is_black(tmp_path: Path) -> None:
    Image.fromarray(np.where(CORNER, np.nan, np.where(RAMP > 50_000, np.inf, 0.5)).astype("f4")).save(
        tmp_path / "a.tif"
    )
    seen = decoded(tmp_path / "a.tif", Form(8, 1, window=(0, 1)))[0]
    assert (seen[CORNER] == 0).all() and seen[-1, -1] == 255 and seen[4, 0] == 128


def test_images_that_are_not_square(tmp_path: Path) -> None:
    """Black, white, black beside each other, twice as wide as high."""
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (decoded(tmp_path / "a.png", Form(8, 1)) == 255).all()
    squashed = decoded(tmp_path / "a.png", Form(8, 1, fit="squash"))[0]
    assert (squashed[:, [0, -1]] < 30).all() and (squashed[:, 3:5] > 225).all()
    padded = decoded(tmp_path / "a.png", Form(8, 3, fit="pad", background=(9, 99, 199)))
    assert (padded[:, [0, 1, 6, 7]] == np.array([9, 99, 199])[:, None, None]).all()
    assert (padded[:, 2:6, [0, -1]] < 30).all() and (padded[:, 2:6, 3:5] > 225).all()
    Image.fromarray(np.zeros((1, 2000), np.uint8)).save(tmp_path / "line.png")
    line = decoded(tmp_path / "line.png", Form(8, 1, fit="pad"))[0]
    assert (line[3] == 0).all() and (np.delete(line, 3, axis=0) == 255).all()


def test_the_fingerprint_is_that_of_the_pixels_as_found(tmp_path: Path) -> None:
    """One ledger for a set, whatever settings it is read with; transparency and depth count."""
    rgba(tmp_path / "a.png")
    turned(tmp_path / "b.png")
    DEEP["16.png"](tmp_path / "c.png")

    def found(*names: str, **settings) -> tuple[str, bytes]:
        files = [str(tmp_path / name) for name in names]
        form = Form(8, 3, **{"window": "full"} | settings)
        opened = read(Source(files, Image.open, files, np.zeros(len(files), np.int64), ("a",)), form=form)
        return opened.fingerprint, opened.content

    names = ("a.png", "b.png", "c.png")
    kept, content = found(*names)
    changes = ({"background": (0, 0, 0)}, {"window": (0, 9)}, {"fit": "pad"})
    others = [found(*names, **settings) for settings in changes]
    assert [fingerprint for fingerprint, _ in others] == [kept] * 3
    assert len({content, *(other for _, other in others[:2])}) == 3
    Image.open(tmp_path / "a.png").convert("RGB").save(tmp_path / "a.png")
    assert found(*names)[0] != kept


def test_a_small_file_of_a_huge_image_is_refused(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    head = (tmp_path / "a.png").read_bytes()[:16] + struct.pack(">II", 60_000, 60_000) + b"\x08\0\0\0\0"
    data = struct.pack(">I", zlib.crc32(head[12:])) + struct.pack(">I", 99) + b"IDAT" + bytes(103)
    (tmp_path / "b.png").write_bytes(head + data)
    with pytest.raises(UserError, match=r"b\.png: not readable as an image .*3600000000 pixels"):
        decoded(tmp_path / "b.png", Form(8, 1))


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3)])
def test_init_sees_the_size_of_deep_images_too(shape: tuple[int, ...]) -> None:
    for kind in (np.uint8, np.uint16):
        assert init._shape(pixels.of_array(np.zeros(shape, kind))) == (8, 3 if len(shape) == 3 else 1)
