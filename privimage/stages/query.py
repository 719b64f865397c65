"""Train the semantic query function: a ResNet on the public labels (METHOD: SGD, cosine schedule, best validation accuracy)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from privimage.config import Config
from privimage.curves import Curves
from privimage.data import store
from privimage.data.stream import PublicStream
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.models.edm import to_unit
from privimage.models.resnet import classifier
from privimage.progress import Progress
from privimage.rundir import RunDir


def run(config: Config, run: RunDir, world: World) -> dict:
    """Train on the public set, keep the weights with the best accuracy on its held-out part.

    Writes query/network.pt and returns the best validation accuracy in percent.
    """
    settings, prepared = config.query, run.require("prepare")
    path, classes = run.public_store, prepared["classes"]
    labels = store.labels(path)
    train, held_out = split(len(labels), settings.validation_fraction, config.runtime.seed)
    batch_size = -(-min(settings.batch_size, len(train)) // world.size)
    torch.manual_seed(config.runtime.seed)
    network = classifier(settings.network, config.data.channels, len(classes)).to(world.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    devices = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, device_ids=devices) if world.size > 1 else network

    file, best_file = run.stage("query") / "checkpoint.pt", run.stage("query") / "network.pt"
    step, best = 0, -1.0
    if (state := checkpoint.load(file, world.device)) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best = state["step"], state["best"]
    validation = store.read(path, held_out[world.rank :: world.size])
    stream = PublicStream(path, train, labels[train], batch_size, world.rank, world.size, world.device, config.runtime.seed, config.data.workers)
    curves = Curves(run.tensorboard, "query", step, world.is_main)
    bf16 = config.runtime.precision == "bf16"
    with Progress("query", settings.steps, step, world.is_main) as bar:
        for images, targets in stream.batches(step):
            if step == settings.steps:
                break
            network.train()
            with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                logits = wrapped(_augmented(to_unit(images), settings.flip, config.runtime.seed, step, world))
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            bar.advance()
            wanted = stop.agreed(world)
            if step % settings.checkpoint_every == 0 or step == settings.steps or wanted:
                accuracy = _accuracy(network, validation, labels[held_out[world.rank :: world.size]], world)
                curves.scalars(step, {"loss": loss.item(), "validation accuracy": accuracy, "learning rate": float(schedule.get_last_lr()[0])})
                if world.is_main:
                    if accuracy > best:
                        checkpoint.save(best_file, {"network": network.state_dict(), "accuracy": accuracy})
                    best = max(best, accuracy)
                    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                    checkpoint.save(file, state | {"step": step, "best": best})
                best = world.broadcast_object(best)
            if wanted and step < settings.steps:
                curves.close()
                raise Stopped(f"query: saved at step {step} of {settings.steps}")
    curves.close()
    return {"images": settings.steps * batch_size * world.size, "validation_accuracy": best}


def split(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed random division of the public set into indices to train on and indices to validate on."""
    order = np.random.default_rng([seed, 1]).permutation(count)
    held_out = max(1, int(count * fraction))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _augmented(images: Tensor, flip: bool, seed: int, step: int, world: World) -> Tensor:
    if not flip:
        return images
    generator = torch.Generator().manual_seed(hash((seed, step, world.rank)) & 0xFFFFFFFF)
    flipped = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


@torch.no_grad()
def _accuracy(network: nn.Module, images: np.ndarray, labels: np.ndarray, world: World) -> float:
    """Percent of all ranks' validation images that are classified right."""
    network.eval()
    right = 0.0
    for start in range(0, len(images), 512):
        batch = torch.from_numpy(images[start : start + 512]).to(world.device)
        targets = torch.from_numpy(labels[start : start + 512]).to(world.device)
        right += (network(to_unit(batch)).argmax(1) == targets).sum().item()
    totals = world.all_reduce_(torch.tensor([right, float(len(images))], device=world.device))
    return round((100 * totals[0] / totals[1]).item(), 3)
