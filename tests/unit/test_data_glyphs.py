"""The rendered characters.

The same set everywhere and always, in the style of the digits, good enough to learn digits from.
"""

import numpy as np
from data_sets import read
from sklearn.linear_model import LogisticRegression

from privimage.data.glyphs import character_classes, glyph_source
from privimage.data.readers import open_source
from privimage.data.transforms import Form


def test_characters_of_one_shape_share_a_class_and_none_is_forgotten() -> None:
    classes = character_classes()
    assert sorted("".join(classes)) == sorted(
        "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )
    assert classes[:10] == ("0Oo", "1Il", *"23456789")


def test_the_set_is_the_same_in_any_order_and_size() -> None:
    some, more = glyph_source(8, 3), glyph_source(8, 5)
    backwards = [some.image(i, Form(8, 1))[0] for i in reversed(range(len(some)))][::-1]
    for index in range(0, len(some), 7):
        label, number = divmod(index, 3)
        assert (more.image(label * 5 + number, Form(8, 1))[0] == backwards[index]).all()
        assert more.labels[label * 5 + number] == some.labels[index] == label


def test_glyphs_fill_the_frame_as_the_digits_do() -> None:
    """Bright strokes on black from the first row to the last; margins at the left and right.

    About as much ink.
    """
    glyphs, digits = (
        read(glyph_source(8, 4), 8, 1, 0).images / 255,
        read(open_source("digits", None, "train"), 8, 1, 0).images / 255,
    )
    assert abs(glyphs.mean() - digits.mean()) < 0.06
    assert (glyphs[:, 0, 0].max(1) > 0).mean() > 0.8 and (glyphs[:, 0, -1].max(1) > 0).mean() > 0.8
    assert glyphs[..., 0].mean() < 0.1 and glyphs[..., -1].mean() < 0.1


def test_larger_glyphs_are_the_same_characters_drawn_finer() -> None:
    small, large = glyph_source(8, 2), glyph_source(32, 2)
    for index in range(0, len(small), 5):
        fine = large.image(index, Form(32, 1))[0].reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(fine.ravel(), small.image(index, Form(8, 1))[0].ravel())[0, 1] > 0.95


def test_what_is_learnt_from_glyphs_holds_for_handwriting() -> None:
    """Public data help only as far as they resemble: 10 % would be chance."""
    glyphs, digits = read(glyph_source(8, 60), 8, 1, 0), read(open_source("digits", None, "train"), 8, 1, 0)
    numerals = glyphs.labels < 10
    learner = LogisticRegression(max_iter=200).fit(
        glyphs.images[numerals].reshape(-1, 64) / 255, glyphs.labels[numerals]
    )
    assert learner.score(digits.images.reshape(-1, 64) / 255, digits.labels) > 0.5
