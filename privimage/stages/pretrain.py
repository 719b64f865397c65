"""Pretrain the generator on the selected public images, labelled by sensitive class, or on all of them."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from privimage.config import Config
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.families import pretrained_family, starter
from privimage.privacy.account import Behind, merged
from privimage.stages.public_set import pretraining_set, public_labels, public_stream
from privimage.stages.training import Schedule, Watched, train
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Train the method's family on the stream of public images.

    Writes pretrain/weights.pt with `raw` and `ema` weights, the number of classes they know, and the charges
    behind the selection.
    """
    settings = config.pretrain
    indices, labels, n_classes = pretraining_set(config, run_dir, world)
    behind = _charges(config, run_dir, world)
    batch_size = -(-settings.batch_size // world.size)
    start = _start(config, run_dir, world, (indices, labels, n_classes))
    training = pretrained_family(config).public_training(config, n_classes, world, start)
    stream = public_stream(config, run_dir, world, indices, labels, batch_size, "pretraining stream")

    def steps(first: int) -> Iterator[None]:
        for step, batch in enumerate(stream.batches(first), first):
            training.step(*batch, step)
            yield

    schedule = Schedule(
        settings.steps, batch_size * world.size, settings.log_every, settings.checkpoint_every
    )
    watched = Watched(config.to_yaml(), config.runtime.profile, lambda: stream.waited, training.operations)
    train("pretrain", schedule, training, steps, run_dir, world, watched)
    if world.is_main:
        checkpoint.save(
            run_dir.stage("pretrain") / "weights.pt",
            training.weights() | {"n_classes": n_classes, "charges": behind},
        )
        (run_dir.stage("pretrain") / "checkpoint.pt").unlink(missing_ok=True)
    return {
        "images": settings.steps * batch_size * world.size,
        "selected": len(indices),
        "n_classes": n_classes,
    }


def _start(
    config: Config, run_dir: RunDir, world: World, selected: tuple[np.ndarray, np.ndarray, int]
) -> dict[str, Tensor] | None:
    """The weights of `pretrain.start_from` for the classes of `selected` (see `pretraining_set`)."""
    if config.pretrain.start_from is None:
        return None
    begun = starter.read(config.pretrain.start_from, "diffusion", "pretrain.start_from", world)
    public, (indices, labels, n_classes) = public_labels(run_dir), selected
    # Images of each class by the starter's name of their public class, where it knows it.
    number = {name: place for place, name in enumerate(begun.classes)}
    of_starter = np.array([number.get(name, -1) for name in public.names])[public.of_images[indices]]
    shares = np.zeros((n_classes, len(begun.classes)))
    if n_classes:
        np.add.at(shares, (labels[of_starter >= 0], of_starter[of_starter >= 0]), 1)
    if world.is_main:
        known = f", {np.count_nonzero(shares.sum(1))} of {n_classes} classes known" if n_classes else ""
        say(f"pretrain: begins with {begun.described}{known}")
    return starter.denoiser_weights(begun, shares)


def _charges(config: Config, run_dir: RunDir, world: World) -> Behind:
    """The charges behind every selection that this stage has ever trained on, by stage.

    None for a method without a query.
    """
    if config.spec.pretraining != "selected":
        return {}
    # A selection may be replaced while this stage is unfinished. The weights then depend on both, and so on
    # both charges.
    path = run_dir.stage("pretrain") / "charges.json"
    if world.is_main:
        before = read_json(path) if path.exists() else {}
        write_json(
            path,
            merged(
                before, {"select": np.load(run_dir.stage("select") / "selection.npz")["charges"].tolist()}
            ),
        )
    return world.broadcast_object(read_json(path) if world.is_main else None)
