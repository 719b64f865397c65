"""Families of generators behind one interface: what each does in each stage.

A method's family is `family(config)`.
"""

from privimage.config import Config
from privimage.families.base import Family
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
