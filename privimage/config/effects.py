"""What each setting affects: which stages, and whether it is part of the privacy plan.

It is declared on the setting itself, by `on`. Everything that asks whether a setting may change, whether two
runs may share a stage, or what a computation depends on asks here, so that the answers cannot disagree.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from privimage.config.section import Section
from privimage.config.settings import Config
from privimage.config.stages import STAGES


@dataclass(frozen=True)
class Effect:
    """What one setting affects."""

    stages: frozenset[str] = frozenset()  # whose results change with it; empty: it changes no result
    planned: bool = False  # part of the privacy plan, which is fixed when the account is opened
    place: bool = False  # says where images or weights are; computations are identified by their content


EVERYTHING = Effect(frozenset(STAGES))  # of settings of older versions, which nobody declares any more


def effect(key: str) -> Effect:
    """The effect of a setting, written ``section.key``."""
    table = effects()
    parts = key.split(".")
    # A key below a setting that is a mapping, such as a stage of slurm.stages, has the effect of that
    # setting.
    while parts:
        if (found := table.get(".".join(parts))) is not None:
            return found
        parts.pop()
    return EVERYTHING


@cache
def effects() -> dict[str, Effect]:
    """The effects of all settings, by ``section.key``."""
    return dict(_effects(Config, ""))


def settings_of(config: Config, stages: Collection[str]) -> dict[str, Any]:
    """All settings that affect the result of one of `stages`, as plain values by ``section.key``."""
    return _chosen(config, lambda declared: not declared.stages.isdisjoint(stages))


def settings_of_plan(config: Config) -> dict[str, Any]:
    """All settings that the privacy plan is made from, as plain values by ``section.key``."""
    return _chosen(config, lambda declared: declared.planned)


def _chosen(config: Config, wanted: Callable[[Effect], bool]) -> dict[str, Any]:
    flat = dict(_flat(config.model_dump(mode="json"), ""))
    return {key: flat[key] for key, found in effects().items() if wanted(found)}


def _effects(model: type[Section], prefix: str) -> Iterator[tuple[str, Effect]]:
    for name, field in model.model_fields.items():
        if (nested := _section(field)) is not None:
            yield from _effects(nested, f"{prefix}{name}.")
        else:
            declared: Any = field.json_schema_extra or model.affects
            if not isinstance(declared, dict):
                raise TypeError(f"{prefix}{name}: it is not declared which stages it affects")
            yield f"{prefix}{name}", Effect(**{**declared, "stages": frozenset(declared["stages"])})


def _section(field: FieldInfo) -> type[Section] | None:
    """The section that a field always holds; one that may be missing, or one of many, is a plain value."""
    found = field.annotation
    return found if isinstance(found, type) and issubclass(found, Section) else None


def _flat(tree: dict, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in effects():
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
