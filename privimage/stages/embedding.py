"""The noisy mean embedding of the sensitive set, and the generator that is trained towards it."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.distributed.blocks import blockwise
from privimage.distributed.world import World
from privimage.families.base import image_shape
from privimage.families.matching import MatchedGenerator
from privimage.models.edm import to_unit
from privimage.models.random_features import RandomFeatures
from privimage.privacy.mechanisms import MeanEmbedding
from privimage.privacy.mechanisms.embedding import embedding_sum, noisy_mean_embedding
from privimage.stages.noisy_statistic import Drawn, Sensitive, draw_once, sum_over_ranks
from privimage.stages.training import Schedule, train
from privimage.storage.rundir import RunDir


def mean_embedding(
    config: Config,
    run_dir: RunDir,
    world: World,
    sensitive: Sensitive,
    mechanism: MeanEmbedding,
    path: Path,
) -> Drawn:
    """The noisy mean embedding by random features, float64 (rows, F), drawn once: see `noisy_mean`."""
    features = _features(config, world, torch.float64)

    def embed(images: Tensor, _: Tensor) -> Tensor:
        return features(to_unit(images))

    return noisy_mean(config, run_dir, world, sensitive, mechanism, path, sensitive.rows, embed)


def noisy_mean(
    config: Config,
    run_dir: RunDir,
    world: World,
    sensitive: Sensitive,
    mechanism: MeanEmbedding,
    path: Path,
    rows: int,
    embed: Callable[[Tensor, Tensor], Tensor],
) -> Drawn:
    """Noisy sums over N of the feature vectors of the images, float64 (rows, F), drawn once and kept in
    `path`: see `draw_once`.

    `embed` gives the vectors float64 (B, F) of images uint8 (B, C, H, W) and labels int64 (B,). There is a
    row for each label, or one for all of them.
    """

    def exact(_: str) -> np.ndarray:
        total = torch.zeros(rows, mechanism.features, dtype=torch.int64, device=world.device)

        def summed(images: Tensor, labels: Tensor, sizes: Tensor, block: int) -> Tensor:
            ((_, embedded),) = blockwise(embed, images, labels, size=block)
            return embedding_sum(embedded, labels if rows > 1 else torch.zeros_like(labels), sizes, rows)

        return sum_over_ranks(world, sensitive.images, sensitive.images.labels, total, summed)

    def noisy(total: np.ndarray, key: bytes) -> np.ndarray:
        return noisy_mean_embedding(total, mechanism, config.privacy.noise_source, key)

    return draw_once(config, run_dir, world, sensitive, mechanism, path, exact, noisy)


def matched_generator(
    config: Config, run_dir: RunDir, world: World, n_classes: int, embedding: np.ndarray, name: str
) -> MatchedGenerator:
    """A generator trained towards an embedding float64 (rows, F) in the settings of `match`.

    It resumes from its checkpoint in the folder `name` of the run. Training is post-processing: its steps may
    be repeated, changed or stopped without any cost. Raises Stopped.
    """
    settings = config.match
    target = torch.from_numpy(embedding).float().to(world.device)
    features = _features(config, world, torch.float32)
    generator = MatchedGenerator(config, n_classes, world, features, target)

    def steps(first: int) -> Iterator[None]:
        for step in itertools.count(first):
            generator.step(step)
            yield

    schedule = Schedule(settings.steps, settings.batch_size, settings.log_every, settings.checkpoint_every)
    train(name, schedule, generator, steps, run_dir, world)
    return generator


def _features(config: Config, world: World, dtype: torch.dtype) -> RandomFeatures:
    pixels, seed = math.prod(image_shape(config)), public_seed(config, "random features")
    return RandomFeatures(pixels, config.match.features, config.match.bandwidth, seed, world.device, dtype)
