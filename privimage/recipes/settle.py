"""Values in place of `auto`, found once at the first start of a run and kept."""

import contextlib
from typing import Any

from privimage.config import Config
from privimage.config.stages import STAGES
from privimage.data.sources import count_of, sensitive_source
from privimage.distributed.precision import resolved
from privimage.distributed.world import ALONE, World, alone
from privimage.errors import UserError
from privimage.privacy.plan import plan_without_noise
from privimage.recipes.choice import Choice, Choices, applied, automatic, is_auto
from privimage.recipes.choose import Speeds, choose
from privimage.recipes.cost import work_of
from privimage.recipes.facts import facts_of, stated_size
from privimage.storage.rundir import RunDir

ASSUMED = 1000  # images of a set that cannot be opened; the checks before a run then end it


def settled(config: Config, world: World = ALONE, run: RunDir | None = None) -> Config:
    """The configuration with a value for every `auto`, the same on all ranks, which call it together.

    Where a stage of `run` has begun, its values are kept: on another machine the rules would choose others,
    and everything that is stated depends on them.
    """
    if not automatic(config):
        return config
    found: Choices = {}
    if world.is_main:
        kept = _kept(config, run) if run is not None else {}
        found = kept | _new(applied(config, kept), world)
    return applied(config, world.broadcast_object(found))


def as_begun(config: Config, run: RunDir) -> Config:
    """The configuration with what was chosen for a run, once it has begun, in place of `auto`."""
    return applied(config, _kept(config, run))


def _kept(config: Config, run: RunDir) -> Choices:
    if not any((run.path / stage).exists() for stage in STAGES):
        return {}
    before = run.settings()
    values: dict[str, Any] = {
        key: before.get(key.split(".")[0], {}).get(key.split(".")[1], "auto") for key in automatic(config)
    }
    return {key: Choice(value, "as before") for key, value in values.items() if not is_auto(value)}


def _new(config: Config, world: World) -> Choices:
    wanted = automatic(config)
    if not wanted:
        return {}
    found = chosen(config, *size_of(config), world)
    # What a run does not use stays as it is: it would not be kept.
    return {key: choice for key, choice in found.items() if key in wanted}


def chosen(config: Config, count: int, classes: int, world: World = ALONE) -> Choices:
    """What the rules choose for a set of `count` images of `classes` classes (0 if unlabelled)."""

    def measure(trial: Config) -> Speeds:
        plan = plan_without_noise(trial, count)
        if trial.spec.generator == "none":
            return {}
        work = work_of(resolved(trial, alone(world.device)), plan, count, classes, world.device)
        return {
            one.stage: one.seconds / (one.steps * one.images) / world.size for one in work if one.steps
        } | {
            one.stage: one.seconds / one.images / world.size
            for one in work
            if one.stage in ("synthesize", "evaluate")
        }

    return choose(config, facts_of(config, count, classes), measure)


def size_of(config: Config) -> tuple[int, int]:
    """N and the number of classes (0 if unlabelled), as stated, or as the sensitive set has them."""
    sensitive, (count, classes) = config.data.sensitive, stated_size(config)
    if count is None or (classes is None and sensitive.labelled):
        with contextlib.suppress(UserError):  # the checks before a run say what is wrong
            source = sensitive_source(config, "train")
            count, classes = count or count_of(config, source), classes or len(source.classes)
    return count or ASSUMED, (classes or 2) if sensitive.labelled else 0
