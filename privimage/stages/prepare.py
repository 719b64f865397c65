"""Write the public set into a store of the run's shape, once."""

from privimage.config import Config
from privimage.data import beton, store
from privimage.data.request import ONE_CLASS
from privimage.data.sources import form, public_source
from privimage.distributed.world import World
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Write prepare/public.beton (or .npy), or check the .beton that the configuration names.

    Returns where it is (seen from prepare/), its count and its classes, one if it is unlabelled. Raises
    UserError for whatever is wrong with the public set.
    """
    data = config.data
    # A store that was prepared elsewhere is used in place; it is checked, never copied.
    if data.public.kind == "beton" and data.public.path is not None:
        path, place = data.public.path, str(data.public.path.resolve())
        sidecar = store.verify(path)
    else:
        place = f"public.{_format(config, world)}"
        path = run_dir.stage("prepare") / place
        sidecar = store.write(
            public_source(config), path, form(config), data.workers, data.public.skip_bad, world
        )
    classes = sidecar.classes if data.public.labelled else ONE_CLASS
    return {"images": sidecar.count, "count": sidecar.count, "store": place, "classes": list(classes)}


def _format(config: Config, world: World) -> str:
    if config.data.store != "auto":
        return config.data.store
    missing = beton.ffcv_missing()
    if missing and world.is_main:
        say(
            f"prepare: {missing}; the public set is kept as a memory-mapped .npy instead, which is slower, "
            f"and larger from {store.JPEG_FROM} pixels a side on"
        )
    return "npy" if missing else "beton"
