"""The diffusion formulation of Karras et al. 2022 (EDM).

"Elucidating the Design Space of Diffusion-Based Generative Models". Nothing here draws a random number:
noise levels, noise and churn are arguments, so that the caller controls all randomness.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

# The standard deviation of a uniform distribution on [-1, 1]: a constant, which says nothing about the
# sensitive set.
SIGMA_DATA = math.sqrt(1 / 3)
SIGMA_MAX, SIGMA_MIN, RHO = 80.0, 0.002, 7.0
LEVELS = (-1.2, 1.2)  # mean and deviation of ln sigma in training
Sampler = Literal["dpm++", "euler", "heun"]
S_CHURN, S_MIN, S_MAX, S_NOISE = 40.0, 0.05, 50.0, 1.003


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) in [0, 255] -> float32 in [-1, 1], by constants: statistics of a sensitive set would
    leak.
    """
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (B, C, H, W) in [-1, 1], clipped to it, -> the nearest uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_sigma(normal: Tensor) -> Tensor:
    """Standard normal draws (B,) -> noise levels of training (B,), ln sigma ~ N(-1.2, 1.2^2) (table 1)."""
    mean, deviation = LEVELS
    return torch.exp(deviation * normal + mean)


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), F preconditioned (equation 7, table 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float = 0.0) -> Tensor:
        """Noisy images (B, C, H, W), sigma (B,) > 0, labels (B,) int64 or None -> denoised images (B, C, H,
        W) float32.

        `guidance` g is the classifier-free guidance scale (Ho and Salimans 2022): D_cond + g (D_cond -
        D_uncond). It needs a network call more; 0 is off.
        """
        # c_in, c_skip, c_out and c_noise of table 1: inputs and targets of unit variance at every noise
        # level.
        level = sigma.float()[:, None, None, None]
        total = level**2 + SIGMA_DATA**2
        inputs, c_noise = images / total.sqrt(), sigma.float().log() / 4

        def denoised(labels: Tensor | None) -> Tensor:
            return images * (SIGMA_DATA**2 / total) + self.network(inputs, c_noise, labels).float() * (
                level * SIGMA_DATA / total.sqrt()
            )

        conditional = denoised(labels)
        return conditional if guidance == 0 else conditional + guidance * (conditional - denoised(None))


def loss(
    denoiser: Callable[..., Tensor], images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor
) -> Tensor:
    """Weighted squared error of each image, averaged over its pixels and channels (equation 8 and table 1).

    Args:
        images: (B, C, H, W) in [-1, 1].
        labels: (B,) int64, or None.
        sigma: (B,).
        noise: (B, C, H, W), standard normal.

    Returns the losses (B,). The weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 makes the loss of an
    untrained network about 1 at every level.
    """
    level = sigma[:, None, None, None]
    # The network sees the noisy image; its error is weighted by 1 / c_out^2.
    error = denoiser(images + level * noise, sigma, labels) - images
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return weight * error.square().flatten(1).mean(1)


def noise_levels(steps: int, highest: float = SIGMA_MAX) -> list[float]:
    """`steps` noise levels from `highest` down to 0.002 with rho = 7 (equation 5), and the final 0."""
    ramp = [index / (steps - 1) for index in range(steps)]
    high, low = highest ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(high + at * (low - high)) ** RHO for at in ramp] + [0.0]


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    latents: Tensor,
    labels: Tensor | None,
    sampler: Sampler = "dpm++",
    steps: int = 18,
    guidance: float = 0.0,
    churn_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Images (B, C, H, W) float, about [-1, 1], from standard normal latents (B, C, H, W) and labels (B,) or
    None.

    "dpm++" is DPM-Solver++ (2M; Lu et al. 2022, algorithm 2), deterministic and of second order by the
    network's answer of the step before: `steps` >= 2 network calls. "euler" is of first order (that of
    DDIM), with as many calls. "heun" is EDM's stochastic sampler (algorithm 2), 2 steps - 1 calls:
    `churn_noise(i)` answers the fresh standard normal noise (B, C, H, W) of step i and is called only where
    noise is added; without it the sampler is deterministic (algorithm 1).
    """
    levels = noise_levels(steps)
    if sampler == "dpm++":
        return _multistep(denoiser, latents * levels[0], levels, labels, guidance)
    return _denoised(denoiser, latents * levels[0], levels, labels, sampler, guidance, churn_noise)


@torch.no_grad()
def vary(
    denoiser: nn.Module,
    images: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    sigma: float,
    steps: int = 50,
    guidance: float = 0.0,
) -> Tensor:
    """Variations of images (B, C, H, W) in [-1, 1].

    Noised up to level `sigma` and denoised again by `steps` Euler steps (Meng et al. 2022, SDEdit).

    noise (B, C, H, W) standard normal; labels (B,) or None. The larger sigma in (0.002, 80], the less is
    kept.
    """
    return _denoised(
        denoiser, images + sigma * noise, noise_levels(steps, sigma), labels, "euler", guidance, None
    )


def _denoised(
    denoiser: nn.Module,
    images: Tensor,
    levels: list[float],
    labels: Tensor | None,
    sampler: Sampler,
    guidance: float,
    churn_noise: Callable[[int], Tensor] | None,
) -> Tensor:
    """Follow `levels` from images with noise of the first one down to images without noise."""

    def slope(images: Tensor, level: float) -> Tensor:
        sigma = torch.full((len(images),), level, device=images.device)
        return (images - denoiser(images, sigma, labels, guidance=guidance)) / level

    for index, (level, target) in enumerate(itertools.pairwise(levels)):
        if sampler == "heun" and churn_noise is not None and S_MIN <= level <= S_MAX:
            raised = level * (1 + min(S_CHURN / (len(levels) - 1), math.sqrt(2) - 1))
            images = images + math.sqrt(raised**2 - level**2) * S_NOISE * churn_noise(index)
            level = raised
        first = slope(images, level)
        ahead = images + (target - level) * first
        # The second order is left out where the slope at 0 is not defined.
        images = (
            ahead
            if sampler == "euler" or target == 0
            else images + (target - level) * (first + slope(ahead, target)) / 2
        )
    return images


def _multistep(
    denoiser: nn.Module, images: Tensor, levels: list[float], labels: Tensor | None, guidance: float
) -> Tensor:
    """DPM-Solver++ (2M) along `levels`: the exact solution where the denoised image is linear in ln sigma."""
    before: Tensor | None = None
    last_step = 0.0
    for level, target in itertools.pairwise(levels):
        sigma = torch.full((len(images),), level, device=images.device)
        denoised = denoiser(images, sigma, labels, guidance=guidance)
        if target == 0:
            return denoised
        # The slope of the denoised image comes from its value at the step before; the first step has none.
        step, ahead = math.log(level / target), denoised
        if before is not None:
            ahead = denoised + (denoised - before) * (step / (2 * last_step))
        images = images * (target / level) - math.expm1(-step) * ahead
        before, last_step = denoised, step
    return images
