"""The classifiers of DPImageBench (Gong et al. 2025): ResNet, WideResNet and ResNeXt for small images.

Each has a 3x3 convolution as its stem, three groups of residual blocks, of which the second and the third
halve the map, and global average pooling.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from privimage.models.resnet import Classifier

# Blocks in each of the three groups, and channels of the first group, which the others double. "small" is
# ResNet-110, WRN-40-4 and ResNeXt-29 (8x64d); "large", which the benchmark takes for CIFAR, ResNet-164,
# WRN-28-10 and a ResNeXt (8x64d) of six blocks and 2.5 times the channels.
SIZES = {
    "small": {"resnet": (18, 16), "wrn": (6, 64), "resnext": (3, 256)},
    "large": {"resnet": (27, 16), "wrn": (4, 160), "resnext": (2, 640)},
}
DROPOUT = 0.3  # of WideResNet
CARDINALITY, BOTTLENECK = 8, 64  # of ResNeXt: groups, and their width in the first group of blocks


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class _After(nn.Module):
    """relu(x + branch(x)): (B, C, H, W) -> (B, outputs, H / stride, W / stride) (He et al. 2016)."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch, self.shortcut = branch, nn.Sequential()
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.shortcut(images) + self.branch(images))


class _Before(nn.Module):
    """x + branch(relu(norm(x))): (B, C, H, W) -> (B, outputs, H / stride, W / stride) (Zagoruyko and
    Komodakis 2016).
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.branch = nn.Sequential(
            _convolution(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(DROPOUT),
            _convolution(outputs, outputs, 3),
        )  # fmt: skip
        self.shortcut = _convolution(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.norm(images))
        return self.branch(active) + (images if self.shortcut is None else self.shortcut(active))


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions (He et al. 2016)."""
    branch = nn.Sequential(
        _convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(),
        _convolution(outputs, outputs, 3), nn.BatchNorm2d(outputs),
    )  # fmt: skip
    return _After(branch, inputs, outputs, stride)


def _grouped(inputs: int, outputs: int, stride: int, width: int) -> nn.Module:
    """A bottleneck of `width` channels, whose 3x3 convolution is in groups (Xie et al. 2017)."""
    branch = nn.Sequential(
        _convolution(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
        _convolution(width, width, 3, stride, CARDINALITY), nn.BatchNorm2d(width), nn.ReLU(),
        _convolution(width, outputs, 1), nn.BatchNorm2d(outputs),
    )  # fmt: skip
    return _After(branch, inputs, outputs, stride)


def benchmark_classifier(name: str, size: tuple[int, int], channels: int, n_classes: int) -> Classifier:
    """ "resnet", "wrn" or "resnext", with `size` blocks in a group and channels of the first group.

    Parameters of the small ones at 3 channels and 10 classes: 1.7, 8.9 and 34.4 million.
    """
    blocks, first = size
    # The stem has as many channels as the papers' networks: 16, and 64 for ResNeXt.
    inputs = 64 if name == "resnext" else 16
    stem, norm = _convolution(channels, inputs, 3), nn.BatchNorm2d(inputs)
    layers: list[nn.Module] = [stem] if name == "wrn" else [stem, norm, nn.ReLU()]
    for group, outputs in enumerate((first, 2 * first, 4 * first)):
        for block in range(blocks):
            stride = 2 if group and not block else 1
            if name == "resnet":
                layers.append(_basic(inputs, outputs, stride))
            elif name == "wrn":
                layers.append(_Before(inputs, outputs, stride))
            else:
                layers.append(_grouped(inputs, outputs, stride, CARDINALITY * BOTTLENECK * 2**group))
            inputs = outputs
    if name == "wrn":
        layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
    network = Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs, n_classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return network
