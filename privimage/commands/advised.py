"""What suits a set beyond values for `auto`: stages on request, and starter weights."""

from pathlib import Path

from privimage.config import Config
from privimage.families.starter import shipped
from privimage.recipes.choice import Choice, applied
from privimage.recipes.constants import networks
from privimage.recipes.facts import Facts, facts_of
from privimage.recipes.labels import can_be_learned
from privimage.recipes.warm_start import stands_out

CHARACTERS = ("digits", "glyphs", "mnist", "fashion-mnist")  # kinds whose images must not be mirrored


def advised(config: Config, count: int, classes: int) -> Config:
    """The configuration with the stages `ON_REQUEST` and the starter weights that suit a set.

    `count` is N, `classes` their number, 0 if unlabelled.
    """
    facts = facts_of(config, count, classes)
    if can_be_learned(facts):
        config = applied(config, {"classify.use": Choice(True, "")})
    if (begun := _starter(config, facts)) is not None:
        path = Choice(str(begun), "")
        return applied(config, {"query.start_from": path, "pretrain.start_from": path})
    # A network that knows images already gains little by moments (docs/results.md).
    if stands_out(facts):
        config = applied(config, {"warm.starts": Choice(["moments"], "")})
    return config


def _starter(config: Config, facts: Facts) -> Path | None:
    """Starter weights that come with PrivImage, if those of some suit the networks and the public set."""
    if config.spec.generator != "diffusion" or "pretrain" not in config.stages:
        return None
    # Photographs have more in common with each other than with characters.
    if config.data.channels == 1 and config.data.public.kind not in CHARACTERS:
        return None
    return shipped(applied(config, networks(facts)))
