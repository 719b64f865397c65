"""DP-MERF (Harder et al. 2021): one noisy mean embedding of the sensitive set, and a generator that is trained to have the same."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from privimage.config import Config
from privimage.data.sources import ImageSet, read_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.blocks import BLOCK, blockwise
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.families import family
from privimage.families.base import image_shape, public_seed
from privimage.families.matching import MatchedGenerator
from privimage.models.edm import to_unit
from privimage.models.random_features import RandomFeatures
from privimage.privacy.account import Account, open_account
from privimage.privacy.embedding import embedding_sum, noisy_mean_embedding
from privimage.privacy.plan import MatchPlan
from privimage.rundir import RunDir, write_array
from privimage.training import train


def run(config: Config, run: RunDir, world: World) -> dict:
    """The noisy embedding, drawn once; then training that sees nothing else of the sensitive set.

    Writes match/embedding.npy, float64 (rows, F), and match/weights.pt with the averaged generator. Raises UserError for a resolution that
    the generator cannot have.
    """
    settings = config.match
    sensitive = read_sensitive(config, "train")
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0
    size = family(config).sizes(config, n_classes)["generator"]  # refuses what the generator cannot make, before anything is charged
    account = open_account(config, run, sensitive.fingerprint, len(sensitive.images), world.broadcast_object, world.is_main)
    target = torch.from_numpy(_embedding(config, run, world, account, sensitive, max(n_classes, 1)))
    generator = MatchedGenerator(config, n_classes, world, _features(config, world, torch.float32), target.float().to(world.device))

    def steps(first: int) -> Iterator[None]:
        for step in itertools.count(first):
            generator.step(step)
            yield

    train("match", settings, settings.batch_size, generator, steps, run, world)
    if world.is_main:
        weights = {"ema": generator.settled(averaged=True).state_dict(), "n_classes": n_classes, "classes": list(sensitive.classes)}
        checkpoint.save(run.stage("match") / "weights.pt", weights)
    return {"images": settings.steps * settings.batch_size, "steps": settings.steps, "features": settings.features, "parameters": size}


def _embedding(config: Config, run: RunDir, world: World, account: Account, sensitive: ImageSet, rows: int) -> np.ndarray:
    """The noisy mean embedding (rows, F): the one that is there, or the only one that is ever drawn. The ranks share the features."""
    path, plan = run.stage("match") / "embedding.npy", account.plan.training
    assert isinstance(plan, MatchPlan)  # this stage belongs to methods with one
    if not world.broadcast_object(path.exists()):
        total = _sum_over_ranks(config, world, sensitive, rows)
        arrangement = account.arrangement(config, world)
        attempt = world.broadcast_object(account.resume_training(run.private / "attempts.json", arrangement, 0) if world.is_main else None)
        if not attempt.last:
            raise UserError(f"{run.path}: the embedding of this run was charged, and lost before it was kept; choose another run.dir")
        if world.is_main:
            account.charge_step(attempt.number, 0)
            key = account.root.derive("match noise", attempt.number)
            write_array(path, noisy_mean_embedding(total, plan, config.privacy.noise_source, key))
        world.barrier()
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path}: damaged, and charged already; choose another run.dir") from None


def _sum_over_ranks(config: Config, world: World, sensitive: ImageSet, rows: int) -> np.ndarray:
    features = _features(config, world, torch.float64)
    total = torch.zeros(rows, config.match.features, dtype=torch.int64, device=world.device)
    for start in range(world.rank * BLOCK, len(sensitive.images), world.size * BLOCK):
        images, own = (torch.from_numpy(array[start : start + BLOCK]).to(world.device) for array in (sensitive.images, sensitive.labels))
        for _, embedded in blockwise(lambda block: features(to_unit(block)), images):
            total += embedding_sum(embedded, own, rows)
    return world.all_reduce_(total).cpu().numpy()


def _features(config: Config, world: World, dtype: torch.dtype) -> RandomFeatures:
    pixels, seed = math.prod(image_shape(config)), public_seed(config, "random features", 0)
    return RandomFeatures(pixels, config.match.features, config.match.bandwidth, seed, world.device, dtype)
