"""Public stages that several runs have in common are done once, and kept in the folder `run.shared`.

Only what depends on public images alone is kept or taken (`Config.public_stages`); the selection and all that
follows from it depend on the sensitive set, and each run makes its own. Entries are named by a digest of
everything that their content depends on.
"""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import torch

from privimage import __version__
from privimage.config import Config
from privimage.config.effects import settings_of
from privimage.config.stages import upstream
from privimage.data import store
from privimage.data.private_store import stamp
from privimage.distributed.world import World
from privimage.runs import starters
from privimage.storage.files import write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say


def settings_of_stage(stage: str, config: Config) -> dict:
    """All settings that the result of a public stage depends on, as plain values.

    Of the method, the generator alone: methods that pretrain the same share it.
    """
    stages = upstream(stage, config.stages)
    settings = {key: value for key, value in settings_of(config, stages).items() if key != "method"}
    return settings | ({"generator": config.spec.generator} if "pretrain" in stages else {})


def name_of(stage: str, config: Config, **more: object) -> str:
    """The stage and a digest of its settings, and of what `more` its result depends on."""
    tree = {"settings": settings_of_stage(stage, config), **more}
    return f"{stage}-{hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:24]}"


def adopt(stage: str, config: Config, run: RunDir, world: World) -> bool:
    """Take over a public stage that another run has finished, unless this run has begun it."""
    shared = _place(stage, config, run, world)
    folder = run.path / stage
    if shared is None or not shared.is_dir() or folder.exists():
        return False
    # Linked aside, then renamed: a killed run leaves no half stage behind.
    part = run.path / f".{stage}.part"
    shutil.rmtree(part, ignore_errors=True)
    _link_tree(shared / "stage", part)
    if (shared / "curves").is_dir():
        _link_tree(shared / "curves", run.tensorboard / stage)
    record = json.loads((part / "done.json").read_text())
    write_json(part / "done.json", record | {"shared": str(shared)})
    part.rename(folder)
    say(f"{stage}: done before by another run, taken from {shared}")
    return True


def keep(stage: str, config: Config, run: RunDir, world: World) -> None:
    """Keep a finished public stage for other runs; the first one wins."""
    shared = _place(stage, config, run, world)
    if shared is None or shared.exists():
        return
    # A private name per process; the rename fails for all but the first.
    part = shared.with_name(f".{shared.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _link_tree(run.path / stage, part / "stage")
        if (run.tensorboard / stage).is_dir():
            _link_tree(run.tensorboard / stage, part / "curves")
        part.rename(shared)
    except OSError as error:
        if not shared.is_dir():
            say(f"{stage}: could not be kept in {shared} for other runs ({error.strerror}); this run goes on")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _place(stage: str, config: Config, run: RunDir, world: World) -> Path | None:
    """Where a stage of this run is kept.

    None for one that may not be shared, and where nothing is to be shared.
    """
    if config.run.shared is None or stage not in config.public_stages:
        return None
    # ranks draw their own augmentations and noise, and sums on another device or version are rounded
    # otherwise
    made = {
        "ranks": world.size,
        "device": world.device.type,
        "torch": torch.__version__,
        "privimage": __version__,
    }
    images = (
        _original(config.data.public.path) if stage == "prepare" else store.verify(run.public_store).sha256
    )
    begun = starters.digests(config, stage)
    more = {"begun": begun} if begun else {}
    return config.run.shared / name_of(stage, config, made=made, images=images, **more)


def _original(path: Path | None) -> list:
    """The public set as it lies on disk, as far as it can be told without reading it."""
    return [] if path is None else [str(path.resolve()), stamp(path)]


def _link_tree(source: Path, destination: Path) -> None:
    """Copy a tree, by hard links where the file system has them; runs replace files, never rewrite them."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, destination, copy_function=link, dirs_exist_ok=True)
