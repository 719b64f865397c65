"""Rules for per-image gradients of single layers, with the noise copies folded in.

The batch is laid out copies first, [K B, ...], so that [K, B C, H, W] is a view: a convolution with B groups
then has one weight gradient per image, already summed over its K copies. Each rule computes it *in place of*
the ordinary weight gradient, so that the backward pass does no work twice.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privimage.privacy.convolutions import ConvolutionBackends, Folding, compute_dtype

GROUPS = 65_535  # of group normalisation in one call: blocks in the second dimension of a CUDA grid


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer, name, folding, backends):
        dtype = compute_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.name, ctx.folding, ctx.backends = layer, name, folding, backends
        return F.conv2d(
            x, weight, None if bias is None else bias.to(dtype), layer.stride, layer.padding, layer.dilation
        )

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        layer, g, x_gradient = ctx.layer, g.contiguous(), None
        # The ordinary gradient of the input; that of the weight is left out by the mask at the end.
        if ctx.needs_input_grad[0]:
            x_gradient, _, _ = torch.ops.aten.convolution_backward(
                g,
                x,
                weight,
                None,
                layer.stride,
                layer.padding,
                layer.dilation,
                False,
                [0, 0],
                1,
                [True, False, False],
            )
        # The weight gradients of all images by the backend that was the fastest for this layer.
        layer.weight.grad_sample, bias_gradient = ctx.backends.gradients(ctx.name, layer, x, g, ctx.folding)
        if layer.bias is not None:
            layer.bias.grad_sample = bias_gradient
        return x_gradient, None, None, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer, folding):
        dtype = compute_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.folding = layer, folding
        return F.linear(x, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        layer, shape = ctx.layer, (ctx.folding.copies, ctx.folding.images, -1)
        # (K, B, positions, features): one product sums over the copies and the positions.
        inputs, outputs = x.view(*shape, x.shape[-1]), g.reshape(*shape, g.shape[-1])
        layer.weight.grad_sample = torch.einsum("kbpo,kbpi->boi", outputs, inputs)
        if layer.bias is not None:
            layer.bias.grad_sample = outputs.sum((0, 2), dtype=torch.float32)
        return g @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


def _normalised_in(x: Tensor) -> Tensor:
    # As autocast has it: CPU kernels read and write bf16 with statistics and parameters in fp32, those of
    # GPUs do not.
    return x if x.device.type == "cpu" else x.float()


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer, folding):
        x = _normalised_in(x).contiguous()
        pixels = x[0, 0].numel()
        out, mean, rstd = torch.native_group_norm(
            x, weight, bias, len(x), x.shape[1], pixels, layer.num_groups, layer.eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.folding = layer, folding
        return out

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, rstd = ctx.saved_tensors
        # Images as groups of channels of one image: the library's kernel then returns one gradient per image.
        layer, shape = ctx.layer, (ctx.folding.copies, ctx.folding.images, x.shape[1])
        g, most = g.to(x.dtype).contiguous(), GROUPS // layer.num_groups
        each = zip(g.split(most), x.split(most), mean.split(most), rstd.split(most), strict=True)
        parts = [_kept_apart(*some, weight, layer.num_groups) for some in each]
        x_gradient, scale, shift = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        layer.weight.grad_sample = scale.view(shape).sum(0)
        layer.bias.grad_sample = shift.view(shape).sum(0)
        return x_gradient, None, None, None, None


def _kept_apart(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input (N, C, ...), and of weight and bias (N, C) for each of N.

    As of one image with N C channels.
    """
    count, channels, pixels = len(x), x.shape[1], x[0, 0].numel()
    g, folded = g.view(1, count * channels, pixels), x.view(1, count * channels, pixels)
    x_gradient, scale, shift = torch.ops.aten.native_group_norm_backward(
        g,
        folded,
        mean.view(1, -1),
        rstd.view(1, -1),
        weight.repeat(count),
        1,
        count * channels,
        pixels,
        count * groups,
        [True] * 3,
    )
    return x_gradient.view_as(x), scale.view(count, channels), shift.view(count, channels)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, weight, layer, folding):
        ctx.save_for_backward(index)
        ctx.layer, ctx.folding = layer, folding
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        layer, shape = ctx.layer, (ctx.folding.copies, ctx.folding.images, -1)
        rows = F.one_hot(index, layer.num_embeddings).to(g.dtype)  # index_add_ on a GPU adds up in any order
        layer.weight.grad_sample = torch.einsum("kbn,kbd->bnd", rows.view(shape), g.reshape(shape))
        return None, None, None, None


def _conv2d(
    name: str, layer: nn.Conv2d, folding: Folding, backends: ConvolutionBackends
) -> Callable[[Tensor], Tensor]:
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(
            f"{name}: per-image gradients of a convolution need groups=1 and padding given in zeros"
        )
    return lambda x: _Conv2d.apply(x, layer.weight, layer.bias, layer, name, folding, backends)


def _linear(
    name: str, layer: nn.Linear, folding: Folding, backends: ConvolutionBackends
) -> Callable[[Tensor], Tensor]:
    return lambda x: _Linear.apply(x, layer.weight, layer.bias, layer, folding)


def _group_norm(
    name: str, layer: nn.GroupNorm, folding: Folding, backends: ConvolutionBackends
) -> Callable[[Tensor], Tensor]:
    return lambda x: _GroupNorm.apply(x, layer.weight, layer.bias, layer, folding)


def _embedding(
    name: str, layer: nn.Embedding, folding: Folding, backends: ConvolutionBackends
) -> Callable[[Tensor], Tensor]:
    return lambda index: _Embedding.apply(index, layer.weight, layer, folding)


RULES: dict[type, Callable] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}
