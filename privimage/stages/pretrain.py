"""Pretrain the generator on public images: those that were selected, with the sensitive class as label, or all of them."""

from pathlib import Path

import numpy as np

from privimage.config import Config
from privimage.curves import Curves, memory
from privimage.data.stream import PublicStream
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.families import family
from privimage.progress import Progress
from privimage.public_set import public_labels, public_semantics
from privimage.rundir import RunDir


def run(config: Config, run: RunDir, world: World) -> dict:
    """Train the method's family on the stream of public images.

    Writes pretrain/weights.pt with `raw` and `ema` weights and the number of classes they know.
    """
    settings, seed = config.pretrain, config.runtime.seed
    path, indices, labels, n_classes = pretraining_set(config, run)
    batch_size = -(-settings.batch_size // world.size)
    training = family(config).public_training(config, n_classes, world)
    file, step = run.stage("pretrain") / "checkpoint.pt", 0
    if (state := checkpoint.load(file, world.device)) is not None:
        training.load(state)
        step = state["step"]
    stream = PublicStream(path, indices, labels, batch_size, world.rank, world.size, world.device, seed, config.data.workers)
    curves = Curves(run.tensorboard, "pretrain", step, world.is_main)
    curves.text("configuration", config.to_yaml())
    with Progress("pretrain", settings.steps, step, world.is_main) as bar:
        for images, targets in stream.batches(step):
            if step == settings.steps:
                break
            training.step(images, targets, step)
            step += 1
            bar.advance()
            wanted = stop.agreed(world)
            if step % settings.log_every == 0:
                shown = {"images per second": bar.rate * batch_size * world.size, "memory": memory(world.device), "learning rate": settings.learning_rate}
                curves.scalars(step, training.losses() | shown)
            if step % settings.checkpoint_every == 0 or wanted:
                state = training.state() | {"step": step}
                curves.flush()
                if world.is_main:
                    checkpoint.save(file, state)
                    curves.images(step, "samples", training.samples())
            if wanted and step < settings.steps:
                curves.close()
                raise Stopped(f"pretrain: saved at step {step} of {settings.steps}")
    if world.is_main:
        curves.images(step, "samples", training.samples())
        checkpoint.save(run.stage("pretrain") / "weights.pt", training.weights() | {"n_classes": n_classes})
        file.unlink(missing_ok=True)
    curves.close()
    return {"images": settings.steps * batch_size * world.size, "selected": len(indices), "n_classes": n_classes}


def pretraining_set(config: Config, run: RunDir) -> tuple[Path, np.ndarray, np.ndarray, int]:
    """The store, the indices of its images to train on, their labels, and the number of classes of those labels (0 without labels).

    Raises UserError if the selection kept no image.
    """
    path = run.public_store
    if config.spec.pretraining == "all":
        public = public_labels(run)
        return path, np.arange(len(public.of_images)), public.of_images, len(public.names) if len(public.names) > 1 else 0
    run.require("select")
    selection = np.load(run.stage("select") / "selection.npz")
    labels = selection["assignment"][public_semantics(config, run).of_images]
    indices = np.flatnonzero(labels >= 0)
    if not len(indices):
        raise UserError(f"{run.stage('select') / 'selection.npz'}: the selection kept no public image; raise select.per_class")
    return path, indices, labels[indices], len(selection["counts"]) if config.data.sensitive.labelled else 0
