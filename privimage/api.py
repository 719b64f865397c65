"""What the command line does, from Python.

::

    import privimage

    config = privimage.load_config("configs/quickstart.yaml", ["run.dir=runs/mine"])
    print(privimage.plan(config))
    privimage.run(config)
    release = privimage.open_release("runs/mine")
    images, labels = release.sample(100, seed=1)

All of these raise `privimage.PrivImageError`: `UserError` for a mistake in the settings or the data, whose
text is one line that names the key or the file, and `Stopped` where a stop was requested and the state is
saved.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from privimage.config import Config, load
from privimage.errors import Stopped

if TYPE_CHECKING:
    from privimage.commands.plan import RunPlan
    from privimage.runs.release import Release


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of settings and apply overrides, each ``section.key=value``.

    Raises UserError for a missing or malformed file, an unknown key, or a value out of range.
    """
    return load(path, overrides)


def plan(config: Config) -> "RunPlan":
    """What a run promises and what it will cost, without touching data; `print` shows it.

    Raises UserError if the promise cannot be kept, or if the configuration does not state the number
    of images.
    """
    from privimage.commands.plan import plan_run

    return plan_run(config)


def run(config: Config, stages: Sequence[str] = ()) -> Path:
    """Run `stages`, or all stages of the method; returns the run directory. Finished stages are skipped.

    From then on this process writes files that only its user can read (its umask is 077), and no core dumps.
    Under a launcher all ranks call it together. Handlers of signals stay as they are: a stop is requested by
    setting `privimage.distributed.preemption.stop.requested`. Raises UserError and Stopped.
    """
    from privimage.distributed.world import connect
    from privimage.runs import pipeline

    world = connect(config.runtime)
    try:
        return pipeline.execute(config, stages, world).path
    except Stopped:
        raise  # on all ranks, with the state saved
    except BaseException as error:
        if world.size > 1:
            world.fail(error)  # ends all ranks, which would wait for this one
        raise
    finally:
        world.close()


def open_release(path: str | Path) -> "Release":
    """The release of a run directory, or a folder `release/` by itself. Raises UserError if it is none."""
    from privimage.runs.release import Release

    return Release(Path(path))
