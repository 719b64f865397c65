"""`privimage doctor`: everything that can be found out about a run before it is begun, as one table."""

from privimage.config import Config
from privimage.distributed.world import ALONE, connect
from privimage.errors import UserError
from privimage.runs.doctor import diagnose


def run(config: Config) -> int:
    """Print the diagnosis. Returns 0 if there is no mistake, 2 otherwise. Works under every launcher.

    Raises UserError where the ranks of a launcher cannot connect.
    """
    error = ""
    try:
        world = connect(config.runtime)
    except UserError as problem:
        # A single process can look at everything else without its device.
        if not str(problem).startswith("runtime.device"):
            raise
        world, error = ALONE, str(problem)
    try:
        found = diagnose(config, world, error)
    except (Exception, KeyboardInterrupt) as problem:
        return world.fail(problem)
    if world.is_main:
        found.show()
    world.close()
    return 2 if found.mistakes else 0
