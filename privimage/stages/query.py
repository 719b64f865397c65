"""Train the semantic query function: a ResNet on the public labels, or without labels by contrast.

Its features are then clustered where that is asked for. SGD, cosine schedule, the weights of the best
validation accuracy (paper, Table 7).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data import store
from privimage.distributed import checkpoint, told
from privimage.distributed.blocks import in_blocks
from privimage.distributed.engine import DDPEngine
from privimage.distributed.microbatch import block_size, fitting_images
from privimage.distributed.world import World
from privimage.families import starter
from privimage.families.base import image_shape
from privimage.models.edm import to_unit
from privimage.models.semantic import FITTED, Task, centroids_of
from privimage.stages.public_set import (
    Semantics,
    clusters_path,
    load_query,
    public_labels,
    public_stream,
    query_network,
    query_task,
)
from privimage.stages.training import Schedule, Watched, train
from privimage.storage.files import write_arrays
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Train on the public set, keep the weights with the best accuracy on its held-out part, and make
    clusters if they are wanted.

    Writes query/network.pt, and query/clusters.npz (see `clusters_path`). Returns the best validation
    accuracy in percent and the names of the clusters.
    """
    settings, public = config.query, public_labels(run_dir)
    record = _trained(config, run_dir, world, public)
    if settings.semantics == "clusters":
        record["clusters"] = _clustered(config, run_dir, world, public)
    return record


def _trained(config: Config, run_dir: RunDir, world: World, public: Semantics) -> dict:
    """Train the network by the task that the public set allows; returns the best validation accuracy."""
    settings, labels = config.query, public.of_images
    train_indices, held_out = split(
        len(labels), settings.validation_fraction, public_seed(config, "query held-out images")
    )
    # Held-out images choose the weights that are kept; they are never trained on.
    training = QueryTraining(config, run_dir, world, public, held_out)
    if settings.start_from is not None and not told.exists(run_dir.stage("query") / "checkpoint.pt", world):
        training.scalars()  # what it begins with may stay the best
    # The global batch is shared out, rounded up.
    batch_size = -(-min(settings.batch_size, len(train_indices)) // world.size)
    stream = public_stream(
        config, run_dir, world, train_indices, labels[train_indices], batch_size, "query stream"
    )

    def steps(first: int) -> Iterator[None]:
        for step, (images, targets) in enumerate(stream.batches(first), first):
            training.step(images, targets, step)
            yield

    watched = Watched(profile=config.runtime.profile, waited=lambda: stream.waited)
    # Validation and checkpoints coincide, so that the best network and its accuracy are never out of step.
    every, images = settings.checkpoint_every, batch_size * world.size
    train("query", Schedule(settings.steps, images, every, every), training, steps, run_dir, world, watched)
    return {"images": settings.steps * images, "validation_accuracy": training.best}


class QueryTraining:
    """SGD with a cosine schedule, and the network of the best validation so far in query/network.pt."""

    def __init__(
        self, config: Config, run_dir: RunDir, world: World, public: Semantics, held_out: np.ndarray
    ):
        """`held_out` are the indices of the public images to validate on."""
        self.config, self.world, self.task = config, world, query_task(config, public)
        torch.manual_seed(public_seed(config, "query network"))
        # Channels last: a tenth faster on CPUs, and the layout of a GPU's bf16 convolutions.
        network = query_network(config, public)
        if config.query.start_from is not None:
            begun = starter.read(config.query.start_from, "query", "query.start_from", world)
            network.load_state_dict(starter.classifier_weights(begun, network, public.names))
            if world.is_main:
                say(f"query: begins with {begun.described}")
        network = network.to(world.device)
        self.network = network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            lr=config.query.learning_rate,
            momentum=0.9,
            weight_decay=5e-4,
            fused=world.device.type == "cuda" or None,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.query.steps)
        bf16 = config.runtime.precision == "bf16"
        self.engine = DDPEngine(self.network, self.optimizer, world, bf16)

        def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return self.task.loss(network, images, labels, torch.Generator().manual_seed(0))

        # Batch statistics are those of as many images as have room at once.
        own, precision = -(-config.query.batch_size // world.size), config.runtime.precision
        self.at_once = fitting_images(own, image_shape(config), self.network, loss, precision, world, "query")
        # Each rank validates on its share of the held-out images, which stay in memory.
        share = held_out[world.rank :: world.size]
        self.validation, self.labels = store.read(run_dir.public_store, share), public.of_images[share]
        self.best_file, self.best = run_dir.stage("query") / "network.pt", -1.0
        self.loss = torch.zeros((), device=world.device)

    def step(self, images: Tensor, targets: Tensor, step: int) -> None:
        """One update by this rank's images uint8 (B, C, H, W) and their labels (B,)."""
        self.network.train()
        # Augmentation is a function of (step, rank), so that a resumed run repeats itself.
        generator = torch.Generator().manual_seed(
            public_seed(self.config, "query augmentation", step, self.world.rank)
        )

        def loss(piece: slice) -> Tensor:
            return self.task.loss(self.engine.forward, to_unit(images[piece]), targets[piece], generator)

        self.loss = self.engine.update(loss, len(images), self.at_once)
        self.schedule.step()

    def scalars(self) -> dict[str, float]:
        """Validate, and keep the network if it is the best so far."""
        accuracy = _accuracy(self.task, self.network, self.validation, self.labels, self.world)
        if accuracy > self.best and self.world.is_main:
            checkpoint.save(self.best_file, {"network": self.network.state_dict(), "accuracy": accuracy})
        self.best = max(self.best, accuracy)
        return {
            "loss": self.loss.item(),
            "validation accuracy": accuracy,
            "learning rate": float(self.schedule.get_last_lr()[0]),
        }

    def state(self) -> dict[str, Any]:
        """See `Trained`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        """See `Trained`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = state["best"]

    def samples(self) -> None:
        """It makes no images."""


def split(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed random division of `count` public images into sorted indices (n,) to train on and to validate
    on.
    """
    # Sorted indices read the store front to back.
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, int(count * fraction))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@torch.no_grad()
def _accuracy(task: Task, network: nn.Module, images: np.ndarray, labels: np.ndarray, world: World) -> float:
    """Percent of all ranks' validation images that the network gets right."""
    network.eval()
    right = 0.0
    # Blocks bound the memory of validation.
    size = block_size(images.shape, 512)
    for start in range(0, len(images), size):
        batch = to_unit(torch.from_numpy(images[start : start + size]).to(world.device))
        right += task.right(network, batch, torch.from_numpy(labels[start : start + size]).to(world.device))
    # The number of images differs between ranks, so sums are added, not percentages.
    totals = world.all_reduce_(torch.tensor([right, float(len(images))], device=world.device))
    return round((100 * totals[0] / totals[1]).item(), 3)


@torch.no_grad()
def _clustered(config: Config, run_dir: RunDir, world: World, public: Semantics) -> list[str]:
    """Cluster the public set by k-means on the trained network's features; returns the clusters' names."""
    path, count = run_dir.public_store, len(public.of_images)
    seed = public_seed(config, "clusters") % 2**32  # scikit-learn takes 32 bits
    query = load_query(config, run_dir, world)
    # The same sample on all ranks.
    seen = np.sort(np.random.default_rng(seed).permutation(count)[:FITTED])
    stopped = "query: the network is kept, clusters are made again"

    def pixels(indices: np.ndarray) -> Tensor:
        return torch.from_numpy(store.read(path, indices))

    def embed(block: Tensor) -> Tensor:
        return query.features(to_unit(block))

    def nearest_to(block: Tensor) -> Tensor:
        return query(to_unit(block)).argmax(1, keepdim=True)

    width, shape = query.network.head.in_features, image_shape(config)
    # K-means sees a sample of the set; every image is then assigned to its nearest centroid.
    features = in_blocks(
        len(seen),
        shape,
        width,
        torch.float32,
        lambda start, end: pixels(seen[start:end]),
        embed,
        world,
        stopped,
    )
    centroids = world.broadcast_object(
        centroids_of(features.cpu().numpy(), config.query.clusters, seed) if world.is_main else None
    )
    query.centroids = torch.from_numpy(centroids).to(world.device)
    nearest = in_blocks(
        count,
        shape,
        1,
        torch.int64,
        lambda start, end: pixels(np.arange(start, end)),
        nearest_to,
        world,
        stopped,
    )
    clusters = nearest.flatten().cpu().numpy()
    if world.is_main:
        write_arrays(clusters_path(run_dir), {"centroids": centroids, "clusters": clusters})
    return _names(clusters, config.query.clusters, public)


def _names(clusters: np.ndarray, count: int, public: Semantics, shown: int = 2) -> list[str]:
    """ "cluster 7", and where there are labels the most frequent of its images: "cluster 7 (tabby/lynx)"."""
    names = []
    for number in range(count):
        # Named by the two most frequent labels of its images, for people only.
        held = np.bincount(public.of_images[clusters == number], minlength=len(public.names))
        most = [public.names[i].split(",")[0] for i in np.argsort(-held, kind="stable")[:shown] if held[i]]
        names.append(f"cluster {number}" + (f" ({'/'.join(most)})" if len(public.names) > 1 and most else ""))
    return names
