"""Per-image gradients, averaged over the noise copies of each image, behind Opacus' gradient-module interface.

Two interchangeable ways fill `p.grad_sample` of shape (B, *p.shape): `FoldedGradients`, fast, one rule a layer type, and
`VmapGradients`, torch.func's vmap(grad), the plain oracle that the rules are tested against.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn

from privimage.privacy.folded import RULES, ConvolutionBackends, Folding

Losses = Callable[..., Tensor]  # losses(module, *tensors of leading size n) -> (n,)
AT_ONCE = 32  # per-image gradients whose sum is float32


class PerImageGradients(AbstractGradSampleModule):
    """A module whose parameters get `grad_sample`: for each image the gradient of its loss averaged over its noise copies."""

    def __init__(self, module: nn.Module, backends: dict[str, str] | None = None):
        """`backends` fixes the way each convolution takes (as `choices` of an earlier run gave it), so that a resumed run
        repeats its predecessor to the bit.
        """
        super().__init__(module)
        self.convolutions = ConvolutionBackends(dict(backends or {}))

    @property
    def choices(self) -> dict[str, str]:
        """The way that each convolution takes, by name of the layer."""
        return dict(self.convolutions.choices)

    @abstractmethod
    def backward(self, losses: Losses, *tensors: Tensor) -> Tensor:
        """Fill `p.grad_sample` for a batch.

        Each tensor has shape (B, K, ...): K noise copies of B images. `losses(module, *flat)` gets them with one leading
        size and returns one loss for each. Returns the losses averaged over the copies, (B,), detached.
        """

    def remove_hooks(self) -> None:
        """Nothing is left on the wrapped module."""


class FoldedGradients(PerImageGradients):
    """Per-image weight gradients in place of the ordinary ones, summed over the copies by a grouped convolution."""

    def __init__(self, module: nn.Module, backends: dict[str, str] | None = None):
        """Raises ValueError for a layer with parameters that has no rule."""
        super().__init__(module, backends)
        self.folding = Folding()
        for name, layer in module.named_modules():
            if not any(p.requires_grad for p in layer.parameters(recurse=False)):
                continue
            if type(layer) not in RULES:
                raise ValueError(f"{name}: no rule for per-image gradients of {type(layer).__name__}")
            layer.forward = RULES[type(layer)](name, layer, self.folding, self.convolutions)

    def backward(self, losses: Losses, *tensors: Tensor) -> Tensor:
        images, copies = tensors[0].shape[:2]
        flat = [t.transpose(0, 1).reshape(copies * images, *t.shape[2:]) for t in tensors]  # copies first: folding is then a view
        self.folding.images, self.folding.copies = images, copies
        per_image = losses(self._module, *flat).view(copies, images).mean(0)
        per_image.sum().backward()
        return per_image.detach()

    def remove_hooks(self) -> None:
        for layer in self._module.modules():
            layer.__dict__.pop("forward", None)


class VmapGradients(PerImageGradients):
    """vmap(grad) over single images: slow, and right by construction."""

    def backward(self, losses: Losses, *tensors: Tensor) -> Tensor:
        parameters = {name: p.detach() for name, p in self._module.named_parameters() if p.requires_grad}

        def one_image(parameters: dict[str, Tensor], *copies: Tensor) -> tuple[Tensor, Tensor]:
            def bound(*args, **kwargs):
                return torch.func.functional_call(self._module, parameters, args, kwargs)

            loss = losses(bound, *copies).mean()
            return loss, loss

        gradients, per_image = torch.func.vmap(torch.func.grad(one_image, has_aux=True), in_dims=(None, *[0] * len(tensors)))(parameters, *tensors)
        for name, p in self._module.named_parameters():
            if p.requires_grad:
                p.grad_sample = gradients[name]  # type: ignore[attr-defined]
        return per_image.detach()


GRADIENTS: dict[str, type[PerImageGradients]] = {"folded": FoldedGradients, "vmap": VmapGradients}


def _norms_of_pieces(sample: Tensor, size: int = 2048) -> Iterator[Tensor]:
    """L2 norms (B, n) of pieces of the rows of a float32 sample: over millions of entries a CPU's float32 sum is wrong by 1e-4 and more."""
    whole = sample.shape[1] // size * size
    if whole:
        yield torch.linalg.vector_norm(sample[:, :whole].unflatten(1, (-1, size)), dim=2)
    if whole < sample.shape[1]:
        yield torch.linalg.vector_norm(sample[:, whole:], dim=1, keepdim=True)


@torch.no_grad()
def clip_and_sum_(gradient_sum: Tensor, parameters: list[nn.Parameter], max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """Add the clipped per-image gradients of a batch to the flat float64 `gradient_sum` (P,), in place.

    Each image's gradient over all parameters is scaled to an L2 norm of at most `max_grad_norm`; an image with a gradient
    that is not finite, or whose norm overflows, contributes exactly zero. Norms are summed up in float64, so are gradients but
    for the `AT_ONCE` of a piece, which are summed in float32.
    Returns the norms (B,) before clipping and which images were finite (B,): both private.
    """
    samples = [p.grad_sample.flatten(1) for p in parameters]  # type: ignore[attr-defined]
    # One buffer for all that is not float32 yet: a copy of each sample would be as large as the samples themselves.
    largest = max((s.numel() for s in samples if s.dtype != torch.float32), default=0)
    buffer = torch.empty(largest, device=gradient_sum.device)

    def exact(sample: Tensor) -> Tensor:
        return sample if sample.dtype == torch.float32 else buffer[: sample.numel()].view_as(sample).copy_(sample)

    norms = torch.cat([part for s in samples for part in _norms_of_pieces(exact(s))], dim=1).double().norm(dim=1).float()
    finite = norms.isfinite()
    # The rounding of these norms and of the sums must not carry an image past the bound.
    factors = torch.where(finite, (max_grad_norm * (1 - 1e-5) / norms).clamp(max=1.0), 0.0)
    if not bool(finite.all()):
        samples = [torch.where(finite[:, None], s, 0.0) for s in samples]
    start = 0
    for sample in samples:
        part = gradient_sum[start : start + sample.shape[1]]
        # In float32, the rounding of thousands of alike gradients would move the sum by more than the margin of the bound.
        for some, gradients in zip(factors.split(AT_ONCE), exact(sample).split(AT_ONCE), strict=True):
            part += some @ gradients
        start += sample.shape[1]
    return norms, finite
