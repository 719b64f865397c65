"""Warm start: train the generator on what noisy statistics of the sensitive set tell."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.families import warmed_family
from privimage.families.base import image_shape
from privimage.families.generator import generated
from privimage.families.matching import FeatureMap
from privimage.privacy.account import Behind, merged, open_account
from privimage.privacy.mechanisms import CentralImages, WarmEmbedding
from privimage.privacy.mechanisms.embedding import embedding_of
from privimage.stages.central import central_means, enlarged, moved
from privimage.stages.embedding import embedding_sums, matched_generator
from privimage.stages.features import feature_map
from privimage.stages.moments import GaussianImages, moments
from privimage.stages.noisy_statistic import Sensitive
from privimage.stages.public_set import pretraining_set, public_stream
from privimage.stages.training import Schedule, Watched, train, weights_of
from privimage.storage.rundir import RunDir

# Images of a step: (step, indices int64 (B,) in the whole batch) -> uint8 (B, C, H, W), labels int64 (B,).
Draw = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Draw the noisy statistics of `warm.starts`, each once, and train on images that follow from them.

    Writes warm/weights.pt with `raw` and `ema` weights, the number of classes, and the charges behind them.
    Raises UserError if a statistic was drawn before and is lost.
    """
    settings = config.warm
    images = open_sensitive(config, "train", world, run_dir.sensitive)
    n_classes = len(images.classes) if config.data.sensitive.labelled else 0
    begun = None if config.spec.pretraining == "none" else "pretrain"
    pretrained, behind = weights_of(begun, run_dir, world)
    account = open_account(config, run_dir, images, world)
    account.require_known(behind, run_dir.path / "pretrain" / "weights.pt", world)
    # From here on the run sees the sensitive set through a few noisy numbers only, kept in files.
    sensitive = Sensitive(images, account, n_classes)
    draws, charges = _starts(config, run_dir, world, sensitive)
    training = warmed_family(config).warm_training(config, n_classes, world, pretrained)
    own = -(-settings.batch_size // world.size)
    places = world.rank * own + torch.arange(own, device=world.device)

    def steps(first: int) -> Iterator[None]:
        below = _public(config, run_dir, world, own, n_classes, first)
        for step in itertools.count(first + 1):
            # The starts take turns, place by place, so that each has the same share of every batch.
            parts = [draw(step, places[places % len(draws) == number]) for number, draw in enumerate(draws)]
            batch = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
            training.step(batch[0], batch[1], step, next(below, None))
            yield

    schedule = Schedule(settings.steps, own * world.size, settings.log_every, settings.checkpoint_every)
    train("warm", schedule, training, steps, run_dir, world, Watched(operations=training.operations))
    if world.is_main:
        known = {"n_classes": n_classes, "charges": merged(behind, charges)}
        checkpoint.save(run_dir.stage("warm") / "weights.pt", training.weights() | known)
        (run_dir.stage("warm") / "checkpoint.pt").unlink(missing_ok=True)
    return {"images": settings.steps * own * world.size, "starts": list(config.warm_starts)}


def _starts(config: Config, run_dir: RunDir, world: World, sensitive: Sensitive) -> tuple[list[Draw], Behind]:
    """Where the images of a step come from, one for each start, and the charges that they cost."""
    draws: list[Draw] = []
    charges: Behind = {}
    plan, folder = sensitive.account.plan, run_dir.stage("warm")
    if "moments" in config.warm_starts:
        found, drawn_moments = moments(config, run_dir, world, sensitive, folder)
        charges |= {stage: [drawn.charge] for stage, drawn in drawn_moments.items()}
        draws.append(GaussianImages(config, world, found))
    if "embedding" in config.warm_starts:
        embedding, features = plan.the(WarmEmbedding), feature_map(config, run_dir, world)
        path = folder / "embedding.npz"
        drawn = embedding_sums(config, run_dir, world, sensitive, embedding, path, features)
        charges[embedding.stage] = [drawn.charge]
        mean = embedding_of(drawn.values, embedding).mean
        draws.append(_of_embedding(config, run_dir, world, sensitive.n_classes, mean, features))
    if "central" in config.warm_starts:
        central = plan.the(CentralImages)
        drawn = central_means(config, run_dir, world, sensitive, central, folder / "central.npz")
        charges[central.stage] = [drawn.charge]
        draws.append(_of_central(config, world, sensitive.rows, drawn.values))
    return draws, charges


def _public(
    config: Config, run_dir: RunDir, world: World, own: int, n_classes: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `own` images of the public set as pretraining has seen them, after the first `first`, with
    labels; none for methods without pretraining.
    """
    if config.spec.pretraining == "none" or config.warm.sigma_min == 0:
        return
    indices, labels, _ = pretraining_set(config, run_dir, world)
    # Public labels of their own are not those of the sensitive set: such images have none.
    if config.spec.pretraining == "all":
        labels = np.full_like(labels, n_classes)
    yield from public_stream(config, run_dir, world, indices, labels, own, "warm stream").batches(first)


def _of_embedding(
    config: Config, run_dir: RunDir, world: World, n_classes: int, embedding: np.ndarray, features: FeatureMap
) -> Draw:
    """New images of the generator that matches the embedding by `features`, labels in turn."""
    trained = matched_generator(config, run_dir, world, n_classes, embedding, "warm/match", features)
    generator, draws = trained.frozen(averaged=True), ImageDraws(world.device)

    def draw(step: int, places: Tensor) -> tuple[Tensor, Tensor]:
        labels = (places + step) % max(n_classes, 1)
        return generated(generator, draws, public_seed(config, "warm images", step), places, labels), labels

    return draw


def _of_central(config: Config, world: World, rows: int, means: np.ndarray) -> Draw:
    """Central images, turned, scaled and moved at random, of noisy means (parts * rows, values)."""
    central, draws = enlarged(means, image_shape(config)).to(world.device), ImageDraws(world.device)

    def draw(step: int, places: Tensor) -> tuple[Tensor, Tensor]:
        normal = draws.normal(public_seed(config, "warm central", step), places, 5)
        labels, parts = (places + step) % rows, len(central) // rows
        part = (torch.special.ndtr(normal[:, 0]) * parts).long().clamp(max=parts - 1)
        # Rows of a statistic are parts times labels, labels last.
        return moved(central[part * rows + labels], normal[:, 1:]), labels

    return draw
