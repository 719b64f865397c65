"""Families of generators behind one interface: what each does in each stage.

A new family is one file with a subclass of `Family`, one line in `FAMILIES`, and one in
`privimage.config.methods.GENERATORS`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.data.sensitive import ImageDraws
from privimage.families.base import Family, FineTuned, Pretrained, Warmed, image_shape
from privimage.families.diffusion import Diffusion
from privimage.families.evolution import Evolution
from privimage.families.gan import Gan
from privimage.families.matching import Matching
from privimage.models.label_features import LabelClassifier

FAMILIES: dict[str, Family] = {
    "diffusion": Diffusion(),
    "gan": Gan(),
    "matching": Matching(),
    "evolution": Evolution(),
}


def family(config: Config) -> Family:
    """The family of the method's generator."""
    return FAMILIES[config.spec.generator]


def pretrained_family(config: Config) -> Pretrained:
    """The family of a method with stage `pretrain`. Raises TypeError for one that cannot be pretrained."""
    chosen = family(config)
    if not isinstance(chosen, Pretrained):
        raise TypeError(f"{config.method}: {type(chosen).__name__} cannot be pretrained")
    return chosen


def finetuned_family(config: Config) -> FineTuned:
    """The family of a method with stage `finetune`. Raises TypeError for one without DP-SGD."""
    chosen = family(config)
    if not isinstance(chosen, FineTuned):
        raise TypeError(f"{config.method}: {type(chosen).__name__} has no DP-SGD")
    return chosen


def warmed_family(config: Config) -> Warmed:
    """The family of a method with stage `warm`. Raises TypeError for one without warm starts."""
    chosen = family(config)
    if not isinstance(chosen, Warmed):
        raise TypeError(f"{config.method}: {type(chosen).__name__} has no warm start")
    return chosen


def restored(
    config: Config, state: dict[str, Any], device: torch.device
) -> tuple[nn.Module, LabelClassifier | None]:
    """The generator that a stage left in `state` (`Family.restored`), on `device` and in eval mode, and the
    private classifier that leads it, where `state` has that of a `LabelClassifier` under `classifier`.
    """
    generator = family(config).restored(config, state).to(device).eval()
    if "classifier" not in state:
        return generator, None
    classifier = LabelClassifier(state["classifier"], image_shape(config), device)
    return family(config).guided(config, generator, classifier), classifier


def sampled(
    config: Config, generator: nn.Module, labels: Tensor | None, indices: Tensor, draws: ImageDraws
) -> np.ndarray:
    """`Family.sample` in `runtime.precision`, as a release has its images: uint8 (B, H, W, C)."""
    with torch.autocast(indices.device.type, torch.bfloat16, enabled=config.runtime.precision == "bf16"):
        images = family(config).sample(config, generator, labels, indices, draws)
    return images.permute(0, 2, 3, 1).cpu().numpy()
