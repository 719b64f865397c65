"""Families of generators behind one interface: what each does in each stage.

A new family is one file with a subclass of `Family`, one line in `FAMILIES`, and one in
`privimage.config.methods.GENERATORS`.
"""

from privimage.config import Config
from privimage.families.base import Family, FineTuned, Pretrained
from privimage.families.diffusion import Diffusion
from privimage.families.evolution import Evolution
from privimage.families.gan import Gan
from privimage.families.matching import Matching

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
    found = family(config)
    if not isinstance(found, Pretrained):
        raise TypeError(f"{config.method}: {type(found).__name__} cannot be pretrained")
    return found


def finetuned_family(config: Config) -> FineTuned:
    """The family of a method with stage `finetune`. Raises TypeError for one without DP-SGD."""
    found = family(config)
    if not isinstance(found, FineTuned):
        raise TypeError(f"{config.method}: {type(found).__name__} has no DP-SGD")
    return found
