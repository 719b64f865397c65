"""BigGAN has the published sizes, works on small images, and its discriminator suits per-image gradients."""

import pytest
import torch
from torch import nn

from privimage.config import Config, parse
from privimage.errors import UserError
from privimage.models import biggan, build_discriminator, build_generator, parameters


def settings(resolution: int, channels: int, width: int) -> Config:
    kind = {"kind": "digits"}
    data = {"resolution": resolution, "channels": channels, "public": kind, "sensitive": kind}
    return parse({"run": {"dir": "unused"}, "data": data, "model": {"gan_width": width}})


def both(config: Config, n_classes: int) -> tuple[biggan.Generator, biggan.Discriminator]:
    return build_generator(config, n_classes), build_discriminator(config, n_classes)


def test_cifar10_sizes_come_out_to_the_parameter() -> None:
    with torch.device("meta"):
        generator, discriminator = both(settings(32, 3, 96), 10)
    assert (parameters(generator), parameters(discriminator)) == (9_416_196, 2_372_167)


def test_celeba64_sizes_come_out_as_published() -> None:
    # 11.29 M and 19.56 M were published to four digits; the discriminator's holds with ten label rows of
    # 1,024, one of which is used.
    with torch.device("meta"):
        generator, discriminator = both(settings(64, 3, 64), 10)
    assert (round(parameters(generator) / 1e6, 2), round(parameters(discriminator) / 1e6, 2)) == (
        11.29,
        19.56,
    )


@pytest.mark.parametrize(
    ("resolution", "channels", "n_classes"), [(8, 1, 10), (28, 1, 10), (32, 3, 10), (64, 3, 0)]
)
def test_images_and_scores_have_their_shapes(resolution: int, channels: int, n_classes: int) -> None:
    generator, discriminator = both(settings(resolution, channels, 8), n_classes)
    labels = torch.zeros(3, dtype=torch.int64)
    images = generator(torch.randn(3, generator.latent_size), labels)
    assert images.shape == (3, channels, resolution, resolution)
    assert images.abs().max() <= 1
    assert discriminator(images, labels).shape == (3,)


@pytest.mark.parametrize("resolution", [8, 28, 32])
def test_every_weight_of_both_networks_learns(resolution: int) -> None:
    generator, discriminator = both(settings(resolution, 1, 8), 4)
    labels = torch.arange(4)
    if generator.attention is not None:
        nn.init.ones_(generator.attention.gate)
    biggan.g_loss(
        discriminator(generator(torch.randn(4, generator.latent_size), labels), labels)
    ).mean().backward()
    # Biases inside the generator are cancelled by the batch norm behind them; the discriminator's are the
    # other file's claim.
    learning = [
        (name, value)
        for name, value in generator.named_parameters()
        if not name.endswith("bias") or name == "output.bias"
    ]
    assert [name for name, value in learning if value.grad is None or value.grad.abs().sum() == 0] == []
    assert all(value.grad is not None for value in discriminator.parameters())


def test_each_chunk_of_the_latent_and_the_label_change_the_image() -> None:
    generator = build_generator(settings(32, 3, 8), 10).eval()
    latents, labels = torch.randn(1, 80), torch.tensor([3])
    image = generator(latents, labels)
    for chunk in range(4):
        moved = latents.clone()
        moved[:, 20 * chunk : 20 * (chunk + 1)] += 1
        assert (generator(moved, labels) - image).abs().max() > 1e-4
    assert (generator(latents, torch.tensor([4])) - image).abs().max() > 1e-4


def test_convolutions_have_spectral_norm_one_in_the_generator_and_none_in_the_discriminator() -> None:
    generator, discriminator = both(settings(32, 3, 8), 10)
    layers = [module for module in generator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.parametrizations.weight.original.mul_(3)
    generator(torch.randn(2, 80), torch.tensor([0, 1]))
    norms = [torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() for layer in layers]
    assert len(norms) == 3 * 7 + 4 + 2
    assert norms == pytest.approx([1.0] * len(norms), abs=0.1)
    assert not any(hasattr(module, "parametrizations") for module in discriminator.modules())


def test_the_discriminator_normalises_32_groups_or_single_channels() -> None:
    discriminator = build_discriminator(settings(32, 3, 96), 10)
    norms = {
        (module.num_channels, module.num_groups)
        for module in discriminator.modules()
        if isinstance(module, nn.GroupNorm)
    }
    assert norms == {(3, 3), (192, 32)}


def test_hinge_losses_stop_at_the_margin() -> None:
    scores = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert biggan.d_loss_real(scores).tolist() == [3.0, 1.0, 0.5, 0.0]
    assert biggan.d_loss_fake(scores).tolist() == [0.0, 1.0, 1.5, 4.0]
    assert biggan.g_loss(scores).tolist() == [2.0, 0.0, -0.5, -3.0]


@pytest.mark.parametrize("build", [build_generator, build_discriminator])
def test_a_resolution_that_no_doubling_gives_is_told_by_its_key(build) -> None:
    with pytest.raises(UserError, match=r"data\.resolution: .* never gives 36"):
        build(settings(36, 3, 8), 10)


def latents_and_labels(size: int, count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(2)
    return [(torch.randn(32, size, generator=random), torch.arange(32) % 10) for _ in range(count)]


def test_a_recalibrated_generator_has_the_statistics_of_its_weights_and_of_nothing_else() -> None:
    """Whatever statistics came with the weights, as for averaged weights that never ran together."""
    generator = build_generator(settings(8, 1, 8), 10)
    batches = latents_and_labels(generator.latent_size)
    weights = {name: value.clone() for name, value in generator.named_parameters()}
    found = []
    for garbage in (0.0, 7.0):
        for module in generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.fill_(garbage)
                module.running_var.fill_(garbage + 1)
        assert biggan.recalibrate(generator, batches) is generator and not generator.training
        found.append({name: value.clone() for name, value in generator.named_buffers()})
    assert all(torch.equal(value, weights[name]) for name, value in generator.named_parameters())
    assert {module.momentum for module in generator.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    for name, value in found[0].items():
        assert torch.allclose(value.float(), found[1][name].float(), atol=1e-2), name
    with torch.no_grad():  # the first batch norm sees the linear map of the first chunk of the latents
        seen = torch.cat(
            [generator.input(latents[:, : generator.chunk]) for latents, _ in batches]
        ).unflatten(1, (-1, 4, 4))
    norm = generator.blocks[0].norm_1.norm
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-2)
    assert torch.allclose(norm.running_var, seen.var((0, 2, 3)), rtol=0.1)


def test_recalibration_finds_the_spectral_norm_of_changed_weights() -> None:
    torch.manual_seed(0)  # the power iteration starts at random, and converges at random speed
    generator = build_generator(settings(8, 1, 8), 10)
    layers = [module for module in generator.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers:
            original = layer.parametrizations.weight.original
            original.add_(torch.randn(original.shape, generator=random))
    biggan.recalibrate(generator, latents_and_labels(generator.latent_size, 16))
    norms = [torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() for layer in layers]
    assert norms == pytest.approx([1.0] * len(norms), abs=0.05)


def test_an_image_of_a_recalibrated_generator_is_its_own() -> None:
    generator = build_generator(settings(8, 1, 8), 10)
    biggan.recalibrate(generator, latents_and_labels(generator.latent_size))
    latents, labels = torch.randn(5, generator.latent_size), torch.arange(5)
    with torch.no_grad():
        together = generator(latents, labels)
        for index in range(5):
            assert torch.allclose(
                generator(latents[index : index + 1], labels[index : index + 1])[0],
                together[index],
                atol=1e-5,
            )
