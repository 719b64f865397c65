"""Per-image gradients, averaged over the noise copies of each image.

Interchangeable implementations fill `p.grad_sample` of shape (B, *p.shape), which Opacus' optimizer reads:
`FoldedGradients`, fast, with one rule per layer type; `RecordedGradients`, the same as a CUDA graph; and
`VmapGradients`, torch.func's vmap(grad), the reference that they are tested with. Opacus is not imported
here: `plan` times these gradients and has no other use for it, and it takes a fifth of all imports.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privimage.distributed.blocks import filled, without_chance
from privimage.privacy.convolutions import ConvolutionBackends, Folding
from privimage.privacy.folded import RULES

Losses = Callable[..., Tensor]  # losses(module, *tensors of leading size n) -> (n,)
AT_ONCE = 32  # per-image gradients whose sum is float32
# Longer gradients count as not finite. Squares of float32 overflow beyond 1.8e19, but a piece of one entry
# has its norm without a square: C over a norm near 1e38 would be a denormal number, with few digits and a sum
# beyond C.
LONGEST = 1e18
PASSES = 3  # before a graph is recorded
FEW = 4096  # numbers; smaller operations are all overhead


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that private steps train, in order: those that require gradients.

    Clipping, the flat sum, the size of the noise and the optimizer are all of these and of no others.
    """
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class PerImageGradients(ABC):
    """Gives the parameters of `module` a `grad_sample`: per image, the gradient of its mean loss over noise
    copies.
    """

    def __init__(self, module: nn.Module, backends: dict[str, str] | None = None, filled_to: int = 0):
        """Wrap `module`.

        Args:
            backends: the backend of each convolution, as `choices` of an earlier run, so that a resumed run
                repeats its predecessor to the bit.
            filled_to: smaller batches are padded to this size with copies of the last image, whose results
                are dropped. Libraries choose kernels, and so the rounding, by the number of images, and one
                image more must not change the contribution of all others. See `batching.filled_size`.
        """
        self.module = module
        self.clear()
        self.convolutions, self.filled_to = ConvolutionBackends(dict(backends or {})), filled_to

    @property
    def choices(self) -> dict[str, str]:
        """The backend of each convolution, by name of the layer."""
        return dict(self.convolutions.choices)

    def backward(self, losses: Losses, *tensors: Tensor) -> Tensor:
        """Fill `p.grad_sample` for a batch.

        Each tensor has shape (B, K, ...): K noise copies of B images. `losses(module, *flat)` gets them with
        one leading size and returns one loss for each. Returns the losses averaged over the copies, (B,),
        detached.
        """
        images = len(tensors[0])
        # A small batch is filled up before anything is computed and cut afterwards.
        short = images < self.filled_to
        with without_chance():
            per_image = self._fill(
                losses, *(filled(t, self.filled_to) for t in tensors) if short else tensors
            )
        if short:
            for p in trained_parameters(self.module):
                p.grad_sample = p.grad_sample[:images]  # type: ignore[attr-defined]
        return per_image[:images]

    @abstractmethod
    def _fill(self, losses: Losses, *tensors: Tensor) -> Tensor:
        """As `backward`, for a batch as it is."""

    def clear(self) -> None:
        """Forget the gradients: `p.grad_sample` is None."""
        for p in trained_parameters(self.module):
            p.grad_sample = None  # type: ignore[attr-defined]

    def detach(self) -> nn.Module:
        """Leave the module as it was, without a trace of per-image gradients, and return it."""
        for p in trained_parameters(self.module):
            del p.grad_sample  # type: ignore[attr-defined]
        return self.module


class FoldedGradients(PerImageGradients):
    """Per-image weight gradients in place of the ordinary ones, summed over the copies by a grouped
    convolution.
    """

    def __init__(self, module: nn.Module, backends: dict[str, str] | None = None, filled_to: int = 0):
        """Raises ValueError for a layer with parameters that has no rule."""
        super().__init__(module, backends, filled_to)
        self.folding = Folding()
        for name, layer in module.named_modules():
            if not any(p.requires_grad for p in layer.parameters(recurse=False)):
                continue
            if type(layer) not in RULES:
                raise ValueError(f"{name}: no rule for per-image gradients of {type(layer).__name__}")
            layer.forward = RULES[type(layer)](name, layer, self.folding, self.convolutions)

    def _fill(self, losses: Losses, *tensors: Tensor) -> Tensor:
        # (B, K, ...) becomes one batch of K * B; the rules unfold it with the same two numbers.
        images, copies = tensors[0].shape[:2]
        flat = [
            t.transpose(0, 1).reshape(copies * images, *t.shape[2:]) for t in tensors
        ]  # copies first: folding is then a view
        self.folding.images, self.folding.copies = images, copies
        per_image = losses(self.module, *flat).view(copies, images).mean(0)
        # The sum, not the mean: the gradient of one image must not depend on how many others there are.
        per_image.sum().backward()
        return per_image.detach()

    def detach(self) -> nn.Module:
        for layer in self.module.modules():
            layer.__dict__.pop("forward", None)
        return super().detach()


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph of `_fill`, and the memory that it reads and writes at each replay."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    samples: list[Tensor]  # `grad_sample` of each parameter
    per_image: Tensor


class RecordedGradients(FoldedGradients):
    """The same kernels, recorded as a CUDA graph for each shape of a batch and replayed by one launch.

    A rank with few images spends a step on launching a thousand small kernels. Recorded are forward and
    backward pass; the caller has used the gradients of a batch before it gives the next one. On a CPU there
    is nothing to record.
    """

    def __init__(self, module: nn.Module, backends: dict[str, str] | None = None, filled_to: int = 0):
        """See `FoldedGradients`."""
        super().__init__(module, backends, filled_to)
        self.recordings: dict[tuple, _Recording] = {}

    def _fill(self, losses: Losses, *tensors: Tensor) -> Tensor:
        if not tensors[0].is_cuda:
            return super()._fill(losses, *tensors)
        key = (losses, *((t.shape, t.dtype) for t in tensors))
        if key not in self.recordings:
            self.recordings[key] = self._record(losses, tensors)
        recording = self.recordings[key]
        for memory, tensor in zip(recording.inputs, tensors, strict=True):
            memory.copy_(tensor)
        recording.graph.replay()
        for p, sample in zip(trained_parameters(self.module), recording.samples, strict=True):
            p.grad_sample = sample  # type: ignore[attr-defined]
        return recording.per_image.clone()

    def _record(self, losses: Losses, tensors: tuple[Tensor, ...]) -> _Recording:
        inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        # Libraries choose kernels and ask for memory in the first passes, which must not be recorded.
        # torch.cuda.graph wants them to run beside the current stream.
        beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(PASSES):
                super()._fill(losses, *inputs)
                self.clear()
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            per_image = super()._fill(losses, *inputs)
        samples = [p.grad_sample for p in trained_parameters(self.module)]  # type: ignore[attr-defined]
        return _Recording(graph, inputs, samples, per_image)


class VmapGradients(PerImageGradients):
    """vmap(grad) over single images: slow, and correct by construction."""

    def _fill(self, losses: Losses, *tensors: Tensor) -> Tensor:
        # torch.func differentiates a function of the parameters, so the module is called with them as
        # arguments.
        parameters = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

        def one_image(parameters: dict[str, Tensor], *copies: Tensor) -> tuple[Tensor, Tensor]:
            def bound(*args, **kwargs):
                return torch.func.functional_call(self.module, parameters, args, kwargs)

            loss = losses(bound, *copies).mean()
            return loss, loss

        gradients, per_image = torch.func.vmap(
            torch.func.grad(one_image, has_aux=True), in_dims=(None, *[0] * len(tensors))
        )(parameters, *tensors)
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                p.grad_sample = gradients[name]  # type: ignore[attr-defined]
        return per_image.detach()


GRADIENTS: dict[str, type[PerImageGradients]] = {
    "folded": FoldedGradients,
    "recorded": RecordedGradients,
    "vmap": VmapGradients,
}


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in full float32, whatever the process has set for others.

    Where they may be TF32 or bf16, their rounding alone would carry an image past the bound.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@exact_products()
def clip_and_sum_(
    gradient_sum: Tensor, parameters: list[nn.Parameter], max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Add the clipped per-image gradients of a batch to the flat float64 `gradient_sum` (P,), in place.

    Each image's gradient over all parameters is scaled to an L2 norm of at most `max_grad_norm` (at least
    1e-8). An image whose gradient is not finite, or longer than `LONGEST`, contributes exactly zero. Norms
    are summed in float64, gradients in float32 within pieces of `AT_ONCE` images and in float64 across
    pieces. Returns the norms (B,) before clipping, and a mask (B,) of the finite images; both are private.
    """
    # Small parameters are concatenated: a kernel for each would be all overhead.
    samples = [p.grad_sample.flatten(1) for p in parameters]  # type: ignore[attr-defined]
    small = [s.float() for s in samples if s.shape[1] < FEW]
    merged = [s for s in samples if s.shape[1] >= FEW] + ([torch.cat(small, dim=1)] if small else [])
    # Norms over all parameters together, added up in float64.
    norms = (
        torch.cat([piece for s in merged for piece in _norms_of_pieces(s)], dim=1)
        .double()
        .norm(dim=1)
        .float()
    )
    finite = norms <= LONGEST  # false for NaN
    # The rounding of these norms and of the sums must not carry an image past the bound.
    # Slightly less than C, by more than norms and sums can be wrong.
    factors = torch.where(finite, (max_grad_norm * (1 - 1e-5) / norms).clamp(max=1.0), 0.0)
    if not bool(finite.all()):
        merged = [torch.where(finite[:, None], s, 0.0) for s in merged]
    # Scaling and summing is one product per piece; it never materialises the clipped gradients.
    sums = [_sums_of_pieces(factors, s.float()) for s in merged]
    few = iter(sums[-1].split([s.shape[1] for s in small], dim=1) if small else ())
    many = iter(sums)
    # In float32 the rounding of thousands of alike gradients would exceed the margin.
    gradient_sum += torch.cat([next(few if s.shape[1] < FEW else many) for s in samples], dim=1).sum(
        0, dtype=torch.float64
    )
    return norms, finite


def _norms_of_pieces(sample: Tensor, size: int = 1024) -> Iterator[Tensor]:
    """L2 norms (B, n) of pieces of the rows of a sample.

    Over millions of entries a CPU's float32 sum is wrong by 1e-4 and more.
    """
    whole = sample.shape[1] // size * size
    if whole:
        yield torch.linalg.vector_norm(sample[:, :whole].unflatten(1, (-1, size)), dim=2, dtype=torch.float32)
    if whole < sample.shape[1]:
        yield torch.linalg.vector_norm(sample[:, whole:], dim=1, keepdim=True, dtype=torch.float32)


def _sums_of_pieces(factors: Tensor, gradients: Tensor) -> Tensor:
    """Sums (n, P) of pieces of `AT_ONCE` float32 rows (B, P), each row times its factor (B,)."""
    whole = len(gradients) // AT_ONCE * AT_ONCE
    if not whole:
        return gradients.T.mv(factors)[None]
    pieces = torch.bmm(
        factors[:whole].view(-1, 1, AT_ONCE), gradients[:whole].unflatten(0, (-1, AT_ONCE))
    ).squeeze(1)
    if whole == len(gradients):
        return pieces
    return torch.cat([pieces, gradients[whole:].T.mv(factors[whole:])[None]])
