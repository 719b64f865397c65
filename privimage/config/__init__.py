"""The settings of a run: a typed tree, read from YAML and overrides."""

from privimage.config.settings import Config, load, parse

__all__ = ["Config", "load", "parse"]
