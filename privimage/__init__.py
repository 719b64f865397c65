"""PrivImage: differentially private image synthesis, from a laptop to a cluster.

The Python interface is described in `privimage.api`. Its names are imported when they are first used, so that
`privimage --help` does not wait for torch.
"""

from typing import TYPE_CHECKING

from privimage.errors import PrivImageError, Stopped, UserError

if TYPE_CHECKING:
    from privimage.api import load_config, open_release, plan, run

__version__ = "0.1.0"
__all__ = ["PrivImageError", "Stopped", "UserError", "load_config", "open_release", "plan", "run"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from privimage import api

    return getattr(api, name)
