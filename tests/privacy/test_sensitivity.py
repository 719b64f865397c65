"""Adding or removing one image moves the clipped sum by at most C, whatever the image, the network and the
batches.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privimage.distributed.world import World
from privimage.privacy.gradients import FoldedGradients, clip_and_sum_
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.optimizer import PrivateOptimizer

HOSTILE = (0.0, 1.0, -1e30, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))


def network(kind: int) -> nn.Module:
    torch.manual_seed(kind)
    return [
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.SiLU(), nn.Flatten(), nn.Linear(48, 2)
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 1)),
        nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(2, 1, bias=False)),
    ][kind]


def squares(module: nn.Module, inputs: Tensor) -> Tensor:
    return module(inputs).flatten(1).square().sum(1)


def clipped_sum(module: nn.Module, images: Tensor, split: int, bound: float) -> Tensor:
    """The sum over (B, K, 1, 4, 4) images, taken in physical batches of `split`, as float64."""
    module = copy.deepcopy(module)
    gradients, parameters = FoldedGradients(module), list(module.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for part in images.split(split):
        gradients.backward(squares, part)
        clip_and_sum_(total, parameters, bound)
    return total


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(0, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4),
    st.sampled_from([1e-3, 0.1, 1.0, 50.0]), st.lists(st.sampled_from(HOSTILE), min_size=0, max_size=3),
    st.sampled_from([1e-2, 1.0, 1e3]),
)  # fmt: skip
def test_one_image_more_moves_the_sum_by_at_most_c(
    kind: int,
    copies: int,
    count: int,
    split: int,
    place: int,
    bound: float,
    hostile: list[float],
    scale: float,
) -> None:
    torch.manual_seed(count)
    images = scale * torch.randn(count + 1, copies, 1, 4, 4)
    place = place % (count + 1)
    for position, value in enumerate(hostile):
        images[place].view(-1)[position] = value
    if len(hostile) == 3:
        images[place] = hostile[0]
    module = network(kind)
    with_it = clipped_sum(module, images, split, bound)
    without = clipped_sum(module, torch.cat([images[:place], images[place + 1 :]]), split, bound)
    assert torch.isfinite(with_it).all()
    assert (with_it - without).norm() <= bound


def test_a_non_finite_image_contributes_exactly_nothing() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 2, 1, 4, 4)
    without = clipped_sum(network(2), images[[0, 1, 3]], 8, 0.5)
    for value in (float("nan"), float("inf"), 1e30):
        images[2, 1, 0, 0, 0] = value
        assert torch.allclose(clipped_sum(network(2), images, 8, 0.5), without, rtol=0, atol=1e-7)


def test_images_are_averaged_over_their_copies_before_clipping() -> None:
    """K copies with opposite gradients cancel: clipping each copy on its own would leave up to C."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))

    def linear(m: nn.Module, inputs: Tensor) -> Tensor:
        return m(inputs).flatten()

    image = torch.randn(1, 1, 1, 4, 4)
    FoldedGradients(module).backward(linear, torch.cat([image, -image], dim=1))
    total = torch.zeros(16, dtype=torch.float64)
    clip_and_sum_(total, list(module.parameters()), 1.0)
    assert total.norm() < 1e-6


def test_small_gradients_are_left_alone_and_large_ones_have_norm_c() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))

    def linear(m: nn.Module, inputs: Tensor) -> Tensor:
        return m(inputs).flatten()

    for scale, expected in ((1e-3, None), (1e3, 1.0)):
        image = scale * torch.ones(1, 1, 1, 4, 4)
        FoldedGradients(module).backward(linear, image)
        total = torch.zeros(16, dtype=torch.float64)
        clip_and_sum_(total, list(module.parameters()), 1.0)
        assert torch.isclose(total.norm(), torch.tensor(expected or 4e-3, dtype=torch.float64), rtol=2e-5)
        module = copy.deepcopy(nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False)))


@pytest.mark.parametrize(
    "fill", [torch.randn, lambda *shape: torch.full(shape, 0.1)], ids=["normal", "constant"]
)
def test_a_layer_of_millions_of_weights_does_not_carry_an_image_past_the_bound(fill: Callable) -> None:
    """The largest convolution of the 88.6M network.

    Summed up in one float32 its squares lose more than the margin of the bound allows.
    """
    torch.manual_seed(0)
    layer = nn.Parameter(torch.zeros(384, 768, 3, 3))
    layer.grad_sample = fill(1, *layer.shape)
    total = torch.zeros(layer.numel(), dtype=torch.float64)
    clip_and_sum_(total, [layer], 1.0)
    assert 1 - 3e-5 <= total.norm() <= 1.0


@pytest.fixture
def products_in_tf32() -> Iterator[None]:
    """What a user may have allowed for matrix products, for one test."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("physical", [32, 5000])
def test_one_image_more_among_thousands_alike_moves_the_sum_by_at_most_c(
    device: torch.device, physical: int, products_in_tf32: None
) -> None:
    """The rounding of a sum in float32 grows with the sum: 2e-4 of C for a logical batch like this one.

    In TF32, which a user may have allowed for matrix products, it would be more; clipping does without, and
    leaves the user's choice as it was.
    """
    world, plan = (
        World(0, 0, 1, 1, device),
        DPSGD(
            count=50_000,
            logical_batch_size=16_384,
            steps=1,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            noise_copies=1,
        ),
    )
    parameter, sums = nn.Parameter(torch.zeros(500, device=device)), []
    for images in (16_384, 16_383):
        optimizer = PrivateOptimizer(torch.optim.SGD([parameter]), plan, world, None, lambda: False)
        for count in [physical] * (images // physical) + [images % physical]:
            parameter.grad_sample = torch.full((count, 500), 0.3, device=device)
            optimizer.clip_and_accumulate()
        sums.append(optimizer.gradient_sum)
    assert 1 - 3e-5 <= (sums[0] - sums[1]).norm() <= 1.0
    assert torch.get_float32_matmul_precision() == "medium"


EXTREME = (
    0.0,
    1e-45,
    1e-40,
    -1e-30,
    1e-22,
    1e-19,
    1.0,
    1e17,
    9.9e17,
    1.1e18,
    1e19,
    -1e30,
    1e37,
    1e38,
    3.4e38,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.floats(-8, 9), st.lists(st.integers(1, 2100), min_size=1, max_size=4), st.sampled_from(EXTREME),
    st.sampled_from(EXTREME),
    st.sampled_from(EXTREME), st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_no_gradient_contributes_more_than_c(
    exponent: float, sizes: list[int], first: float, rest: float, last: float, others: int, alone: bool
) -> None:
    """Also where a norm near the largest float32 makes the factor a denormal number, and where squares
    underflow.
    """
    bound, sums = 10.0**exponent, []
    if alone:  # the last entry is a piece of its own, and all there is
        sizes, first, rest = [*sizes, 1024 + -sum(sizes) % 1024], 0.0, 0.0
    for count in (others, others + 1):
        parameters = [nn.Parameter(torch.zeros(size)) for size in [*sizes, 5000, 1]]
        for p in parameters:
            p.grad_sample = torch.full((count, len(p)), rest)
            p.grad_sample[:, 0] = first
        parameters[-1].grad_sample[:] = last
        total = torch.zeros(sum(len(p) for p in parameters), dtype=torch.float64)
        if count:
            clip_and_sum_(total, parameters, bound)
        sums.append(total)
    assert torch.isfinite(sums[1]).all()
    assert (sums[1] - sums[0]).norm() <= bound


@pytest.mark.parametrize("bound", [1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("value", [1.0, 1e17, 1e19, 1e30, 1e37, 1e38, 3.4e38])
def test_a_single_entry_is_clipped_or_left_out(bound: float, value: float) -> None:
    """A piece of one entry has its norm without a square, which overflows nowhere."""
    parameter, total = nn.Parameter(torch.zeros(1)), torch.zeros(1, dtype=torch.float64)
    parameter.grad_sample = torch.full((1, 1), value)
    _, finite = clip_and_sum_(total, [parameter], bound)
    assert bool(finite) == (value < 1e18)
    assert (1 - 2e-5) * bound <= total.norm() <= bound if finite else total.norm() == 0
