"""Two ways to the per-image weight gradients of a convolution, with the noise copies folded in."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCHES = 1 << 26  # numbers in the patches that are in memory at once


@dataclass
class Folding:
    """How the batch of the present pass is laid out: `copies` times `images`."""

    images: int = 0
    copies: int = 0


class ConvolutionBackends:
    """Backend of each convolution: as recorded, else timed on first use.

    Only a GPU is timed. On a CPU it is the grouped one, but for 1x1 kernels, which were faster as matrix
    products in every measurement.
    """

    def __init__(self, choices: dict[str, str]):
        self.choices = choices

    def gradients(
        self, name: str, layer: nn.Conv2d, x: Tensor, g: Tensor, folding: Folding
    ) -> tuple[Tensor, Tensor]:
        """Per-image gradients of weight (B, O, C, kh, kw) and bias (B, O) of `layer` for its input x and its
        output's gradient g.
        """
        if name not in self.choices:
            usual = "unfolded" if layer.kernel_size == (1, 1) else "grouped"
            self.choices[name] = (
                min(WAYS, key=lambda way: _seconds(WAYS[way], layer, x, g, folding)) if x.is_cuda else usual
            )
        return WAYS[self.choices[name]](layer, x, g, folding)


def _seconds(way: Callable, layer: nn.Conv2d, x: Tensor, g: Tensor, folding: Folding) -> float:
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        way(layer, x, g, folding)
        torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - start)
    return best


def grouped(layer: nn.Conv2d, x: Tensor, g: Tensor, folding: Folding) -> tuple[Tensor, Tensor]:
    """Gradients of weight (B, O, C, kh, kw) and bias (B, O): a grouped convolution, a group per image."""
    images, copies, fp32 = folding.images, folding.copies, x.dtype == torch.float32
    out_channels, in_channels, height, width = layer.weight.shape
    # Copies are the batch and images are groups: each group's weight gradient is summed over the copies.
    x = x.reshape(copies, images * in_channels, *x.shape[2:])
    g = g.reshape(copies, images * out_channels, *g.shape[2:])
    shape_only = x.new_empty(
        images * out_channels, in_channels, height, width
    )  # contiguous: an expanded one would be written out first
    _, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
        g,
        x,
        shape_only,
        [images * out_channels],
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0, 0],
        images,
        [False, True, fp32],
    )
    # The kernel's sum would be in bf16 there.
    bias_gradient = (
        bias_gradient.view(images, out_channels)
        if fp32
        else sum_bias(g.view(copies * images, out_channels, -1), folding)
    )
    return weight_gradient.view(images, out_channels, in_channels, height, width), bias_gradient


def unfolded(layer: nn.Conv2d, x: Tensor, g: Tensor, folding: Folding) -> tuple[Tensor, Tensor]:
    """The same as `grouped`, by products of patches and output gradients, in chunks that bound the memory."""
    images, copies, bias_gradient = folding.images, folding.copies, sum_bias(g, folding)
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1):
        x, g = (
            x.reshape(copies, images, x.shape[1], -1).transpose(2, 3),
            g.reshape(copies, images, g.shape[1], -1),
        )
        total = torch.bmm(g[0], x[0])
        for copy in range(1, copies):  # one by one: an einsum over the copies would first lay them out anew
            total.baddbmm_(g[copy], x[copy])
        return total.view(images, *layer.weight.shape), bias_gradient
    assert not isinstance(layer.padding, str)  # refused by the constructor
    (top, left), (down, right) = layer.padding, layer.stride
    padded = F.pad(x, (left, left, top, top))
    # Windows as a view, written out by one kernel: F.unfold launches one kernel per image on a GPU, and was
    # ten times slower.
    (image, channel, row, column), (taller, wider) = padded.stride(), layer.dilation
    g = g.view(copies, images, *g.shape[1:])
    windows = padded.as_strided(
        (images, x.shape[1], *layer.kernel_size, copies, *g.shape[3:]),
        (image, channel, taller * row, wider * column, images * image, down * row, right * column),
    )
    # Patches are many times larger than the image: so many images at once as fit the limit.
    chunk, parts = max(1, PATCHES // windows[0].numel()), []
    for start in range(0, images, chunk):
        part, outputs = (
            windows[start : start + chunk],
            g[:, start : start + chunk].permute(1, 2, 0, 3, 4).flatten(2),
        )
        patches = part.reshape(len(part), -1, outputs.shape[2])
        parts.append(torch.bmm(outputs, patches.mT))
    return torch.cat(parts).view(images, *layer.weight.shape), bias_gradient


WAYS: dict[str, Callable[[nn.Conv2d, Tensor, Tensor, Folding], tuple[Tensor, Tensor]]] = {
    "grouped": grouped,
    "unfolded": unfolded,
}


def sum_bias(g: Tensor, folding: Folding) -> Tensor:
    """Gradient of a bias on dimension 1: (K B, O, ...) -> (B, O)."""
    return g.reshape(folding.copies, folding.images, g.shape[1], -1).sum((0, 3), dtype=torch.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
