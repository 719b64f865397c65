"""What per-image gradients require of networks that see sensitive images: DDPM++, BigGAN."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privimage.models.biggan import Discriminator
from privimage.models.ddpmpp import DDPMpp

LAYERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)
Case = tuple[nn.Module, Callable[[Tensor], tuple]]


def _diffusion(resolution: int, channels: int, n_classes: int, **model: object) -> Case:
    network = DDPMpp(resolution, channels, n_classes, width=8, **model)  # type: ignore[arg-type]
    return network, lambda images: (
        images,
        torch.linspace(-1, 1, len(images)),
        torch.arange(len(images)) if n_classes else None,
    )


def _discriminator(resolution: int, channels: int) -> Case:
    return Discriminator(resolution, channels, 10, width=32), lambda images: (
        images,
        torch.arange(len(images)),
    )


@pytest.fixture(
    params=[
        lambda: (*_diffusion(8, 1, 10), 8, 1),
        lambda: (*_diffusion(28, 1, 10, attention=(7,)), 28, 1),
        lambda: (*_diffusion(32, 3, 0, attention=(8, 16)), 32, 3),
        lambda: (*_diffusion(64, 3, 10, multipliers=(1, 1, 2, 2), attention=(8, 16)), 64, 3),
        lambda: (*_discriminator(8, 1), 8, 1),
        lambda: (*_discriminator(28, 1), 28, 1),
        lambda: (*_discriminator(32, 3), 32, 3),
        lambda: (*_discriminator(64, 3), 64, 3),
    ],
    ids=[
        "diffusion-8",
        "diffusion-28",
        "diffusion-32",
        "diffusion-64",
        "discriminator-8",
        "discriminator-28",
        "discriminator-32",
        "discriminator-64",
    ],
)
def case(request, perturbed):
    """(network with weights that are nowhere zero, arguments from images, images)."""
    torch.manual_seed(0)
    network, arguments, resolution, channels = request.param()
    return perturbed(network), arguments, torch.randn(3, channels, resolution, resolution)


def test_parameters_live_in_four_kinds_of_layers_and_there_are_no_statistics(case) -> None:
    network, _, _ = case
    assert {type(module) for module in network.modules() if list(module.parameters(recurse=False))} <= set(
        LAYERS
    )
    assert not list(network.buffers())


def test_each_layer_runs_exactly_once_and_every_parameter_gets_a_gradient(case) -> None:
    network, arguments, images = case
    calls: Counter = Counter()
    for name, module in network.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    network(*arguments(images)).square().sum().backward()
    assert set(calls) == {name for name, module in network.named_modules() if isinstance(module, LAYERS)}
    assert set(calls.values()) == {1}
    assert [
        name
        for name, value in network.named_parameters()
        if value.grad is None or not value.grad.abs().sum() > 1e-4
    ] == []


def test_no_image_touches_the_output_of_another(case) -> None:
    network, arguments, images = case
    images.requires_grad_()
    output = network(*arguments(images))
    gradient = torch.autograd.grad(output[1].square().sum(), images)[0]
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().max() == 0


def test_layer_outputs_are_not_changed_in_place(case) -> None:
    network, arguments, images = case
    kept: list[tuple[str, Tensor, Tensor]] = []
    for name, module in network.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(
                lambda _m, inputs, output, name=name: kept.extend(
                    (name, t, t.detach().clone()) for t in (inputs[0], output)
                )
            )
    network(*arguments(images))
    assert [name for name, now, then in kept if not torch.equal(now, then)] == []
