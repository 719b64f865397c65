"""DP-MERF (Harder et al. 2021): train a generator towards one noisy mean embedding of the sensitive set."""

import itertools
import math
import zipfile
from collections.abc import Iterator

import numpy as np
import torch

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.private_store import ImageSet
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint, told
from privimage.distributed.blocks import BLOCK, blockwise
from privimage.distributed.microbatch import block_size
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.families import family
from privimage.families.base import image_shape
from privimage.families.matching import MatchedGenerator
from privimage.models.edm import to_unit
from privimage.models.random_features import RandomFeatures
from privimage.privacy.account import Account, charge_name, open_account
from privimage.privacy.identity import computation, digest_of_tensors
from privimage.privacy.mechanisms import MeanEmbedding
from privimage.privacy.mechanisms.embedding import embedding_sum, noisy_mean_embedding
from privimage.stages.training import Schedule, train
from privimage.storage.files import write_arrays
from privimage.storage.rundir import RunDir


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """The noisy embedding, drawn once; then training that sees nothing else of the sensitive set.

    Writes match/embedding.npz, `embedding` float64 (rows, F) and the `charge` that it cost, and
    match/weights.pt with the averaged generator. Raises UserError for a resolution that the generator cannot
    have, or if the embedding was drawn before and is lost.
    """
    settings = config.match
    sensitive = open_sensitive(config, "train", world, run_dir.sensitive)
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0
    # A generator that cannot make the resolution is refused before anything is charged.
    size = family(config).sizes(config, n_classes)["generator"]
    # From here on the run sees the sensitive set through one noisy embedding only, kept in a file.
    account = open_account(config, run_dir, sensitive, world)
    embedding, charge = _embedding(config, run_dir, world, account, sensitive, max(n_classes, 1))
    target = torch.from_numpy(embedding)
    generator = MatchedGenerator(
        config, n_classes, world, _features(config, world, torch.float32), target.float().to(world.device)
    )

    def steps(first: int) -> Iterator[None]:
        for step in itertools.count(first):
            generator.step(step)
            yield

    # Training is post-processing: its steps may be repeated, changed or stopped without any cost.
    schedule = Schedule(settings.steps, settings.batch_size, settings.log_every, settings.checkpoint_every)
    train("match", schedule, generator, steps, run_dir, world)
    if world.is_main:
        known = {
            "n_classes": n_classes,
            "classes": list(sensitive.classes),
            "steps": 1,
            "charges": {"match": [charge]},
        }
        checkpoint.save(
            run_dir.stage("match") / "weights.pt",
            {"ema": generator.frozen(averaged=True).state_dict()} | known,
        )
    return {
        "images": settings.steps * settings.batch_size,
        "steps": settings.steps,
        "features": settings.features,
        "parameters": size,
    }


def _embedding(
    config: Config, run_dir: RunDir, world: World, account: Account, sensitive: ImageSet, rows: int
) -> tuple[np.ndarray, str]:
    """The noisy mean embedding (rows, F), the one that is there or the only one that is ever drawn, and the
    name of its charge.
    """
    path, plan = run_dir.stage("match") / "embedding.npz", account.plan.the(MeanEmbedding)
    if not told.exists(path, world):
        # The charge is named by public inputs and the set as a whole, the noise also by the sum that it
        # hides: two different sums can never have the same noise.
        stage_values = {"plan": account.plan.to_dict(), "rows": rows}
        name = charge_name(
            account.root, computation(world, account.root, sensitive.content, config, "match", stage_values)
        ).hex()
        # Summed before it is charged: what fails until then has cost nothing.
        total = _sum_over_ranks(config, world, sensitive, rows)
        account.charge_once(plan, name, world, run_dir.path)
        if world.is_main:
            key = account.root.derive("match noise", name, digest_of_tensors([total]).hex())
            embedding = noisy_mean_embedding(total, plan, config.privacy.noise_source, key)
            write_arrays(path, {"embedding": embedding, "charge": np.array(name)})
        world.barrier()
    try:
        file = told.arrays(path, world)
        return file["embedding"], str(file["charge"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged, and charged already; choose another run.dir") from None


def _sum_over_ranks(config: Config, world: World, sensitive: ImageSet, rows: int) -> np.ndarray:
    features = _features(config, world, torch.float64)
    total = torch.zeros(rows, config.match.features, dtype=torch.int64, device=world.device)
    # Blocks of one size, and sums of integers: the total is the same to the bit for any number of ranks.
    size = block_size(sensitive.images.shape, BLOCK)
    for start in range(world.rank * size, len(sensitive.images), world.size * size):
        images, labels = (
            torch.from_numpy(array[start : start + size]).to(world.device)
            for array in (sensitive.images, sensitive.labels)
        )
        for _, embedded in blockwise(lambda block: features(to_unit(block)), images, size=size):
            total += embedding_sum(embedded, labels, rows)
    return world.all_reduce_(total).cpu().numpy()


def _features(config: Config, world: World, dtype: torch.dtype) -> RandomFeatures:
    pixels, seed = math.prod(image_shape(config)), public_seed(config, "random features")
    return RandomFeatures(pixels, config.match.features, config.match.bandwidth, seed, world.device, dtype)
