"""The noisy embedding of the sensitive set, and the generator that is trained towards its mean."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.distributed.blocks import blockwise
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.families.matching import FeatureMap, MatchedGenerator
from privimage.models.edm import to_unit
from privimage.privacy.identity import digest_of_tensors
from privimage.privacy.mechanisms import MeanEmbedding
from privimage.privacy.mechanisms.embedding import noisy_embedding
from privimage.privacy.mechanisms.vectors import VectorsOfUnits, whole_vectors
from privimage.stages.noisy_statistic import Drawn, Sensitive, draw_once, sum_over_ranks
from privimage.stages.training import Schedule, train
from privimage.storage.rundir import RunDir


def embedding_sums(
    config: Config,
    run_dir: RunDir,
    world: World,
    sensitive: Sensitive,
    mechanism: MeanEmbedding,
    path: Path,
    features: FeatureMap,
) -> Drawn:
    """The noisy sum of `features`, drawn once: see `noisy_sum`."""

    def embed(images: Tensor, _: Tensor) -> Tensor:
        return features(to_unit(images))

    inputs = [digest_of_tensors(features.state())]
    return noisy_sum(config, run_dir, world, sensitive, mechanism, path, sensitive.rows, embed, inputs)


def noisy_sum(
    config: Config,
    run_dir: RunDir,
    world: World,
    sensitive: Sensitive,
    mechanism: MeanEmbedding,
    path: Path,
    rows: int,
    embed: Callable[[Tensor, Tensor], Tensor],
    inputs: Sequence[bytes] = (),
) -> Drawn:
    """Noisy sums of the feature vectors of the images, float64 (rows * F + 1,), drawn once and kept in
    `path`: see `draw_once`, and `embedding_of` for what they say.

    `embed` gives the vectors float64 (B, F) of images uint8 (B, C, H, W) and labels int64 (B,); `inputs` are
    digests of what it depends on beside settings. There is a row for each label, or one for all of them.
    """
    features, weight = mechanism.features, mechanism.weight

    def vectors(images: Tensor, labels: Tensor) -> Tensor:
        return whole_vectors(embed(images, labels), weight)

    def exact(_: str) -> np.ndarray:
        total = torch.zeros(rows * features + 1, dtype=torch.int64, device=world.device)

        def add(images: Tensor, labels: Tensor, groups: Tensor, block: int) -> None:
            of = labels if rows > 1 else torch.zeros_like(labels)
            units = VectorsOfUnits(groups, of, features, weight)
            for place, found in blockwise(vectors, images, labels, size=block):
                units.add(place, found)
            units.add_to(total)

        return sum_over_ranks(world, sensitive.images, sensitive.images.labels, total, add)

    def noisy(total: np.ndarray, key: bytes) -> np.ndarray:
        return noisy_embedding(total, mechanism, config.privacy.noise_source, key)

    drawn = draw_once(config, run_dir, world, sensitive, mechanism, path, exact, noisy, inputs)
    if drawn.values.shape != (rows * features + 1,):
        raise UserError(f"{path}: drawn by another version, and charged already; choose another run.dir")
    return drawn


def matched_generator(
    config: Config,
    run_dir: RunDir,
    world: World,
    n_classes: int,
    embedding: np.ndarray,
    name: str,
    features: FeatureMap,
) -> MatchedGenerator:
    """A generator trained towards an embedding float64 (rows, F) by `features`, in the settings of `match`.

    It resumes from its checkpoint in the folder `name` of the run. Training is post-processing: its steps may
    be repeated, changed or stopped without any cost. Raises Stopped.
    """
    settings = config.match
    target = torch.from_numpy(embedding).float().to(world.device)
    generator = MatchedGenerator(config, n_classes, world, features.to(torch.float32), target)

    def steps(first: int) -> Iterator[None]:
        for step in itertools.count(first):
            generator.step(step)
            yield

    schedule = Schedule(settings.steps, settings.batch_size, settings.log_every, settings.checkpoint_every)
    train(name, schedule, generator, steps, run_dir, world)
    return generator
