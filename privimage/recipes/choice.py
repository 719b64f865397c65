"""A value for a setting that was left at `auto`, and configurations with such values."""

from dataclasses import dataclass
from typing import Any

from privimage.config import Config, parse


@dataclass(frozen=True)
class Choice:
    """A value, and why, in a few words."""

    value: Any
    why: str


Choices = dict[str, Choice]  # by ``section.key``


def is_auto(value: object) -> bool:
    """Whether a setting is left to be chosen."""
    return value == "auto"


def still_open(config: Config, choices: Choices) -> Choices:
    """Those of settings that are `auto`."""
    tree = config.model_dump(mode="json")
    return {key: choice for key, choice in choices.items() if is_auto(_at(tree, key))}


def _at(tree: dict, key: str) -> Any:
    section, name = key.split(".")
    return tree[section][name]


def applied(config: Config, choices: Choices) -> Config:
    """The configuration with chosen values. Raises UserError for one that is out of range."""
    tree = config.model_dump(mode="json")
    for key, choice in choices.items():
        section, name = key.split(".")
        tree[section][name] = choice.value
    return parse(tree, "recipe")
