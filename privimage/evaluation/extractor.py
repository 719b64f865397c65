"""Networks whose features fidelity measures compare: Inception from a weights file, or a stand-in."""

import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage import torchvision_operators
from privimage.errors import UserError
from privimage.models import vit

PUBLISHED = "6726825d"  # first digits of the sha256 of torch-fidelity's weights-inception-2015-12-05
FIRST_LAYER = "Conv2d_1a_3x3.conv.weight"
FOREIGN = "these are not the Inception 2015-12-05 weights in torch-fidelity's format"
NAMES = {
    "2048": "FID",
    "768": "FD-768",
    "stand-in": "stand-in FD",
    "dinov2": "FD-DINOv2",
    "clip": "FD-CLIP",
}
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
    "dinov2": "features of a DINOv2 network: published FD-DINOv2 is that of ViT-L/14",
    "clip": "features of the image tower of a CLIP network",
}


@dataclass(frozen=True)
class Extractor:
    """A feature network, uint8 (B, 3, H, W) -> float32 (B, D), and the name of its distance."""

    features: str
    network: nn.Module
    sha256: str | None = None
    head: Tensor | None = None  # (1008, 2048), Inception's last layer without bias, where the file has it

    @property
    def name(self) -> str:
        """Name of the Fréchet distance: FID, FD-768 or stand-in FD."""
        return NAMES[self.features]

    @property
    def identity(self) -> str:
        """A string that differs for extractors with different features."""
        return f"{self.features}-{(self.sha256 or 'none')[:16]}"

    @property
    def note(self) -> str:
        """For the report: which features are compared, and with which numbers they are comparable."""
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
        random = np.random.RandomState(20151205)  # NumPy guarantees this stream
        weights = (
            random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
            for shape in ((32, 3, 3, 3), (48, 32, 3, 3), (64, 48, 3, 3))
        )
        self.filters = nn.ParameterList(
            nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False) for weight in weights
        )

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W) -> features float32 (B, 288)."""
        # Three scales; each ends with the mean and the deviation of its maps over all positions.
        maps, features = images.float() / 127.5 - 1, []
        for weight in self.filters:
            maps = F.relu(F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), weight))
            features += [maps.mean((2, 3)), maps.std((2, 3))]
            if maps.shape[-1] >= 4:
                maps = F.avg_pool2d(maps, 2)
        return torch.cat(features, 1)


def _read_weights(path: Path, key: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of a weights file, read without running anything in it, and the file's sha256."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}") from None
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(data)
        else:
            # weights_only: a file from elsewhere must not be able to run code.
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError
    except Exception:
        raise UserError(f"{key}: {path}: not a state dict of tensors, or damaged") from None
    return state, hashlib.sha256(data).hexdigest()


def _inception(
    state: dict[str, Tensor], features: str, path: Path, key: str, scratch: Path | None
) -> nn.Module:
    """torch-fidelity's network with these weights, through a copy, since it loads with weights_only=False."""
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
            raise UserError(f"{key}: {path}: {FOREIGN}") from None


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
    network = _First(_inception(found.state, found.layer, weights, "evaluate.inception_weights", scratch))
    head = found.state["fc.weight"].float()
    known = found.layer == "2048" and bool(head.any())
    return Extractor(found.layer, network, found.sha256, head if known else None)


def vision(weights: Path | None) -> Extractor | None:
    """The extractor for `evaluate.vision_weights`, DINOv2 or CLIP; None without weights.

    Raises UserError for missing or damaged weights, and for those of another network.
    """
    if weights is None:
        return None
    state, digest = _read_weights(weights, "evaluate.vision_weights")
    try:
        name, network = vit.from_weights(state)
    except ValueError as error:
        raise UserError(f"evaluate.vision_weights: {weights}: {error}") from None
    return Extractor(name, network, digest)


def given(weights: Path, key: str) -> Extractor:
    """The extractor for a weights file of Inception, with the best features that it allows, DINOv2 or CLIP.

    Raises UserError that begins with `key` for missing or damaged weights, and for those of another network.
    """
    state, digest = _read_weights(weights, key)
    if FIRST_LAYER in state:
        layer = "768" if _is_partial(state) else "2048"
        return Extractor(layer, _First(_inception(state, layer, weights, key, None)), digest)
    try:
        name, network = vit.from_weights(state)
    except ValueError as error:
        raise UserError(f"{key}: {weights}: {error}, nor Inception in torch-fidelity's format") from None
    return Extractor(name, network, digest)


@dataclass(frozen=True)
class Weights:
    """The content of a weights file, its sha256, and the features that are taken from it, "768" or "2048"."""

    state: dict[str, Tensor]
    sha256: str
    layer: str


def weights_for(features: str, weights: Path | None) -> Weights | None:
    """The weights for `choose`; None for the stand-in.

    Raises the same UserErrors, except for the weights of another network with the same names.
    """
    if features == "stand-in" or (features == "auto" and weights is None):
        return None
    if weights is None:
        raise UserError(f"evaluate.inception_weights: evaluate.features={features} needs the weights file")
    state, digest = _read_weights(weights, "evaluate.inception_weights")
    if FIRST_LAYER not in state:
        raise UserError(f"evaluate.inception_weights: {weights}: {FOREIGN}")
    partial = _is_partial(state)
    if features == "2048" and partial:
        reason = "partial weights, zero beyond the 768 features; FID needs 2048, use evaluate.features=768"
        raise UserError(f"evaluate.inception_weights: {weights}: {reason}")
    return Weights(state, digest, features if features != "auto" else ("768" if partial else "2048"))


def _is_partial(state: dict[str, Tensor]) -> bool:
    """Whether Inception's weights hold the layers up to the 768 features, and zeros above."""
    last = [
        value for name, value in state.items() if name.startswith("Mixed_7") and name.endswith("conv.weight")
    ]
    return not last or any(not value.any() for value in last)
