"""A value for a setting that was left at `auto`, and configurations with such values."""

from dataclasses import dataclass
from typing import Any

from privimage.config import Config, parse
from privimage.config.stages import ON_REQUEST

# Settings that the rules choose. Others that may be "auto" (precision, workers ...) are resolved by what
# reads them.
CHOSEN = {
    "model": ("width", "multipliers", "attention"),
    "query": ("network", "batch_size", "steps", "learning_rate"),
    "select": ("per_image", "per_class", "max_rise"),
    "pretrain": ("batch_size", "steps", "learning_rate"),
    "warm": ("max_rise", "steps"),
    "classify": ("max_rise",),
    "finetune": ("logical_batch_size", "steps", "noise_copies", "max_grad_norm", "learning_rate"),
    "synthesize": ("samples",),
    "evaluate": ("cnn_epochs", "cnn_batch_size", "fidelity_samples", "before"),
}


@dataclass(frozen=True)
class Choice:
    """A value, and why, in a few words."""

    value: Any
    why: str


Choices = dict[str, Choice]  # by ``section.key``


def is_auto(value: object) -> bool:
    """Whether a setting is left to be chosen."""
    return value == "auto"


def automatic(config: Config) -> list[str]:
    """The settings that are still to be chosen, by ``section.key``; of stages `ON_REQUEST` if they run."""
    return [
        f"{section}.{name}"
        for section, names in CHOSEN.items()
        for name in names
        if is_auto(getattr(getattr(config, section), name))
        and (section not in ON_REQUEST or section in config.stages)
    ]


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
