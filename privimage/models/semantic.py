"""The semantic query function: what an image shows, as a score for each public class or for each cluster of the public set."""

import numpy as np
import torch
from torch import Tensor, nn

from privimage.models.resnet import Classifier

ROTATIONS = 4
FITTED = 100_000  # images that k-means sees at most; all are then given to the nearest centroid


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Square images (B, C, S, S), each turned by its number of quarter turns, int64 (B,).

    To tell the turns is the task by which a network learns from images without labels (Gidaris, Singh and Komodakis 2018).
    """
    every = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(ROTATIONS)])
    return every[turns, torch.arange(len(images), device=images.device)]


class SemanticQuery(nn.Module):
    """Scores of images (B, C, H, W): a classifier's logits, or with `centroids` (K, F) how near its features are to each of them."""

    def __init__(self, network: Classifier, centroids: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.centroids = network, centroids

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, F) of length 1, which is what clusters are made of."""
        return nn.functional.normalize(self.network.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float -> (B, columns); the largest score is the class or cluster that fits best."""
        if self.centroids is None:
            return self.network(images)
        return -torch.cdist(self.features(images), self.centroids)


def centroids_of(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centres of `clusters` clusters of features (N, F), by k-means: float32 (clusters, F)."""
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=3, random_state=seed).fit(features).cluster_centers_.astype(np.float32)
