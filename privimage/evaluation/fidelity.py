"""How much synthetic images look like real ones: FID, KID, precision and recall, by torch-fidelity.

The name says which features were compared. Only the 2048 features of the Inception network of 2015-12-05 give
"FID"; its 768 features give "FD-768", and without weights a fixed random network gives "stand-in FD". Numbers
of different names are not comparable.
"""

import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage import torchvision_operators
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.storage.files import write_array
from privimage.telemetry.progress import Progress

PUBLISHED = "6726825d"  # first digits of the sha256 of torch-fidelity's weights-inception-2015-12-05
FIRST_LAYER = "Conv2d_1a_3x3.conv.weight"
FOREIGN = "these are not the Inception 2015-12-05 weights in torch-fidelity's format"
NAMES = {"2048": "FID", "768": "FD-768", "stand-in": "stand-in FD"}
NOTES = {
    "2048": "features of the Inception network",
    "768": (
        "the middle features (768) of the Inception network: good for comparing runs, not comparable to "
        "published FID"
    ),
    "stand-in": (
        "features of a fixed random network: it only ranks runs on the same set, and is not comparable "
        "to published numbers"
    ),
}


@dataclass(frozen=True)
class Extractor:
    """A feature network, uint8 (B, 3, H, W) -> float32 (B, D), and what its distance may be called."""

    features: str
    network: nn.Module
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What the Fréchet distance is called: FID, FD-768 or stand-in FD."""
        return NAMES[self.features]

    @property
    def identity(self) -> str:
        """Tells features of this extractor from those of any other."""
        return f"{self.features}-{(self.sha256 or 'none')[:16]}"

    @property
    def note(self) -> str:
        """What was compared, and with what it is comparable, for the report."""
        foreign = self.features == "2048" and not (self.sha256 or "").startswith(PUBLISHED)
        return NOTES[self.features] + (
            " but from another weights file than published work uses" if foreign else ""
        )


class StandIn(nn.Module):
    """Means and deviations of random convolutions at three scales: 288 features, the same on every machine.

    Random filters see edges and textures, and their pooled statistics move with blur, noise and missing
    classes; they know nothing of objects.
    """

    def __init__(self) -> None:
        super().__init__()
        random = np.random.RandomState(20151205)  # its stream is frozen for ever
        weights = (
            random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
            for shape in ((32, 3, 3, 3), (48, 32, 3, 3), (64, 48, 3, 3))
        )
        self.filters = nn.ParameterList(
            nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False) for weight in weights
        )

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W) -> features float32 (B, 288)."""
        maps, features = images.float() / 127.5 - 1, []
        for weight in self.filters:
            maps = F.relu(F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), weight))
            features += [maps.mean((2, 3)), maps.std((2, 3))]
            if maps.shape[-1] >= 4:
                maps = F.avg_pool2d(maps, 2)
        return torch.cat(features, 1)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict of a weights file, read without running anything in it, and the file's sha256."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"evaluate.inception_weights: {path}: {error.strerror}") from None
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError
    except Exception:
        raise UserError(
            f"evaluate.inception_weights: {path}: not a state dict of tensors, or damaged"
        ) from None
    return state, hashlib.sha256(data).hexdigest()


def _inception(state: dict[str, Tensor], features: str, path: Path, scratch: Path) -> nn.Module:
    """torch-fidelity's network with these weights.

    Its constructor loads with weights_only=False, so it gets a copy written by us.
    """
    torchvision_operators.declare()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth", dir=scratch) as copy:
        torch.save(state, copy)
        copy.flush()
        try:
            return FeatureExtractorInceptionV3(
                "inception-v3-compat", [features], feature_extractor_weights_path=copy.name
            )
        except RuntimeError:
            raise UserError(f"evaluate.inception_weights: {path}: {FOREIGN}") from None


class _First(nn.Module):
    """torch-fidelity's networks return a tuple with one entry a requested layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def choose(features: str, weights: Path | None, scratch: Path) -> Extractor:
    """The extractor for `evaluate.features` ("auto", "2048", "768", "stand-in") and
    `evaluate.inception_weights`.

    "auto" takes the best that the weights allow, and the stand-in without weights. `scratch` is a folder for
    a temporary file. Raises UserError for missing or damaged weights, and for "2048" with weights that are
    zero beyond the 768 features.
    """
    if (found := weights_for(features, weights)) is None:
        return Extractor("stand-in", StandIn())
    assert weights is not None  # `weights_for` has read them
    return Extractor(
        found.layer, _First(_inception(found.state, found.layer, weights, scratch)), found.sha256
    )


@dataclass(frozen=True)
class Weights:
    """The content of a weights file, its sha256, and the features that are taken from it, "768" or "2048"."""

    state: dict[str, Tensor]
    sha256: str
    layer: str


def weights_for(features: str, weights: Path | None) -> Weights | None:
    """What `choose` builds its extractor from; None for the stand-in.

    Raises the same UserErrors, but for weights of another network with the same names.
    """
    if features == "stand-in" or (features == "auto" and weights is None):
        return None
    if weights is None:
        raise UserError(f"evaluate.inception_weights: evaluate.features={features} needs the weights file")
    state, digest = _read_weights(weights)
    if FIRST_LAYER not in state:
        raise UserError(f"evaluate.inception_weights: {weights}: {FOREIGN}")
    last = [
        value for name, value in state.items() if name.startswith("Mixed_7") and name.endswith("conv.weight")
    ]
    partial = not last or any(not value.any() for value in last)
    if features == "2048" and partial:
        told = "partial weights, zero beyond the 768 features; FID needs 2048, use evaluate.features=768"
        raise UserError(f"evaluate.inception_weights: {weights}: {told}")
    return Weights(state, digest, features if features != "auto" else ("768" if partial else "2048"))


@torch.inference_mode()
def extract(
    extractor: Extractor, images: np.ndarray, world: World, label: str, batch_size: int = 64
) -> Tensor:
    """Features float32 (N, D) of images uint8 (N, C, H, W); grey images are repeated to three channels.

    The ranks share the work and all get the result. Raises TypeError for anything but uint8 N,C,H,W: floats
    would be taken for 0 to 255 without a word. Raises Stopped when a stop was requested.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise TypeError(
            f"expected uint8 images N,C,H,W with 1 or 3 channels, got {images.dtype} {images.shape}"
        )
    network = extractor.network.to(world.device).eval()
    own, parts = images[world.rank :: world.size], []
    with Progress(label, total=len(own), shown=world.is_main) as bar:
        for start in range(0, len(own), batch_size):
            batch = torch.from_numpy(own[start : start + batch_size]).to(world.device).expand(-1, 3, -1, -1)
            parts.append(network(batch).float())
            bar.advance(len(batch))
            if stop.requested:
                break
    if stop.agreed(world):
        raise Stopped("evaluate: finished measures are kept, features are computed again")
    width = network(torch.zeros(1, 3, *images.shape[2:], dtype=torch.uint8, device=world.device)).shape[1]
    everything = torch.zeros(len(images), width, device=world.device)
    if parts:
        everything[world.rank :: world.size] = torch.cat(parts)
    return world.all_reduce_(everything).cpu()


def cached(path: Path, compute, world: World) -> Tensor:
    """`compute()` on all ranks, or what it gave before, kept at `path` (sensitive: below `private/`)."""
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
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double()) for features in (synthetic, real)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kernel_distance(synthetic: Tensor, real: Tensor) -> tuple[float, float]:
    """KID, the unbiased squared MMD with the cubic kernel (Bińkowski et al.

    2018), and its deviation over 100 subsets.

    Subsets hold 1,000 images, or half of the smaller set where that is less. Around 0 (it may be negative)
    for equal distributions.
    """
    torchvision_operators.declare()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(1000, max(2, min(len(synthetic), len(real)) // 2))
    result = kid_features_to_metric(
        synthetic, real, kid_subset_size=size, kid_subsets=100, rng_seed=2020, verbose=False
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(synthetic: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of synthetic images inside the real manifold, and of real ones inside the synthetic manifold, in
    [0, 1].

    Manifolds are unions of balls that reach to the third neighbour (Kynkäänniemi et al. 2019).
    """
    torchvision_operators.declare()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    result = prc_features_to_metric(
        synthetic, real, prc_neighborhood=3, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def described(extractor: Extractor, synthetic: Tensor, real: Tensor) -> dict:
    """All measures of two feature sets (N, D) and (M, D), under names that say what they are.

    `distance` and `kernel_distance` are always there; `fid` and `kid` repeat them only where they may be
    called so.
    """
    distance, (kernel, deviation), (precision, recall) = (
        frechet_distance(synthetic, real),
        kernel_distance(synthetic, real),
        precision_recall(synthetic, real),
    )
    genuine = extractor.features == "2048"
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
        "reference_samples": len(real),
        "weights_sha256": extractor.sha256,
        "note": extractor.note,
    }
