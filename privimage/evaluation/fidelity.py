"""Fidelity of synthetic images: FID, KID, precision, recall and Inception score, by torch-fidelity.

The name states which features were compared. Only the 2048 features of the Inception network of 2015-12-05
give "FID"; its 768 features give "FD-768", and without weights a fixed random network gives "stand-in FD".
Numbers of different names are not comparable.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage import torchvision_operators
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.evaluation.extractor import Extractor
from privimage.storage.files import write_array
from privimage.telemetry.progress import Progress

BLOCK = 1000  # images whose features are in double precision at once
DISTANCES = 20_000_000  # between features, held at once
SPLITS = 10  # of the images, over which the Inception score is averaged


@torch.inference_mode()
def extract(
    extractor: Extractor, images: np.ndarray, world: World, label: str, batch_size: int = 64
) -> Tensor:
    """Features float32 (N, D) of images uint8 (N, C, H, W); grey images are repeated to three channels.

    The ranks share the work and all get the result. Raises TypeError for anything but uint8 N,C,H,W, since
    floats would silently be read as 0 to 255. Raises Stopped when a stop was requested.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise TypeError(
            f"expected uint8 images N,C,H,W with 1 or 3 channels, got {images.dtype} {images.shape}"
        )
    # Each rank takes every W-th image, and writes its rows where they belong: features are held once.
    network = extractor.network.to(world.device).eval()
    width = network(torch.zeros(1, 3, *images.shape[2:], dtype=torch.uint8, device=world.device)).shape[1]
    everything = torch.zeros(len(images), width, device=world.device)
    share, rows = images[world.rank :: world.size], everything[world.rank :: world.size]
    with Progress(label, total=len(share), shown=world.is_main) as bar:
        for start in range(0, len(share), batch_size):
            batch = torch.from_numpy(share[start : start + batch_size]).to(world.device).expand(-1, 3, -1, -1)
            rows[start : start + batch_size] = network(batch).float()
            bar.advance(len(batch))
            if stop.requested:
                break
    if stop.agreed(world):
        raise Stopped("evaluate: finished measures are kept, features are computed again")
    return world.all_reduce_(everything).cpu()


def cached(path: Path, compute, world: World) -> Tensor:
    """Features (N, D) from `compute()` on all ranks, cached at `path` (sensitive: below `private/`)."""
    # The main rank decides whether there is a cache, so that all ranks either compute or do not.
    known = world.broadcast_object(np.load(path) if world.is_main and path.exists() else None)
    if known is not None:
        return torch.from_numpy(known)
    features = compute()
    if world.is_main:
        write_array(path, features.numpy())
    return features


def frechet_distance(synthetic: Tensor, real: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017).

    0 for equal sets.
    """
    torchvision_operators.declare()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [_moments(features) for features in (synthetic, real)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def _moments(features: Tensor) -> dict[str, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D).

    In double precision, since covariances of thousands of features lose digits otherwise, and block by block,
    since 50,000 images would be held several times.
    """
    mean = sum(block.double().sum(0) for block in features.split(BLOCK)) / len(features)
    assert isinstance(mean, Tensor)  # there is an image
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in features.split(BLOCK):
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred)
    return {"mu": mean.numpy(), "sigma": (covariance / (len(features) - 1)).numpy()}


def kernel_distance(synthetic: Tensor, real: Tensor) -> tuple[float, float]:
    """KID of features (N, D) and (M, D), and its deviation over 100 subsets (Bińkowski et al. 2018).

    The unbiased squared MMD with the cubic kernel. Subsets hold 1,000 images, or half of the smaller set
    where that is less. Around 0 (it may be negative) for equal distributions.
    """
    torchvision_operators.declare()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    # Smaller subsets for smaller sets; the estimator stays unbiased.
    size = min(1000, max(2, min(len(synthetic), len(real)) // 2))
    result = kid_features_to_metric(
        synthetic, real, kid_subset_size=size, kid_subsets=100, rng_seed=2020, verbose=False
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(synthetic: Tensor, real: Tensor) -> tuple[float, float]:
    """Precision and recall in [0, 1] of features (N, D) and (M, D) (Kynkäänniemi et al. 2019).

    The share of synthetic images inside the manifold of the real ones, and the reverse. Manifolds are unions
    of balls that reach to the third neighbour.
    """
    torchvision_operators.declare()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # Distances of a batch to all others are held at once.
    batch = max(100, min(2000, DISTANCES // max(len(synthetic), len(real))))
    result = prc_features_to_metric(
        synthetic, real, prc_neighborhood=3, prc_batch_size=batch, save_cpu_ram=True, verbose=False
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def inception_score(features: Tensor, head: Tensor) -> tuple[float, float]:
    """Inception score of features (N, 2048), and its deviation, over 10 splits (Salimans et al. 2016).

    `head` (1008, 2048) are the weights of Inception's last layer, without its bias, as torch-fidelity has it.
    It looks at the synthetic images alone; 1 to 1008. Raises ValueError for fewer images than splits.
    """
    torchvision_operators.declare()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if len(features) < SPLITS:
        raise ValueError(f"{len(features)} images cannot be split in {SPLITS}")
    # Split by split, so that the logits of all images are never held together.
    order = np.random.RandomState(2020).permutation(len(features))
    scores = [
        isc_features_to_metric(features[order[rows]] @ head.T, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        for rows in (
            slice(split * len(features) // SPLITS, (split + 1) * len(features) // SPLITS)
            for split in range(SPLITS)
        )
    ]
    return float(np.mean(scores)), float(np.std(scores))


def described(extractor: Extractor, synthetic: Tensor, real: Tensor) -> dict:
    """All measures of two feature sets (N, D) and (M, D), under names that state their features.

    `distance` and `kernel_distance` are always present; `fid` and `kid` repeat them only for the 2048
    features. `inception_score` is None without the last layer of Inception.
    """
    distance, (kernel, deviation), (precision, recall) = (
        frechet_distance(synthetic, real),
        kernel_distance(synthetic, real),
        precision_recall(synthetic, real),
    )
    genuine = extractor.features == "2048"
    score = spread = None
    if extractor.head is not None and len(synthetic) >= SPLITS:
        score, spread = inception_score(synthetic, extractor.head)
    return {
        "name": extractor.name,
        "fid": distance if genuine else None,
        "kid": kernel if genuine else None,
        "precision": precision,
        "recall": recall,
        "samples": len(synthetic),
        "features": extractor.features,
        "distance": distance,
        "kernel_name": extractor.name.replace("FID", "KID").replace("FD", "KD"),
        "kernel_distance": kernel,
        "kernel_deviation": deviation,
        "inception_score": score,
        "inception_deviation": spread,
        "reference_samples": len(real),
        "weights_sha256": extractor.sha256,
        "note": extractor.note,
    }
