"""Images are brought to the run's shape by constants, in one way."""

import numpy as np
import pytest
from PIL import Image

from privimage.data import transforms
from privimage.data.transforms import Form


def test_the_crop_is_the_centred_square_of_the_shorter_side() -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = np.arange(64).reshape(8, 8)
    image = Image.fromarray(pixels)
    assert transforms.shorter_side(image) == 8
    assert (transforms.to_array(image, 8, Form(8, 3)) == np.arange(64).reshape(1, 8, 8)).all()
    tall = Image.fromarray(pixels.T.copy())
    assert (transforms.to_array(tall, 8, Form(8, 3))[0] == np.arange(64).reshape(8, 8).T).all()


def test_the_resize_is_antialiased() -> None:
    """One-pixel stripes become an even grey; nearest-neighbour resizing would keep black and white."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = transforms.to_array(stripes, 64, Form(8, 3))
    assert small.shape == (1, 8, 8)
    assert (np.abs(small[:, 1:-1, 1:-1].astype(int) - 127) <= 3).all()


def test_colour_comes_channels_first_and_unmixed() -> None:
    red = Image.new("RGB", (20, 10), (200, 10, 30))
    array = transforms.to_array(red, 10, Form(8, 3))
    assert array.shape == (3, 8, 8)
    assert (array.reshape(3, -1).T == (200, 10, 30)).all()


@pytest.mark.parametrize(("size", "side"), [((178, 218), 140), ((89, 109), 70)])
def test_faces_get_the_usual_crop(size: tuple[int, int], side: int) -> None:
    assert transforms.celeba_side(Image.new("RGB", size)) == side


def test_an_image_that_is_no_aligned_face_is_refused() -> None:
    with pytest.raises(ValueError, match="64x64"):
        transforms.celeba_side(Image.new("RGB", (64, 64)))
