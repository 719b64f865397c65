"""Classifiers: the semantic query function, and the CNN that measures how useful a synthetic set is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage import torchvision_operators


class Classifier(nn.Module):
    """A convolutional trunk and a linear head."""

    def __init__(self, trunk: nn.Module, features: int, n_classes: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(features, n_classes)

    def features(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float -> penultimate features (B, F)."""
        return self.trunk(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """images (B, C, H, W) float -> the output (B, C_i, H_i, W_i) of each block of the trunk, in order."""
        found = []
        for layer in self.trunk.children():
            images = layer(images)
            if isinstance(layer, BLOCKS):
                found.append(images)
        return found

    def body(self) -> nn.Sequential:
        """The layers of the trunk up to its last block but one: images (B, C, H, W) float -> maps."""
        layers = list(self.trunk.children())
        blocks = [place for place, layer in enumerate(layers) if isinstance(layer, BLOCKS)]
        return nn.Sequential(*layers[: blocks[-2] + 1])

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float -> logits (B, n_classes)."""
        return self.head(self.features(images))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Residual(nn.Module):
    """x + two convolutions of x: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.branch(images)


BLOCKS = (nn.Sequential, _Residual)  # convolutions, residual blocks, and the stages of resnet50


def classifier(name: str, channels: int, n_classes: int) -> Classifier:
    """The query function: "resnet50" with a stem for small images, or "resnet-small".

    resnet50 (He et al. 2016) has a 3x3 convolution of stride 1 without max-pool as its stem, as is usual on
    CIFAR-10. resnet-small has 0.7 M parameters and is meant for 8x8 to 28x28.
    """
    if name == "resnet50":
        torchvision_operators.declare()
        from torchvision.models import resnet50

        # Never pretrained weights: what they have seen is not known.
        trunk = resnet50(weights=None)
        features = trunk.fc.in_features
        trunk.conv1 = nn.Conv2d(channels, trunk.conv1.out_channels, 3, 1, 1, bias=False)
        trunk.maxpool, trunk.fc = nn.Identity(), nn.Identity()
        return Classifier(trunk, features, n_classes)
    if name == "resnet-small":
        layers = [
            _convolution(channels, 32),
            _convolution(32, 64, stride=2),
            _Residual(64),
            _convolution(64, 128, stride=2),
            _Residual(128),
        ]
        return Classifier(
            nn.Sequential(*layers, _convolution(128, 192), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            192,
            n_classes,
        )
    raise ValueError(f"unknown classifier {name!r}")


class _Pool(nn.Module):
    """Halve the map where at least 2x2 remain: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def forward(self, images: Tensor) -> Tensor:
        return F.max_pool2d(images, 2) if images.shape[-1] >= 4 else images


class _Scaled(nn.Module):
    """`factor` times the features (B, F)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * features


def resnet9(channels: int, n_classes: int, resolution: int) -> Classifier:
    """The CNN of the evaluation: the ResNet-9 of DAWNBench's fast CIFAR-10 entries (6.6 M parameters).

    As there an eighth of the features enters the logits, of half as many a quarter. They are maxima, hence
    large, and the first steps on whole ones lead so far astray that a few hundred more do not mend it.

    Images below 32x32 get half its width, a quarter of the work: characters need no more, and two cores can
    finish it.
    """
    width = 64 if resolution >= 32 else 32
    trunk = nn.Sequential(
        _convolution(channels, width),
        _convolution(width, 2 * width), _Pool(), _Residual(2 * width),
        _convolution(2 * width, 4 * width), _Pool(),
        _convolution(4 * width, 8 * width), _Pool(), _Residual(8 * width),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), _Scaled(8 / width),
    )  # fmt: skip
    # Channels last: faster, on CPUs and GPUs.
    network = Classifier(trunk, 8 * width, n_classes)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
