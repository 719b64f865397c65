"""A synthetic set on its way out."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class SyntheticSet:
    """Images uint8 (N, H, W, C) with labels int64 (N,), which count into the names of the classes.

    An unlabelled set has one class, label 0. `by_classifier`: labels are what a private classifier has seen,
    not what the generator was asked for.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    by_classifier: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def png(self, index: int) -> bytes:
        """One image as a PNG file, without time stamps: equal images give equal bytes."""
        image = self.images[index]
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        picture.save(buffer := io.BytesIO(), format="PNG")
        return buffer.getvalue()
