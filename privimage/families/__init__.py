"""Families of generators behind one interface: what each does in each stage. A method's family is `family(config)`."""

from privimage.config import Config
from privimage.families.base import Family
from privimage.families.diffusion import Diffusion
from privimage.families.gan import Gan

FAMILIES: dict[str, Family] = {"diffusion": Diffusion(), "gan": Gan()}


def family(config: Config) -> Family:
    """The family of the method's generator."""
    return FAMILIES[config.spec.generator]
