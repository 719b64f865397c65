"""Classifier guidance: images in which a classifier sees the class that they are drawn for."""

import numpy as np
from torch import Tensor, nn

from privimage.models.edm import SIGMA_DATA
from privimage.models.label_features import LabelClassifier

# Noise levels of guidance. Above, the denoised image is the mean of all images; below, it is finished.
HIGHEST, LOWEST = 20.0, 0.1
# By how much of its width an image is moved at most before the classifier is asked: 3 pixels of 32. What it
# takes for a class wherever it stands is less of an artefact of the network (docs/results.md).
MOVED = 0.1


def guided_levels(levels: list[float]) -> int:
    """How many of the noise levels are those of guidance."""
    return sum(LOWEST <= level <= HIGHEST for level in levels)


class ClassifierGuided(nn.Module):
    """D(x; sigma) + w r^2 grad log p(label | D), with the gradient by the denoised image D.

    A classifier of images without noise is asked about the denoised image (Bansal et al. 2023, arXiv
    2302.07121). r^2 = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2) is the variance that remains of a pixel
    (Song et al. 2023, pseudoinverse guidance), so that w = 1 is Bayes' rule for pixels that are independent.
    """

    def __init__(self, denoiser: nn.Module, classifier: LabelClassifier, weight: float) -> None:
        super().__init__()
        self.denoiser, self.classifier, self.weight = denoiser, classifier, weight

    def forward(self, images: Tensor, sigma: Tensor, labels: Tensor, guidance: float = 0.0) -> Tensor:
        """See `edm.Denoiser.forward`; noise levels sigma (B,) are equal."""
        denoised = self.denoiser(images, sigma, labels, guidance)
        if not LOWEST <= (at := float(sigma[0])) <= HIGHEST:
            return denoised
        level = sigma.float()[:, None, None, None]
        unknown = level**2 * SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2)
        moved, over = _view(at, images.shape[-1])
        if over and self.classifier.features.mirrored:
            slope = self.classifier.slope(denoised.flip(3), labels, moved).flip(3)
        else:
            slope = self.classifier.slope(denoised, labels, moved)
        return denoised + self.weight * unknown * slope


def _view(level: float, width: int) -> tuple[tuple[int, int], bool]:
    """Pixels down and to the right, and whether images are turned over first, at random; the same for all
    images at a noise level: an image does not depend on those that are drawn beside it.
    """
    most = int(MOVED * width)
    rng = np.random.default_rng(int(level * 2**20))
    down, right = rng.integers(-most, most + 1, 2).tolist()
    return (down, right), bool(rng.integers(2))
