"""BigGAN (Brock et al. 2019) for the GAN methods.

The discriminator has GroupNorm in place of batch norm and no spectral norm: it alone sees sensitive images,
so its gradient is clipped per image. Batch norm would make one image's gradient depend on the others of its
batch, so that no clipping could bound what one image changes. Spectral norm would hide the weights behind a
parametrization that per-layer gradient rules do not see, with a power iteration that alters the layer at
every forward pass; its purpose, a bound on how far the discriminator can move, is served by clipping. The
generator sees latents and labels only and keeps both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from privimage.models.ddpmpp import groups

LATENT = 80


def _orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
        nn.init.orthogonal_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)


def _spectral(module: nn.Module) -> nn.Module:
    # On the meta device there are shapes and no values, and a power iteration of these takes a second.
    if module.weight.is_meta:
        return module
    # Orthogonal before the parametrization: writing to the weight afterwards would go through its right
    # inverse.
    _orthogonal(module)
    return spectral_norm(module, eps=1e-6)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in a condition (B, inputs)."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
        self.gain = _spectral(nn.Linear(inputs, channels, bias=False))
        self.bias = _spectral(nn.Linear(inputs, channels, bias=False))

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """(B, C, H, W), (B, inputs) -> (B, C, H, W)."""
        return (
            self.norm(images) * (1 + self.gain(condition))[:, :, None, None]
            + self.bias(condition)[:, :, None, None]
        )


class GeneratorBlock(nn.Module):
    """Residual block that doubles the resolution."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm_1 = ConditionalBatchNorm(condition, inputs)
        self.norm_2 = ConditionalBatchNorm(condition, outputs)
        self.skip = _spectral(nn.Conv2d(inputs, outputs, 1))
        self.conv_1 = _spectral(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv_2 = _spectral(nn.Conv2d(outputs, outputs, 3, padding=1))

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, 2H, 2W)."""
        hidden = self.conv_1(F.interpolate(F.relu(self.norm_1(images, condition)), scale_factor=2.0))
        hidden = self.conv_2(F.relu(self.norm_2(hidden, condition)))
        return hidden + self.skip(F.interpolate(images, scale_factor=2.0))


class SelfAttention(nn.Module):
    """Self-attention with pooled keys and values and a gate that starts closed (Zhang et al. 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = _spectral(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.key = _spectral(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.value = _spectral(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.output = _spectral(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        # Every position attends to a pooled grid: a quarter of the keys, at no visible loss of quality.
        query = self.query(images).flatten(2)
        key, value = (F.max_pool2d(layer(images), 2).flatten(2) for layer in (self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        mixed = (value @ weights.transpose(1, 2)).unflatten(2, images.shape[2:])
        return images + self.gate * self.output(mixed)


class Generator(nn.Module):
    """Latents and labels to images.

    The latent, of 80 numbers, is cut into equal chunks (4 of 20 for 32x32): the first makes the smallest map
    (4x4; 7x7 for 28x28), each of the others joins the class embedding as the condition of one block that
    doubles the map. `n_classes` >= 1; an unlabelled set has one class.
    """

    def __init__(
        self, resolution: int, channels: int, n_classes: int, width: int = 96, shared: int = 128
    ) -> None:
        super().__init__()
        # Halve the resolution down to the smallest map of at most 7x7; each halving is one block.
        self.bottom, blocks = resolution, 0
        while self.bottom > 7 and self.bottom % 2 == 0:
            self.bottom, blocks = self.bottom // 2, blocks + 1
        # Channels per block: constant up to 32x32, growing towards the smallest map above (Brock et al.,
        # Tables 4 to 9).
        outputs = (
            [4 * width] * blocks
            if resolution <= 32
            else [width * min(16, 2**level) for level in reversed(range(blocks))]
        )
        inputs = [4 * width if resolution <= 32 else width * min(16, 2**blocks), *outputs[:-1]]
        # LATENT numbers are shared out; the remainder of an uneven division is not used.
        self.chunk = LATENT // (blocks + 1)
        self.latent_size = self.chunk * (blocks + 1)
        # One class embedding for all blocks, as in Brock et al. ("shared embedding").
        self.label = nn.Embedding(n_classes, shared)
        _orthogonal(self.label)
        self.input = _spectral(nn.Linear(self.chunk, inputs[0] * self.bottom**2))
        self.blocks = nn.ModuleList(
            GeneratorBlock(a, b, self.chunk + shared) for a, b in zip(inputs, outputs, strict=True)
        )
        # After block 2; one earlier where block 2 is the last, and none for a single block.
        self.attention_after = min(2, blocks - 1)
        self.attention = (
            SelfAttention(outputs[self.attention_after - 1]) if self.attention_after > 0 else None
        )
        self.norm = nn.BatchNorm2d(outputs[-1], eps=1e-4)
        self.output = _spectral(nn.Conv2d(outputs[-1], channels, 3, padding=1))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """latents (B, latent_size) standard normal, labels (B,) int64 in [0, n_classes) -> images (B, C, H,
        W) in [-1, 1].
        """
        # Hierarchical latents: a chunk for the input layer and one for each block.
        first, *chunks = latents.split(self.chunk, dim=1)
        shared = self.label(labels)
        hidden = self.input(first).unflatten(1, (-1, self.bottom, self.bottom))
        for number, (block, chunk) in enumerate(zip(self.blocks, chunks, strict=True), start=1):
            hidden = block(hidden, torch.cat([shared, chunk], dim=1))
            if self.attention is not None and number == self.attention_after:
                hidden = self.attention(hidden)
        return torch.tanh(self.output(F.relu(self.norm(hidden))))


@torch.no_grad()
def recalibrate(generator: Generator, batches: Sequence[tuple[Tensor, Tensor]]) -> Generator:
    """Recompute batch-norm statistics and spectral vectors for the current weights, and switch to eval mode.

    Running means and variances become the averages over `batches` (latents, labels), and the vectors of the
    spectral norm those of a power iteration with one step per batch. An averaged or freshly updated generator
    needs this: the statistics of one network are not those of another (Brock et al. 2019, "standing
    statistics"). In eval mode an image depends on its own latent and label alone.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    generator.train()
    # The spectral norm first, on which the statistics depend; its power iteration sees weights only.
    for latents, labels in batches:
        generator(latents[:1], labels[:1])
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    for latents, labels in batches:
        generator(latents, labels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return generator.eval()


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups(channels, 32), channels, eps=1e-4)


class DiscriminatorBlock(nn.Module):
    """Residual block.

    The first one of the network leaves out the normalisation and activation of its input, which are pixels.
    """

    def __init__(self, inputs: int, outputs: int, down: bool, first: bool) -> None:
        super().__init__()
        self.down, self.first = down, first
        resized = down or inputs != outputs
        self.norm_skip = _group_norm(inputs) if resized else None
        self.skip = nn.Conv2d(inputs, outputs, 1) if resized else None
        self.norm_1 = None if first else _group_norm(inputs)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_2 = _group_norm(outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H or H / 2, ...)."""
        # Pre-activation residual block: normalise, activate, convolve, twice.
        hidden = images if self.norm_1 is None else F.relu(self.norm_1(images))
        hidden = self.conv_2(F.relu(self.norm_2(self.conv_1(hidden))))
        hidden = F.avg_pool2d(hidden, 2) if self.down else hidden
        # The skip path: identity where the shape stays, else a 1x1 convolution of the normalised input.
        if self.skip is None or self.norm_skip is None:
            return hidden + images
        if self.first:
            return hidden + self.skip(self.norm_skip(F.avg_pool2d(images, 2)))
        skip = self.skip(self.norm_skip(images))
        return hidden + (F.avg_pool2d(skip, 2) if self.down else skip)


class Discriminator(nn.Module):
    """Projection discriminator (Miyato and Koyama 2018): 4 blocks up to 32x32, two of them halving.

    Above, one more a doubling.
    """

    def __init__(self, resolution: int, channels: int, n_classes: int, width: int = 96) -> None:
        super().__init__()
        # As in the paper's networks for 32x32; above, one block for each doubling down to 4x4.
        if resolution <= 32:
            outputs, halvings = [2 * width] * 4, 2
        else:
            halvings = (resolution // 4).bit_length() - 1
            outputs = [width * min(16, 2**level) for level in range(halvings + 1)]
        inputs = [channels, *outputs[:-1]]
        self.blocks = nn.Sequential(
            *(
                DiscriminatorBlock(a, b, index < halvings, index == 0)
                for index, (a, b) in enumerate(zip(inputs, outputs, strict=True))
            )
        )
        self.label = nn.Embedding(n_classes, outputs[-1])
        self.output = nn.Linear(outputs[-1], 1)
        self.apply(_orthogonal)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1], labels (B,) int64 in [0, n_classes) -> scores (B,)."""
        # The score is linear in the features; the label adds an inner product with its own embedding.
        features = F.relu(self.blocks(images)).sum((2, 3))
        return self.output(features)[:, 0] + (self.label(labels) * features).sum(1)


def d_loss_real(scores: Tensor) -> Tensor:
    """Hinge loss of the discriminator on each real image: scores (B,) -> (B,)."""
    return F.relu(1 - scores)


def d_loss_fake(scores: Tensor) -> Tensor:
    """Hinge loss of the discriminator on each generated image: scores (B,) -> (B,)."""
    return F.relu(1 + scores)


def g_loss(scores: Tensor) -> Tensor:
    """Loss of the generator on each generated image: scores (B,) -> (B,)."""
    return -scores
