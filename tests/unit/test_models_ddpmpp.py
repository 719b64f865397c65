"""DDPM++ has the sizes of the published networks and means the same at every resolution."""

import math

import pytest
import torch

from privimage.config import Config, parse
from privimage.distributed.microbatch import activations
from privimage.errors import UserError
from privimage.models import build_diffusion, parameters
from privimage.models.ddpmpp import Attention, Block, DDPMpp, groups, sinusoidal

CIFAR10 = [
    (32, (1, 2, 2), 1_754_499), (32, (1, 2, 4), 3_954_563), (32, (1, 4, 4), 6_077_123),
    (96, (1, 2, 2), 15_708_291), (128, (1, 2, 2), 27_907_587), (192, (1, 2, 2, 2), 88_578_819),
]  # fmt: skip
CELEBA32 = [
    (32, (1, 2, 2), 1_804_451), (32, (1, 2, 4), 4_153_123), (32, (1, 4, 4), 6_275_683), (96, (1, 2, 2),
    16_153_059), (128, (1, 2, 2), 28_697_219),
]  # fmt: skip
CELEBA64 = [
    (32, (1, 1, 2, 2), 1_999_907), (32, (1, 1, 2, 4), 4_348_579), (32, (1, 1, 4, 4), 6_471_139), (96, (1,
    1, 2, 2), 17_900_643),
    (128, (1, 1, 2, 2), 31_801_475),
]  # fmt: skip
MNIST = [
    (32, (1, 2, 2), 1_753_345), (64, (1, 2, 2), 6_988_289), (128, (1, 2, 2), 27_902_977),
    (192, (1, 2, 2), 62_744_065), (256, (1, 2, 2), 111_511_553), (384, (1, 2, 2), 250_825_729),
]  # fmt: skip
SIZES = [
    *((32, 3, 10, (16,), *row) for row in CIFAR10),
    *((32, 3, 0, (8, 16), *row) for row in CELEBA32),
    *((64, 3, 0, (8, 16), *row) for row in CELEBA64),
    *((28, 1, 10, (7,), *row) for row in MNIST),
]


def settings(resolution: int, channels: int, **model: object) -> Config:
    kind = {"kind": "digits"}
    return parse(
        {
            "run": {"dir": "unused"},
            "data": {"resolution": resolution, "channels": channels, "public": kind, "sensitive": kind},
            "model": model,
        }
    )


@pytest.mark.parametrize(
    ("resolution", "channels", "n_classes", "attention", "width", "multipliers", "expected"), SIZES
)
def test_every_published_size_comes_out_to_the_parameter(
    resolution: int,
    channels: int,
    n_classes: int,
    attention: tuple[int, ...],
    width: int,
    multipliers: tuple[int, ...],
    expected: int,
) -> None:
    config = settings(resolution, channels, width=width, multipliers=multipliers, attention=attention)
    with torch.device("meta"):
        assert parameters(build_diffusion(config, n_classes)) == expected


def test_there_are_22_published_sizes() -> None:
    assert len(SIZES) == 22


@pytest.mark.parametrize(("resolution", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_output_has_the_shape_of_the_images(resolution: int, channels: int) -> None:
    network = DDPMpp(resolution, channels, 10, width=8)
    images = torch.randn(2, channels, resolution, resolution)
    assert network(images, torch.zeros(2), torch.tensor([3, 10])).shape == images.shape


def test_an_untrained_network_answers_almost_nothing() -> None:
    output = DDPMpp(8, 1, 10, width=8)(torch.randn(4, 1, 8, 8), torch.randn(4), torch.arange(4))
    assert 0 < output.abs().max() < 1e-3


def test_a_fresh_block_passes_its_input_on_divided_by_sqrt_2_and_again_by_its_attention() -> None:
    images, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert torch.allclose(Block(8, 8, 16)(images, embedding), images / math.sqrt(2), atol=1e-3)
    assert torch.allclose(Block(8, 8, 16, attention=True)(images, embedding), images / 2, atol=1e-3)


def test_attention_follows_every_block_down_the_first_in_the_middle_and_the_last_of_a_level_up() -> None:
    network = DDPMpp(32, 3, 0, width=8, multipliers=(1, 2, 2), attention=(16,))
    placed = [
        [block.attention is not None for block in part]
        for part in (network.encoder, network.middle, network.decoder)
    ]
    down, up = (
        [False, False, False, True, True, False, False, False],
        [False, False, False, False, False, False, True, False, False, False, False],
    )
    assert placed == [down, [True, False], up]
    assert [block.resample for block in network.decoder] == ["none", "none", "none", "up"] * 2 + ["none"] * 3


def test_attention_is_scaled_dot_product_attention_over_positions(perturbed) -> None:
    layer, images = perturbed(Attention(8)), torch.randn(2, 8, 3, 5)
    query, key, value = (
        part.transpose(1, 2) for part in layer.query_key_value(layer.norm(images)).flatten(2).chunk(3, dim=1)
    )
    mixed = (
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
        .transpose(1, 2)
        .reshape(2, 8, 3, 5)
    )
    assert torch.allclose(layer(images), (images + layer.output(mixed)) / math.sqrt(2), atol=1e-5)


def test_label_n_classes_is_no_label_and_every_label_counts(perturbed) -> None:
    network = perturbed(DDPMpp(8, 1, 10, width=8))
    images, c_noise = torch.randn(1, 1, 8, 8).expand(11, -1, -1, -1), torch.zeros(11)
    outputs = network(images, c_noise, torch.arange(11))
    assert torch.allclose(outputs[10], network(images, c_noise, None)[0], atol=1e-6)
    assert torch.pdist(outputs.flatten(1)).min() > 1e-3


def test_an_unlabelled_network_has_no_label_embedding_and_ignores_labels(perturbed) -> None:
    network = perturbed(DDPMpp(8, 1, 0, width=8))
    images, c_noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert not any(isinstance(module, torch.nn.Embedding) for module in network.modules())
    assert torch.equal(network(images, c_noise, torch.tensor([0, 1])), network(images, c_noise, None))


def test_the_noise_level_reaches_the_output(perturbed) -> None:
    network = perturbed(DDPMpp(8, 1, 0, width=8))
    images = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    first, second = network(images, torch.tensor([-1.0, 1.0]), None)
    assert (first - second).abs().max() > 1e-3


def test_sinusoidal_embedding_runs_from_frequency_1_to_1e_4() -> None:
    values = torch.tensor([-1.5, 0.0, 0.7])
    embedded = sinusoidal(values, 8)
    assert torch.allclose(embedded[:, 0], values.sin())
    assert torch.allclose(embedded[:, 3], (values * 1e-4).sin())
    assert torch.allclose(embedded[:, 4:] ** 2 + embedded[:, :4] ** 2, torch.ones(3, 4))
    assert sinusoidal(values, 9).shape == (3, 9)


def test_norms_have_a_quarter_of_the_channels_as_groups_and_at_most_32() -> None:
    with torch.device("meta"):
        modules = list(DDPMpp(32, 3, 10).modules()) + list(DDPMpp(32, 3, 10, width=96).modules())
    norms = {
        module.num_channels: (module.num_groups, module.eps)
        for module in modules
        if isinstance(module, torch.nn.GroupNorm)
    }
    assert norms == {
        channels: (min(channels // 4, 32), 1e-6) for channels in (32, 64, 96, 128, 192, 288, 384)
    }


def test_groups_divide_the_channels() -> None:
    assert [groups(32, 8), groups(96, 24), groups(288, 32), groups(10, 2), groups(14, 3), groups(3, 32)] == [
        8,
        24,
        32,
        2,
        2,
        3,
    ]


def test_a_resolution_that_cannot_be_halved_is_told_by_its_key() -> None:
    with pytest.raises(
        UserError, match=r"model\.multipliers: 4 levels need a data\.resolution divisible by 8, not 28"
    ):
        build_diffusion(settings(28, 1, multipliers=(1, 2, 2, 2)), 10)


def test_recomputed_activations_give_the_same_gradients_and_are_not_kept() -> None:
    """To the bit, with the memory of one block in place of all."""
    torch.manual_seed(0)
    network = DDPMpp(16, 1, 3, 8, (1, 2), (8,))
    x, level, labels = torch.randn(4, 1, 16, 16), torch.randn(4), torch.tensor([0, 1, 2, 3])
    gradients, kept = [], []
    for recompute in (False, True):
        network.recompute = recompute
        network.zero_grad()

        def forward(images: int) -> torch.Tensor:
            return network(x[:images], level[:images], labels[:images]).square().sum()

        kept.append(activations(forward, torch.device("cpu"), "fp32", images=4))
        forward(4).backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(gradients[0]) > 10
    assert kept[1] < kept[0] / 3
