"""Memorisation: are synthetic images nearer to training images than to held-out ones?

A generator that has learned the distribution is as close to the images that it was trained on as to those
that it never saw. The guarantee bounds memorisation by design: this check looks for a fault, it is no proof.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privimage.storage.array_file import Images


@dataclass(frozen=True)
class Nearest:
    """For each image, the nearest reference image: index (N,) and RMS pixel distance in [0, 1] (N,)."""

    index: np.ndarray
    distance: np.ndarray


def _flat(images: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(images).to(device).flatten(1).float() / 255


@torch.inference_mode()
def nearest(
    images: np.ndarray, reference: Images, device: torch.device | str = "cpu", chunk: int = 2000
) -> Nearest:
    """The nearest of reference uint8 (M, C, H, W) to each of images uint8 (N, C, H, W), by RMS pixel
    distance.
    """
    queries = _flat(images, device)
    best = torch.full((len(queries),), torch.inf, device=device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=device)
    # In chunks: the matrix of all distances would not fit into memory for large sets.
    for start in range(0, len(reference), chunk):
        distance, position = torch.cdist(queries, _flat(reference[start : start + chunk], device)).min(1)
        closer = distance < best
        best, index = torch.where(closer, distance, best), torch.where(closer, position + start, index)
    nearest_index = index.cpu().numpy()
    # once more for the found pairs: cdist is a matrix product inside, and blurs small distances
    difference = images.astype(np.float32) - reference[nearest_index].astype(np.float32)
    return Nearest(nearest_index, np.sqrt(np.mean(difference**2, axis=(1, 2, 3))) / 255)


def check(
    synthetic: np.ndarray, train: Images, held_out: Images, device: torch.device | str = "cpu"
) -> tuple[dict, Nearest]:
    """Find the nearest real image of each synthetic one; all sets uint8 (N, C, H, W).

    Returns the nearest training images, and
    - `nearest_is_training`: share of synthetic images whose nearest real image is one of training, ties
      counted by half;
    - `expected`: that share without memorisation, N_train / (N_train + N_held_out), if both splits are drawn
      alike;
    - `excess`: (share - expected) / (1 - expected): around 0 without memorisation, 1 if all are copies;
    - `identical`: synthetic images that equal a training image in every pixel.
    """
    inside, outside = nearest(synthetic, train, device), nearest(synthetic, held_out, device)
    # Ties count by half, so that a set of exact duplicates in both splits is not called memorised.
    share = float(
        np.mean(inside.distance < outside.distance) + 0.5 * np.mean(inside.distance == outside.distance)
    )
    expected = len(train) / (len(train) + len(held_out))
    measures = {
        "nearest_is_training": share,
        "expected": expected,
        "excess": (share - expected) / (1 - expected),
        "identical": int(np.sum(inside.distance == 0)),
        "images": len(synthetic),
    }
    return measures, inside
