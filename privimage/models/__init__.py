"""Generators and classifiers, built from the configuration."""

from collections.abc import Callable
from typing import Any

from torch import nn

from privimage.config import Config
from privimage.errors import UserError
from privimage.models.biggan import Discriminator, Generator
from privimage.models.ddpmpp import DDPMpp
from privimage.models.edm import Denoiser


def parameters(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def built(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The network that `config.json` of a release describes, with fresh weights."""
    return NETWORKS[name](**arguments)


def _denoiser(**arguments: Any) -> Denoiser:
    return Denoiser(DDPMpp(**arguments))


# What makes images, by the name of its architecture.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"DDPM++": _denoiser, "BigGAN": Generator}


def diffusion_arguments(config: Config, n_classes: int) -> dict[str, Any]:
    """Arguments of DDPM++, from `model.*` and `data.*`; n_classes = 0 for an unlabelled set.

    Raises UserError where the resolution cannot be halved for every level.
    """
    model, data = config.model, config.data
    halvings = len(model.multipliers) - 1
    if data.resolution % 2**halvings:
        raise UserError(
            f"model.multipliers: {len(model.multipliers)} levels need a data.resolution divisible by "
            f"{2**halvings}, not {data.resolution}"
        )
    shape = {"resolution": data.resolution, "channels": data.channels, "n_classes": n_classes}
    return shape | {
        "width": model.width,
        "multipliers": list(model.multipliers),
        "attention": list(model.attention),
    }


def build_diffusion(config: Config, n_classes: int) -> Denoiser:
    """DDPM++ under the EDM preconditioning; see `diffusion_arguments`."""
    return _denoiser(**diffusion_arguments(config, n_classes))


def build_generator(config: Config, n_classes: int) -> Generator:
    """BigGAN's generator; see `gan_arguments`."""
    return Generator(**gan_arguments(config, n_classes))


def build_discriminator(config: Config, n_classes: int) -> Discriminator:
    """BigGAN's discriminator, which suits `build_generator`; it refuses the same resolutions."""
    return Discriminator(**gan_arguments(config, n_classes))


def gan_arguments(config: Config, n_classes: int) -> dict[str, int]:
    """Arguments of BigGAN's networks, from `model.gan_width` and `data.*`.

    An unlabelled set (n_classes = 0) has one class, label 0.

    Raises UserError where the resolution does not come from doubling a map of 4x4 to 7x7.
    """
    data = config.data
    bottom = data.resolution
    while bottom > 7 and bottom % 2 == 0:
        bottom //= 2
    if bottom > 7:
        raise UserError(
            "data.resolution: the GAN doubles a map of 4x4 to 7x7 up to the image, which never gives "
            f"{data.resolution}"
        )
    shape = {"resolution": data.resolution, "channels": data.channels, "n_classes": max(n_classes, 1)}
    return shape | {"width": config.model.gan_width}
