"""Pretrain the generator on public images: those that were selected, with the sensitive class as label, or all of them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.curves import Curves, memory
from privimage.data import store
from privimage.data.stream import PublicStream
from privimage.distributed import checkpoint
from privimage.distributed.engine import make_engine
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.models import build_diffusion, edm
from privimage.models.ema import EMA
from privimage.progress import Progress
from privimage.rundir import RunDir


def run(config: Config, run: RunDir, world: World) -> dict:
    """EDM's loss on the stream of public images, EMA of the weights.

    Writes pretrain/weights.pt with `raw` and `ema` weights and the number of classes they know.
    """
    settings, seed = config.pretrain, config.runtime.seed
    path, indices, labels, n_classes = pretraining_set(config, run)
    batch_size = -(-settings.batch_size // world.size)
    torch.manual_seed(seed)
    denoiser = build_diffusion(config, n_classes).to(world.device)
    engine = make_engine(config, denoiser, world)
    ema = EMA(denoiser, settings.ema_decay)
    file, step = run.stage("pretrain") / "checkpoint.pt", 0
    if (state := checkpoint.load(file, world.device)) is not None:
        engine.load(state["engine"])
        ema.load_state_dict(state["ema"])
        step = state["step"]
    stream = PublicStream(path, indices, labels, batch_size, world.rank, world.size, world.device, seed, config.data.workers)
    curves = Curves(run.tensorboard, "pretrain", step, world.is_main)
    curves.text("configuration", config.to_yaml())
    recent = torch.zeros((), device=world.device)
    with Progress("pretrain", settings.steps, step, world.is_main) as bar:
        for images, targets in stream.batches(step):
            if step == settings.steps:
                break
            losses = edm.loss(engine.forward, *_noised(images, targets, n_classes, config, step, world))
            engine.backward_and_step(losses.mean())
            ema.update()
            recent += losses.detach().mean()
            step += 1
            bar.advance()
            wanted = stop.agreed(world)
            if step % settings.log_every == 0:
                mean_loss = (world.all_reduce_(recent.clone()) / (settings.log_every * world.size)).item()
                curves.scalars(
                    step,
                    {
                        "loss": mean_loss,
                        "images per second": bar.rate * batch_size * world.size,
                        "memory": memory(world.device),
                        "learning rate": settings.learning_rate,
                    },
                )
                recent.zero_()
            if step % settings.checkpoint_every == 0 or wanted:
                state = {"engine": engine.state(), "ema": ema.state_dict(), "step": step}
                curves.flush()
                if world.is_main:
                    checkpoint.save(file, state)
                    curves.images(step, "samples", _samples(denoiser, ema, n_classes, config, world))
            if wanted and step < settings.steps:
                curves.close()
                raise Stopped(f"pretrain: saved at step {step} of {settings.steps}")
    if world.is_main:
        curves.images(step, "samples", _samples(denoiser, ema, n_classes, config, world))
        weights = {"raw": denoiser.state_dict(), "ema": ema.state_dict()["averages"], "n_classes": n_classes}
        checkpoint.save(run.stage("pretrain") / "weights.pt", weights)
        file.unlink(missing_ok=True)
    curves.close()
    return {"images": settings.steps * batch_size * world.size, "selected": len(indices), "n_classes": n_classes}


def pretraining_set(config: Config, run: RunDir) -> tuple[Path, np.ndarray, np.ndarray, int]:
    """The store, the indices of its images to train on, their labels, and the number of classes of those labels.

    Raises UserError if the selection kept no image.
    """
    prepared = run.require("prepare")
    path = Path(prepared["store"])
    public = store.labels(path)
    if config.spec.pretraining == "all":
        return path, np.arange(len(public)), public, len(prepared["classes"])
    run.require("select")
    selection = np.load(run.stage("select") / "selection.npz")
    labels = selection["assignment"][public]
    indices = np.flatnonzero(labels >= 0)
    if not len(indices):
        raise UserError(f"{run.stage('select') / 'selection.npz'}: the selection kept no public image; raise select.per_class")
    return path, indices, labels[indices], len(selection["counts"]) if config.data.sensitive.labelled else 0


def _noised(images: Tensor, labels: Tensor, n_classes: int, config: Config, step: int, world: World) -> tuple[Tensor, ...]:
    """Images in [-1, 1], labels with some dropped, noise levels and noise: the random part of a step, repeatable."""
    generator = torch.Generator(world.device).manual_seed((config.runtime.seed * 1_000_003 + step) * 4096 + world.rank)
    x = edm.to_unit(images)
    count = len(x)
    if config.pretrain.flip:
        flipped = torch.rand(count, generator=generator, device=world.device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    sigma = edm.draw_sigma(torch.randn(count, generator=generator, device=world.device))
    noise = torch.randn(x.shape, generator=generator, device=world.device)
    hidden = torch.rand(count, generator=generator, device=world.device) < config.pretrain.label_dropout
    return x, torch.where(hidden, n_classes, labels), sigma, noise


def _samples(denoiser: torch.nn.Module, ema: EMA, n_classes: int, config: Config, world: World) -> Tensor:
    """A few images from the averaged weights, for TensorBoard."""
    averaged = build_diffusion(config, n_classes).to(world.device)
    averaged.load_state_dict(denoiser.state_dict())
    ema.copy_to(averaged)
    count = 5 * min(n_classes, 10) if n_classes else 25
    generator = torch.Generator(world.device).manual_seed(config.runtime.seed)
    latents = torch.randn(count, config.data.channels, config.data.resolution, config.data.resolution, generator=generator, device=world.device)
    labels = torch.arange(count, device=world.device) % max(n_classes, 1)
    return edm.to_uint8(edm.sample(averaged, latents, labels if n_classes else None, steps=18))
