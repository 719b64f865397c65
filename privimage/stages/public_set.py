"""The prepared public set as stages see it: labels, categories, and the trained query function."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data import store
from privimage.data.stream import PublicStream
from privimage.distributed import checkpoint, told
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.models.resnet import Classifier, classifier
from privimage.models.semantic import Labels, SemanticQuery, Task, Views
from privimage.storage.rundir import RunDir


@dataclass(frozen=True)
class Semantics:
    """Categories of the public images: their names, and the category of each image, int64 (N,)."""

    names: tuple[str, ...]
    of_images: np.ndarray
    kind: str  # what the names are, for messages


def public_stream(
    config: Config,
    run: RunDir,
    world: World,
    indices: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    purpose: str,
) -> PublicStream:
    """Batches of `batch_size` images per rank at `indices` of the prepared set, with `labels`.

    The order follows from `runtime.seed` and the `purpose`. All ranks call it together. Raises UserError for
    a store that is missing or altered.
    """
    workers = world.cores if config.data.workers == "auto" else config.data.workers
    path = store.at_hand(run.public_store, config.data.scratch, world)
    seed = public_seed(config, purpose)
    return PublicStream(
        path, indices, labels, batch_size, world.rank, world.size, world.device, seed, workers
    )


def public_labels(run: RunDir) -> Semantics:
    """The labels of the public set; a single one for all images of an unlabelled set.

    Raises UserError if `prepare` is not finished.
    """
    # An unlabelled store may hold labels all the same; they are not looked at.
    classes, labels = run.require("prepare")["classes"], store.labels(run.public_store)
    return Semantics(tuple(classes), labels if len(classes) > 1 else np.zeros_like(labels), "public classes")


def public_semantics(config: Config, run: RunDir, world: World) -> Semantics:
    """What sensitive images vote for: the public labels, or the clusters that `query` has made.

    All ranks call it together. Raises UserError if a stage that it needs is not finished.
    """
    if config.query.semantics == "labels":
        return public_labels(run)
    return Semantics(tuple(run.require("query")["clusters"]), _clusters(run, world)["clusters"], "clusters")


def pretraining_set(config: Config, run_dir: RunDir, world: World) -> tuple[np.ndarray, np.ndarray, int]:
    """Indices int64 (n,) of the public images to train on, their labels int64 (n,), and the number of classes
    (0: no labels).

    Raises UserError if the selection kept no image.
    """
    if config.spec.pretraining == "all":
        public = public_labels(run_dir)
        return (
            np.arange(len(public.of_images)),
            public.of_images,
            len(public.names) if len(public.names) > 1 else 0,
        )
    run_dir.require("select")
    selection = told.arrays(run_dir.stage("select") / "selection.npz", world)
    labels = selection["assignment"][public_semantics(config, run_dir, world).of_images]
    indices = np.flatnonzero(labels >= 0)
    if not len(indices):
        raise UserError(
            f"{run_dir.stage('select') / 'selection.npz'}: the selection kept no public image; raise "
            "select.per_class"
        )
    return indices, labels[indices], len(selection["counts"]) if config.data.sensitive.labelled else 0


def clusters_path(run: RunDir) -> Path:
    """Where `query` keeps `centroids` float32 (clusters, features) and `clusters` int64 (N,), that of each
    public image.
    """
    return run.path / "query" / "clusters.npz"


def query_task(config: Config, public: Semantics) -> Task:
    """The training task of the query function: the public labels, or contrastive views where there is one
    class.
    """
    return Labels(config.data.flip, len(public.names)) if len(public.names) > 1 else Views(config.data.flip)


def query_network(config: Config, public: Semantics) -> Classifier:
    """A fresh network for that task."""
    return classifier(config.query.network, config.data.channels, query_task(config, public).outputs)


def load_query(config: Config, run: RunDir, world: World) -> SemanticQuery:
    """The trained query function, without centroids. Raises UserError if it is not there."""
    path = run.stage("query") / "network.pt"
    network = query_network(config, public_labels(run))
    network.load_state_dict(checkpoint.required(path, "query", world)["network"])
    return SemanticQuery(network).to(world.device).eval()


def load_scores(config: Config, run: RunDir, world: World) -> SemanticQuery:
    """The trained query function with a score for each of `public_semantics`.

    Raises UserError if a part of it is not there.
    """
    # With clusters, scores are similarities to their centres.
    query = load_query(config, run, world)
    if config.query.semantics == "clusters":
        query.centroids = torch.from_numpy(_clusters(run, world)["centroids"]).to(world.device)
    return query


def _clusters(run: RunDir, world: World) -> dict[str, np.ndarray]:
    path = clusters_path(run)
    try:
        file = told.arrays(path, world)
        return {name: file[name] for name in ("centroids", "clusters")}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        raise UserError(
            f"{path}: missing or damaged; delete the folder {path.parent} to have it made again"
        ) from None
