"""The typed settings of a run: sections with their ranges, methods, stages, and what each setting affects.

The three names below are imported when they are first used, so that `privimage --help`, which needs the table
of stages alone, does not wait for the readers of YAML.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from privimage.config.settings import Config, load, parse

__all__ = ["Config", "load", "parse"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from privimage.config import settings

    return getattr(settings, name)
