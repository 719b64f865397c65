"""DDPM++: the U-Net of the diffusion methods.

Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix H.

Written for per-image gradients: parameters live only in Conv2d, Linear, GroupNorm and Embedding layers, each
of which runs exactly once in a forward pass; nothing is added in place and no statistic is taken over the
batch.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def groups(channels: int, most: int) -> int:
    """The largest number of groups, `most` at the utmost, that divides `channels`."""
    return max(count for count in range(1, max(most, 1) + 1) if channels % count == 0)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups(channels, min(channels // 4, 32)), channels, eps=1e-6)


def _initialised(layer: Layer, scale: float = 1.0) -> Layer:
    # Uniform with variance scale / mean(fan in, fan out), as in Song et al.; a scale of 1e-10 makes a block
    # start as the identity.
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def sinusoidal(values: Tensor, dimension: int) -> Tensor:
    """Sines and cosines of `values` (B,) at frequencies from 1 down to 1e-4: (B, dimension), fp32."""
    # Half of the outputs are sines, half cosines; an odd dimension ends with a zero.
    half = dimension // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / max(half - 1, 1)
    angles = values.float()[:, None] * 1e-4**exponents
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dimension % 2))


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a skip sum divided by sqrt(2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.query_key_value = _initialised(nn.Conv2d(channels, 3 * channels, 1))
        self.output = _initialised(nn.Conv2d(channels, channels, 1), 1e-10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        # Written out: the fused kernels sum in no fixed order on GPUs, and a resumed run must repeat itself
        # to the bit.
        query, key, value = self.query_key_value(self.norm(images)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(images.shape[1]), dim=-1)
        mixed = (value @ weights.transpose(1, 2)).reshape(images.shape)
        return (images + self.output(mixed)) / math.sqrt(2)


class Block(nn.Module):
    """BigGAN-style residual block that resamples inside: nearest x2 for "up", average pool for "down".

    Attention after it if asked.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, resample: str = "none", attention: bool = False
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1 = _norm(inputs)
        self.conv_1 = _initialised(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.embedding = _initialised(nn.Linear(embedding, outputs))
        self.norm_2 = _norm(outputs)
        self.conv_2 = _initialised(nn.Conv2d(outputs, outputs, 3, padding=1), 1e-10)
        self.skip = (
            _initialised(nn.Conv2d(inputs, outputs, 1)) if inputs != outputs or resample != "none" else None
        )
        self.attention = Attention(outputs) if attention else None

    def _resampled(self, images: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(images, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(images, 2) if self.resample == "down" else images

    def forward(self, images: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) and an activated embedding (B, E) -> (B, outputs, H', W')."""
        # Resampling comes between activation and convolution, on both paths (BigGAN's order).
        hidden = self.conv_1(self._resampled(F.silu(self.norm_1(images))))
        hidden = hidden + self.embedding(embedding)[:, :, None, None]
        hidden = self.conv_2(F.silu(self.norm_2(hidden)))
        skip = self._resampled(images)
        hidden = ((skip if self.skip is None else self.skip(skip)) + hidden) / math.sqrt(2)
        return hidden if self.attention is None else self.attention(hidden)


class DDPMpp(nn.Module):
    """The network F of the EDM preconditioning.

    `resolution` must be divisible by 2^(levels - 1). `attention` lists the resolutions with self-attention:
    after each block on the way down, after the last block of the level on the way up; the middle always has
    it. `n_classes` = 0 means no label embedding; else label `n_classes` stands for "no label".
    """

    def __init__(
        self,
        resolution: int,
        channels: int,
        n_classes: int,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 2),
        attention: tuple[int, ...] = (16,),
    ) -> None:
        super().__init__()
        if resolution % 2 ** (len(multipliers) - 1):
            raise ValueError(f"a resolution of {resolution} cannot be halved {len(multipliers) - 1} times")
        self.n_classes, self.width = n_classes, width
        self.recompute = False  # whether training computes activations of a block again in the backward pass
        size = 4 * width
        # One row more than there are classes: the last one is "no label", for guidance.
        self.label = nn.Embedding(n_classes + 1, width) if n_classes else None
        self.embed_1 = _initialised(nn.Linear(width, size))
        self.embed_2 = _initialised(nn.Linear(size, size))
        self.input = _initialised(nn.Conv2d(channels, width, 3, padding=1))

        # The decoder is built from the channels that the encoder leaves, in reverse.
        encoder, skips = self._encoder(resolution, multipliers, attention)
        current = skips[-1]
        self.encoder = nn.ModuleList(encoder)
        self.middle = nn.ModuleList(
            [Block(current, current, size, attention=True), Block(current, current, size)]
        )
        self.decoder = nn.ModuleList(self._decoder(resolution, multipliers, attention, current, skips))
        self.norm = _norm(width * multipliers[0])
        self.output = _initialised(nn.Conv2d(width * multipliers[0], channels, 3, padding=1), 1e-10)

    def _encoder(
        self, resolution: int, multipliers: tuple[int, ...], attention: tuple[int, ...]
    ) -> tuple[list[Block], list[int]]:
        """Two blocks for each level and one that halves the resolution between levels.

        Also the channels of all activations that the decoder will see.
        """
        size, current, blocks, skips = 4 * self.width, self.width, [], [self.width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(2):
                blocks.append(
                    Block(current, self.width * multiplier, size, attention=resolution >> level in attention)
                )
                current = self.width * multiplier
                skips.append(current)
            if level < len(multipliers) - 1:
                blocks.append(Block(current, current, size, "down"))
                skips.append(current)
        return blocks, skips

    def _decoder(
        self,
        resolution: int,
        multipliers: tuple[int, ...],
        attention: tuple[int, ...],
        current: int,
        skips: list[int],
    ) -> list[Block]:
        """Three blocks for each level, each beside an activation of the encoder, and one that doubles the
        resolution between levels.
        """
        size, blocks, left = 4 * self.width, [], list(skips)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for position in range(3):
                attended = position == 2 and resolution >> level in attention
                blocks.append(Block(current + left.pop(), self.width * multiplier, size, attention=attended))
                current = self.width * multiplier
            if level > 0:
                blocks.append(Block(current, current, size, "up"))
        return blocks

    def forward(self, images: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """images (B, C, H, W) float, c_noise (B,) float, labels (B,) int64 in [0, n_classes] or None for no
        label -> (B, C, H, W).

        Labels are ignored by a network with n_classes = 0.
        """
        embedding = sinusoidal(c_noise, self.width).to(images.dtype)
        if self.label is not None:
            if labels is None:
                labels = torch.full((len(images),), self.n_classes, dtype=torch.int64, device=images.device)
            embedding = embedding + self.label(labels)
        # Each block's Linear wants the activated embedding: activated once here.
        embedding = F.silu(self.embed_2(F.silu(self.embed_1(embedding))))
        skips = [self.input(images)]
        for block in self.encoder:
            skips.append(self._run(block, skips[-1], embedding))
        # Lowest resolution, then up again; each block of the decoder takes back one activation of the
        # encoder.
        hidden = skips[-1]
        for block in self.middle:
            hidden = self._run(block, hidden, embedding)
        for block in self.decoder:
            inputs = hidden if block.resample == "up" else torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._run(block, inputs, embedding)
        return self.output(F.silu(self.norm(hidden)))

    def _run(self, block: nn.Module, images: Tensor, embedding: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, images, embedding, use_reentrant=False)
        return block(images, embedding)
