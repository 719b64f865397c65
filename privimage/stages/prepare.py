"""Bring the public set into a store of the run's resolution, once."""

from pathlib import Path

from privimage.config import Config
from privimage.data import store
from privimage.data.glyphs import glyph_source
from privimage.data.sources import open_source
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.progress import say
from privimage.rundir import RunDir


def run(config: Config, run: RunDir, world: World) -> dict:
    """Write prepare/public.beton (or .npy), or check the .beton that the configuration names.

    Returns its path, count and classes. Raises UserError for a store of another shape than `data.resolution` and `data.channels`.
    """
    data = config.data
    if data.public.kind == "beton":
        if data.public.path is None:
            raise UserError("data.public.path: kind beton needs a path")
        path = data.public.path
        sidecar = store.verify(path)
        if sidecar.shape != (data.channels, data.resolution, data.resolution):
            raise UserError(f"{path}: holds images of shape {sidecar.shape}, data.channels and data.resolution ask for {(data.channels, data.resolution, data.resolution)}")
    else:
        path = run.stage("prepare") / f"public.{_format(config)}"
        if world.is_main:
            source = glyph_source(data.resolution) if data.public.kind == "glyphs" else open_source(data.public.kind, data.public.path)
            store.write(source, path, data.resolution, data.channels, data.workers)
        world.barrier()
        sidecar = store.verify(path)
    return {"images": sidecar.count, "count": sidecar.count, "store": str(Path(path).resolve()), "classes": list(sidecar.classes)}


def _format(config: Config) -> str:
    if config.data.store != "auto":
        return config.data.store
    missing = store.ffcv_missing()
    if missing:
        say(f"prepare: {missing}; the public set is kept as a memory-mapped .npy instead (slower, otherwise the same)")
    return "npy" if missing else "beton"
