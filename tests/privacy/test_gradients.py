"""Per-image gradients.

The folded rules against vmap(grad), over layers, shapes, copies and both ways of a convolution.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privimage.data.sensitive import SensitiveSet
from privimage.distributed.world import World
from privimage.models import edm
from privimage.models.biggan import Discriminator
from privimage.models.ddpmpp import DDPMpp
from privimage.privacy.convolutions import WAYS
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import FoldedGradients, VmapGradients, clip_and_sum_, trained_parameters
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD


def squares(module: nn.Module, inputs: Tensor) -> Tensor:
    """A loss an image that is not linear in the output."""
    return module(inputs).flatten(1).square().sum(1)


def both(
    module: nn.Module, losses, *tensors: Tensor, way: str | None = None
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, folded gradient, oracle's gradient) of every parameter."""
    folded, oracle = copy.deepcopy(module), copy.deepcopy(module)
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    FoldedGradients(folded, dict.fromkeys(names, way) if way else None).backward(losses, *tensors)
    VmapGradients(oracle).backward(losses, *tensors)
    pairs = zip(folded.named_parameters(), oracle.named_parameters(), strict=True)
    return [(name, p.grad_sample, q.grad_sample) for (name, p), (_, q) in pairs]


def agree(found: list[tuple[str, Tensor, Tensor]], tolerance: float = 1e-4) -> None:
    largest = max(
        right.abs().max().item() for _, _, right in found
    )  # a gradient that cancels out has the rounding of its terms
    for name, mine, right in found:
        assert mine.shape == right.shape, name
        assert (mine - right).abs().max() <= tolerance * max(right.abs().max().item(), 1e-2 * largest), name


layers = st.one_of(
    st.builds(
        lambda inputs, outputs, kernel, stride, bias: nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, bias=bias
        ),
        st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 5]), st.integers(1, 2), st.booleans(),
    ),
    st.builds(lambda groups, wide: nn.GroupNorm(groups, groups * wide), st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers, st.integers(1, 4), st.integers(1, 4), st.integers(2, 7), st.sampled_from(sorted(WAYS)))
def test_image_layers_agree_with_the_oracle(
    layer: nn.Module, images: int, copies: int, side: int, way: str
) -> None:
    torch.manual_seed(0)
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.num_channels
    for p in layer.parameters():
        p.data.normal_()
    agree(both(nn.Sequential(layer), squares, torch.randn(images, copies, channels, side, side), way=way))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans()
)
def test_linear_agrees_with_the_oracle(
    images: int, copies: int, inputs: int, outputs: int, bias: bool, tokens: bool
) -> None:
    torch.manual_seed(0)
    shape = (images, copies, 3, inputs) if tokens else (images, copies, inputs)
    agree(both(nn.Sequential(nn.Linear(inputs, outputs, bias=bias), nn.Tanh()), squares, torch.randn(shape)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_embedding_agrees_with_the_oracle(images: int, copies: int, rows: int) -> None:
    torch.manual_seed(0)
    agree(
        both(
            nn.Sequential(nn.Embedding(rows, 3), nn.Tanh()), squares, torch.randint(0, rows, (images, copies))
        )
    )


def perturbed(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_whole_diffusion_network_agrees_with_the_oracle(way: str) -> None:
    denoiser = perturbed(edm.Denoiser(DDPMpp(8, 1, 3, width=8, multipliers=(1, 2), attention=(4,))))
    images = torch.randn(3, 1, 1, 8, 8).expand(-1, 2, -1, -1, -1)
    labels = torch.tensor([0, 3, 1])[:, None].expand(-1, 2)
    agree(
        both(denoiser, edm.loss, images, labels, torch.rand(3, 2) + 0.1, torch.randn(3, 2, 1, 8, 8), way=way)
    )


@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_whole_discriminator_agrees_with_the_oracle(way: str) -> None:
    network = perturbed(Discriminator(8, 1, 3, width=8))
    agree(
        both(
            network,
            lambda d, x, y: d(x, y).flatten().exp(),
            torch.randn(3, 2, 1, 8, 8),
            torch.randint(0, 3, (3, 2)),
            way=way,
        )
    )


@pytest.mark.parametrize("kind", [FoldedGradients, VmapGradients])
def test_a_batch_that_is_filled_up_gives_the_gradients_of_its_own_images(kind: type) -> None:
    module = perturbed(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(48, 2)
        )
    )
    inputs, seen = torch.randn(3, 2, 2, 4, 4), []

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        seen.append(len(x))
        return squares(m, x)

    filled, oracle = copy.deepcopy(module), VmapGradients(module)
    assert torch.allclose(
        kind(filled, filled_to=7).backward(losses, inputs), oracle.backward(squares, inputs)
    )
    agree(
        [
            (name, p.grad_sample, q.grad_sample)
            for (name, p), q in zip(filled.named_parameters(), module.parameters(), strict=True)
        ]
    )
    assert seen == ([7 * 2] if kind is FoldedGradients else [2])


def test_group_normalisation_in_pieces_agrees_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes 65,535 groups in one call: what 2048 noised copies have here."""
    monkeypatch.setattr("privimage.privacy.folded.GROUPS", 7)
    torch.manual_seed(0)
    agree(
        both(
            perturbed(nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.SiLU())),
            squares,
            torch.randn(5, 3, 2, 4, 4),
        )
    )


def test_the_oracle_is_a_loop_over_single_images() -> None:
    """vmap(grad) itself against autograd on one image at a time, its copies averaged."""
    module = perturbed(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(48, 2)
        )
    )
    inputs = torch.randn(3, 2, 2, 4, 4)
    oracle = copy.deepcopy(module)
    VmapGradients(oracle).backward(squares, inputs)
    for index in range(3):
        module.zero_grad()
        squares(module, inputs[index]).mean().backward()
        for p, q in zip(module.parameters(), oracle.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad_sample[index], rtol=1e-4, atol=1e-5)


def test_no_ordinary_gradient_is_computed_beside() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    FoldedGradients(module).backward(squares, torch.randn(2, 1, 1, 4, 4))
    assert all(p.grad is None and p.grad_sample is not None for p in module.parameters())


def test_a_layer_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="1: no rule for per-image gradients of BatchNorm2d"):
        FoldedGradients(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="0: per-image gradients of a convolution need groups=1"):
        FoldedGradients(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)))


def test_the_module_is_itself_again_afterwards() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert FoldedGradients(module).detach() is module
    module(torch.randn(1, 1, 4, 4)).sum().backward()
    assert module[0].weight.grad is not None


def test_bf16_gradients_are_close_and_sums_are_fp32() -> None:
    module = perturbed(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)
        )
    )
    inputs = torch.randn(4, 2, 1, 4, 4)
    plain, half = copy.deepcopy(module), copy.deepcopy(module)
    FoldedGradients(plain).backward(squares, inputs)

    def in_bf16(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().sum(1)

    FoldedGradients(half).backward(in_bf16, inputs)
    for p, q in zip(plain.parameters(), half.parameters(), strict=True):
        assert (p.grad_sample - q.grad_sample.float()).norm() < 0.05 * p.grad_sample.norm()


def test_the_whole_diffusion_network_in_bf16_is_near_fp32_with_activations_in_bf16_between_the_layers() -> (
    None
):
    torch.manual_seed(0)
    denoiser = perturbed(edm.Denoiser(DDPMpp(8, 1, 3, width=16, multipliers=(1, 2), attention=(4,))))
    inputs = (
        torch.randn(3, 2, 1, 8, 8),
        torch.tensor([[0, 0], [3, 3], [1, 1]]),
        torch.rand(3, 2) + 0.1,
        torch.randn(3, 2, 1, 8, 8),
    )
    half, seen = copy.deepcopy(denoiser), set()

    def in_bf16(m: nn.Module, *tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return edm.loss(m, *tensors)

    gradients = FoldedGradients(half)
    for layer in half.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    gradients.backward(in_bf16, *inputs)
    VmapGradients(denoiser).backward(edm.loss, *inputs)
    assert seen == {torch.bfloat16}  # as autocast has it on a CPU: no conversions to fp32 and back
    mine = torch.cat([p.grad_sample.float().flatten(1) for p in half.parameters()], dim=1)
    right = torch.cat([p.grad_sample.flatten(1) for p in denoiser.parameters()], dim=1)
    assert ((mine - right).norm(dim=1) < 0.03 * right.norm(dim=1)).all()


def test_norms_and_sums_of_bf16_gradients_are_those_of_their_values_in_float64() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(300, 40)), nn.Parameter(torch.zeros(7))]
    for p in parameters:
        p.grad_sample = torch.randn(64, *p.shape).to(torch.bfloat16 if p.dim() > 1 else torch.float32)
    total = torch.zeros(12_007, dtype=torch.float64)
    norms, finite = clip_and_sum_(total, parameters, 1.0)
    flat = torch.cat([p.grad_sample.double().flatten(1) for p in parameters], dim=1)
    assert finite.all() and torch.allclose(norms.double(), flat.norm(dim=1), rtol=1e-6)
    assert (total - (flat / flat.norm(dim=1, keepdim=True)).sum(0)).norm() < 3e-5 * total.norm()


class Squares:
    """The squared output of a network for each image."""

    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor]:
        return (images.float()[:, None],)

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        return module(tensors[0].flatten(1)).square().sum(1)


def private_steps(module: nn.Module, optimizer: torch.optim.Optimizer) -> PrivateSteps:
    images = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8).numpy()
    plan = DPSGD(
        count=20, logical_batch_size=10, steps=2, noise_multiplier=1.0, max_grad_norm=0.5, noise_copies=1
    )
    return PrivateSteps(
        plan,
        FoldedGradients(module),
        Squares(),
        optimizer,
        SensitiveSet(images, np.zeros(20, np.int64), torch.device("cpu"), "device"),
        World(0, 0, 1, 1, torch.device("cpu")),
        Randomness(insecure_fixed(5), "aes-ctr", b"test"),
        physical=4,
        charge=lambda name: True,
        state=lambda: module.state_dict().values(),
    )


def test_frozen_parameters_have_no_part_in_private_steps() -> None:
    """Noise, flat sum and optimizer are of the trained ones, which the steps move, and of no others."""
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    steps = private_steps(module, torch.optim.SGD(trained_parameters(module), lr=1.0))
    assert steps.optimizer.size == steps.optimizer.gradient_sum.numel() == 3 * 2 + 2
    assert steps.optimizer.noise is not None and steps.optimizer.noise.size == 3 * 2 + 2
    assert len(list(steps)) == 2
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("0."), name


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    with pytest.raises(ValueError, match="other parameters"):
        private_steps(module, torch.optim.SGD(module.parameters(), lr=1.0))
