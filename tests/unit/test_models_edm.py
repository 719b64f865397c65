"""The EDM formulation against closed forms.

Preconditioning, loss, and both samplers on a Gaussian, whose denoiser is known.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from privimage.models import edm

SD = math.sqrt(1 / 3)


class Constant(nn.Module):
    """A network whose output is the same number everywhere, offset by the label; it records its inputs."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value, self.calls = value, []

    def forward(self, images: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append((images, c_noise, labels))
        offset = torch.zeros(len(images)) if labels is None else labels.float()
        return torch.zeros_like(images) + self.value + offset[:, None, None, None]


class GaussianDenoiser(nn.Module):
    """The optimal denoiser of pixels distributed as N(mean, deviation^2)."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation, self.calls = mean, deviation, 0

    def forward(self, images: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float = 0.0) -> Tensor:
        self.calls += 1
        variance, level = self.deviation**2, sigma[:, None, None, None] ** 2
        return (images * variance + self.mean * level) / (variance + level)


def levels(steps: int) -> list[float]:
    """The noise levels of the paper's equation 5, in another form.

    A geometric-like mean of the ends' 7th roots.
    """
    return [
        ((1 - i / (steps - 1)) * 80 ** (1 / 7) + i / (steps - 1) * 0.002 ** (1 / 7)) ** 7
        for i in range(steps)
    ] + [0.0]


def test_the_image_comes_back_as_the_noise_vanishes() -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.allclose(
        edm.Denoiser(Constant(5.0))(images, torch.full((2,), 1e-6), None), images, atol=1e-4
    )


def test_the_output_is_the_network_s_as_the_noise_drowns_the_image() -> None:
    images = torch.rand(1, 1, 4, 4)
    assert torch.allclose(
        edm.Denoiser(Constant(2.0))(images, torch.tensor([1e6]), None), torch.tensor(2.0 * SD), atol=1e-4
    )


def test_the_network_s_input_has_unit_variance_and_its_noise_label_is_a_quarter_of_ln_sigma() -> None:
    network, sigma = Constant(), torch.tensor([0.002, 0.5, 80.0])
    images = SD * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = images + sigma[:, None, None, None] * torch.randn(
        3, 3, 64, 64, generator=torch.Generator().manual_seed(1)
    )
    edm.Denoiser(network)(noisy, sigma, None)
    inputs, c_noise, _ = network.calls[0]
    assert torch.allclose(inputs.flatten(1).std(1), torch.ones(3), atol=0.03)
    assert torch.allclose(c_noise, torch.tensor([-1.5537, -0.1733, 1.0955]), atol=1e-4)


def test_the_loss_is_the_plain_squared_error_of_the_network_s_target() -> None:
    # Equation 8: weight * |D - y|^2 = |F - (y - c_skip (y + n)) / c_out|^2, here with F = 0.3 + label.
    images, noise = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    sigma, labels = torch.tensor([0.05, 0.5, 20.0]), torch.tensor([0, 1, 2])
    values = edm.loss(edm.Denoiser(Constant(0.3)), images, labels, sigma, noise)
    assert values.shape == (3,)
    for i, level in enumerate(sigma.tolist()):
        c_skip, c_out = (1 / 3) / (level**2 + 1 / 3), level * SD / math.sqrt(level**2 + 1 / 3)
        target = (images[i] - c_skip * (images[i] + level * noise[i])) / c_out
        assert values[i].item() == pytest.approx((0.3 + i - target).square().mean().item(), rel=1e-3)


def test_a_perfect_denoiser_has_no_loss() -> None:
    images = torch.rand(2, 1, 4, 4)

    class Perfect(nn.Module):
        def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            return images

    assert (
        edm.loss(Perfect(), images, None, torch.tensor([0.1, 10.0]), torch.randn(2, 1, 4, 4)).abs().max() == 0
    )


def test_training_noise_levels_are_log_normal() -> None:
    assert torch.allclose(
        edm.draw_sigma(torch.tensor([-1.0, 0.0, 1.0])).log(), torch.tensor([-2.4, -1.2, 0.0]), atol=1e-6
    )


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = edm.to_unit(pixels)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(edm.to_uint8(unit), pixels)
    assert torch.equal(
        edm.to_uint8(torch.tensor([-7.0, 7.0, 0.999])), torch.tensor([0, 255, 255], dtype=torch.uint8)
    )


def test_guidance_0_needs_one_network_call_and_guidance_g_leads_away_from_no_label() -> None:
    images, sigma, labels = torch.zeros(2, 1, 4, 4), torch.tensor([1.0, 1.0]), torch.tensor([1, 3])
    network = Constant(0.5)
    plain = edm.Denoiser(network)(images, sigma, labels)
    assert len(network.calls) == 1
    guided = edm.Denoiser(network)(images, sigma, labels, guidance=2.0)
    assert len(network.calls) == 3
    assert network.calls[2][2] is None
    # F = 0.5 + label with one, 0.5 without: D_cond + 2 (D_cond - D_uncond) = c_out (0.5 + 3 label).
    assert torch.allclose(
        guided / plain, ((0.5 + 3 * labels) / (0.5 + labels))[:, None, None, None].expand_as(plain)
    )


def test_euler_follows_its_closed_form_on_a_gaussian() -> None:
    denoiser, latents, deviation = GaussianDenoiser(0.2, 0.5), torch.randn(4, 1, 2, 2), 0.5
    images = edm.sample(denoiser, latents, None, "euler", 50)
    expected = 80 * latents - 0.2
    for level, target in pairwise(levels(50)):
        expected = expected * (1 + (target - level) * level / (deviation**2 + level**2))
    assert denoiser.calls == 50
    assert torch.allclose(images, 0.2 + expected, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"), [("euler", 1000, 0.01), ("heun", 50, 0.01), ("dpm++", 50, 0.01)]
)
def test_samplers_converge_to_the_exact_flow(sampler: edm.Sampler, steps: int, tolerance: float) -> None:
    # d(x - mean)/d sigma = sigma (x - mean) / (deviation^2 + sigma^2), so x - mean shrinks like
    # sqrt(deviation^2 + sigma^2).
    denoiser, latents = GaussianDenoiser(-0.1, 0.4), torch.randn(4, 1, 2, 2)
    images = edm.sample(denoiser, latents, None, sampler, steps)
    exact = -0.1 + (80 * latents + 0.1) * 0.4 / math.hypot(0.4, 80)
    assert (images - exact).abs().max() < tolerance * exact.abs().max()


def test_twice_the_steps_halve_euler_s_error_and_quarter_that_of_the_second_order() -> None:
    latents = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    exact = latents * 80 * 0.4 / math.hypot(0.4, 80)

    def error(sampler: edm.Sampler, steps: int) -> float:
        denoiser = GaussianDenoiser(0.0, 0.4)
        images = edm.sample(denoiser, latents, None, sampler, steps)
        assert denoiser.calls == (2 * steps - 1 if sampler == "heun" else steps)
        return (images - exact).abs().max().item()

    assert error("euler", 72) / error("euler", 144) == pytest.approx(2, abs=0.2)
    assert error("heun", 72) / error("heun", 144) == pytest.approx(4, abs=0.5)
    assert error("dpm++", 72) / error("dpm++", 144) == pytest.approx(4, abs=0.6)


def test_two_steps_of_dpm_are_its_closed_form() -> None:
    """The first step is of first order, the last one is the denoised image."""
    denoiser, latents = GaussianDenoiser(0.0, 0.5), torch.randn(4, 1, 2, 2)
    highest, lowest, _ = levels(2)
    images, share = 80 * latents, [0.25 / (0.25 + level**2) for level in (highest, lowest)]
    images = images * lowest / highest + (1 - lowest / highest) * share[0] * images
    assert torch.allclose(edm.sample(denoiser, latents, None, "dpm++", 2), share[1] * images, rtol=1e-5)


def test_the_stochastic_sampler_keeps_mean_and_variance_and_asks_for_noise_only_between_s_min_and_s_max() -> (
    None
):
    generator, asked = torch.Generator().manual_seed(0), []

    def churn(step: int) -> Tensor:
        asked.append(step)
        return torch.randn(100, 1, 16, 16, generator=generator)

    images = edm.sample(
        GaussianDenoiser(0.3, 0.5),
        torch.randn(100, 1, 16, 16, generator=generator),
        None,
        "heun",
        200,
        churn_noise=churn,
    )
    assert asked == [i for i, level in enumerate(levels(200)[:-1]) if 0.05 <= level <= 50]
    # 25,600 pixels: the standard errors of mean and deviation are 0.003 and 0.0022; S_noise = 1.003 and the
    # steps widen by less than 1 %.
    assert images.mean().item() == pytest.approx(0.3, abs=0.015)
    assert images.std().item() == pytest.approx(0.5, abs=0.01)


def test_churn_changes_the_samples_and_equal_churn_repeats_them() -> None:
    denoiser, latents = GaussianDenoiser(0.0, 0.5), torch.randn(2, 1, 2, 2)

    def run(seed: int | None) -> Tensor:
        noise = (
            None
            if seed is None
            else lambda step: torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed + step))
        )
        return edm.sample(denoiser, latents, None, "heun", 10, churn_noise=noise)

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(None), atol=1e-2)


def test_the_sampler_hands_labels_and_guidance_on() -> None:
    network = Constant()
    edm.sample(edm.Denoiser(network), torch.randn(2, 1, 4, 4), torch.tensor([4, 2]), "euler", 2, guidance=1.0)
    assert [labels if labels is None else labels.tolist() for _, _, labels in network.calls] == [
        [4, 2],
        None,
        [4, 2],
        None,
    ]
