"""Grids of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from privimage.evaluation.figures.theme import ANNOTATED


def _tiled(rows: Sequence[np.ndarray], scale: int, gap: int = 4) -> Image.Image:
    """Rows of images uint8 (n, C, H, W) as one picture with transparent gaps, enlarged `scale` times without
    smoothing.
    """
    # RGBA, transparent where there is no image, so that the picture suits a light and a dark page.
    side, columns = rows[0].shape[-1] * scale, max(len(row) for row in rows)
    height = rows[0].shape[-2] * scale
    canvas = np.zeros((len(rows) * (height + gap) - gap, columns * (side + gap) - gap, 4), np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            big = (
                np.broadcast_to(image, (3, *image.shape[1:]))
                .transpose(1, 2, 0)
                .repeat(scale, 0)
                .repeat(scale, 1)
            )
            top, left = y * (height + gap), x * (side + gap)
            canvas[top : top + height, left : left + side, :3] = big
            canvas[top : top + height, left : left + side, 3] = 255
    return Image.fromarray(canvas, "RGBA")


def _enlargement(resolution: int, columns: int, width: int = 1400) -> int:
    return max(1, width // (columns * resolution))


def sample_grid(
    path: Path, images: np.ndarray, labels: np.ndarray, n_classes: int, columns: int = 16
) -> list[int]:
    """Draw the first images of each class, one row per class, and return the classes of the rows.

    images uint8 (N, C, H, W), labels (N,). With one class, or more than twelve, eight rows of the first
    images, and [].
    """
    # One row per class as long as the page can name them.
    if 1 < n_classes <= ANNOTATED:
        shown = [c for c in range(n_classes) if np.any(labels == c)]
        rows = [images[labels == c][:columns] for c in shown]
    else:
        shown, rows = (
            [],
            [images[start : start + columns] for start in range(0, min(len(images), 8 * columns), columns)],
        )
    _tiled(rows, _enlargement(images.shape[-1], columns)).save(path, optimize=True)
    return shown


def nearest_pairs(
    path: Path, synthetic: np.ndarray, training: np.ndarray, distance: np.ndarray, pairs: int = 16
) -> None:
    """Pairs: synthetic images uint8 (N, C, H, W) above, the nearest training image of each below."""
    # The worst cases: the synthetic images that are nearest to a training image.
    closest = np.argsort(distance, kind="stable")[:pairs]
    _tiled([synthetic[closest], training[closest]], _enlargement(synthetic.shape[-1], pairs)).save(
        path, optimize=True
    )
