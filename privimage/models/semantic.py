"""The semantic query function, which scores public classes or clusters, and the tasks that train it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage.models.resnet import Classifier

FITTED = 100_000  # images that k-means sees at most; all are then given to the nearest centroid
PROJECTION = 64  # outputs of the head where there are no classes
TEMPERATURE = 0.2
Network = Callable[[Tensor], Tensor]


class SemanticQuery(nn.Module):
    """Scores of images (B, C, H, W): logits of a classifier, or similarity to `centroids` (K, F)."""

    def __init__(self, network: Classifier, centroids: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.centroids = network, centroids

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, F) of length 1, which is what clusters are made of."""
        return F.normalize(self.network.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float -> (B, columns).

        The largest score is the class or cluster that fits best.
        """
        if self.centroids is None:
            return self.network(images)
        # One by one: in a product of matrices, which it takes for many, rounding goes by an image's place
        # among the others.
        return -torch.cdist(
            self.features(images), self.centroids, compute_mode="donot_use_mm_for_euclid_dist"
        )


def centroids_of(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centres of `clusters` clusters of features (N, F), by k-means: float32 (clusters, F)."""
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=3, random_state=seed).fit(features).cluster_centers_.astype(np.float32)


class Task(ABC):
    """What the network of the query learns from public images in [-1, 1] (B, C, H, W)."""

    outputs: int  # of the network's head

    def __init__(self, flip: bool) -> None:
        self.flip = flip

    @abstractmethod
    def loss(self, network: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch (B, C, H, W); `generator` draws the augmentation."""

    @abstractmethod
    def right(self, network: nn.Module, images: Tensor, labels: Tensor) -> int:
        """The number of held-out images (B, C, H, W) that the network gets right."""


class Labels(Task):
    """Classification of the labels by cross-entropy (paper, Eq. 4)."""

    def __init__(self, flip: bool, classes: int) -> None:
        super().__init__(flip)
        self.outputs = classes

    def loss(self, network: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of images (B, C, H, W) with labels (B,); each is flipped with probability 0.5."""
        # Characters and digits are not flipped (`data.flip`): a mirrored letter is another one.
        if self.flip:
            flipped = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return F.cross_entropy(network(images).float(), labels)

    def right(self, network: nn.Module, images: Tensor, labels: Tensor) -> int:
        """The number of images (B, C, H, W) whose label has the largest logit."""
        return int((network(images).argmax(1) == labels).sum())


class Views(Task):
    """Contrastive learning on two augmented views, for images without labels (SimCLR, Chen et al. 2020)."""

    outputs = PROJECTION

    def loss(self, network: Network, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """NT-Xent over two views of each image of the batch (B, C, H, W)."""
        # Row i and row i + B show the same image, as `contrastive_loss` expects.
        views = torch.cat([varied(images, self.flip, generator), varied(images, self.flip, generator)])
        return contrastive_loss(network(views).float())

    def right(self, network: nn.Module, images: Tensor, labels: Tensor) -> int:
        """The number of images (B, C, H, W) whose second view is the most similar; the views are fixed."""
        # The same views at every validation, so that accuracies can be compared.
        generator = torch.Generator().manual_seed(0)
        first, second = (F.normalize(network(varied(images, self.flip, generator)).float()) for _ in range(2))
        return int(((first @ second.T).argmax(1) == torch.arange(len(images), device=images.device)).sum())


def varied(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each cropped to a random 30 to 100 % of its area and resized, in other brightness,
    contrast and colours.
    """
    count, channels = images.shape[:2]

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return torch.empty(count, *more).uniform_(low, high, generator=generator).to(images.device)

    # A crop is an affine map: `side` scales, `across` and `down` shift, a negative scale mirrors.
    side = uniform(0.3, 1).sqrt()
    across, down, mirrored = uniform(-1, 1) * (1 - side), uniform(-1, 1) * (1 - side), uniform(0, 1) < 0.5
    nothing = torch.zeros_like(side)
    rows = (torch.where(mirrored & flip, -side, side), nothing, across), (nothing, side, down)
    grid = F.affine_grid(
        torch.stack([torch.stack(row, 1) for row in rows], 1), list(images.shape), align_corners=False
    )
    cropped = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # Colour jitter per channel, and a fifth of the images without colour (SimCLR, appendix A).
    if channels > 1:
        grey = uniform(0, 1, 1, 1, 1) < 0.2
        coloured = cropped * uniform(0.6, 1.4, channels, 1, 1)
        cropped = torch.where(grey, cropped.mean(1, keepdim=True).expand_as(cropped), coloured)
    # Contrast about the mean of the image, then brightness.
    mean = cropped.mean((1, 2, 3), keepdim=True)
    return (cropped - mean) * uniform(0.6, 1.4, 1, 1, 1) + mean + uniform(-0.4, 0.4, 1, 1, 1)


def contrastive_loss(projections: Tensor) -> Tensor:
    """NT-Xent of (2 B, P).

    Rows i and i + B are two views of one image, all others views of others (Chen et al. 2020, Eq. 1).
    """
    # Cosine similarities of all pairs; an image is no pair with itself.
    directions = F.normalize(projections)
    similar = directions @ directions.T / TEMPERATURE
    similar.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(projections), device=projections.device).roll(len(projections) // 2)
    return F.cross_entropy(similar, partner)
