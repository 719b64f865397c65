"""DP-MERF (Harder et al. 2021): one noisy mean embedding of the sensitive set, and a generator that is trained to have the same."""

import io
import math

import numpy as np
import torch

from privimage.config import Config
from privimage.curves import Curves, memory
from privimage.data.sources import ImageSet, read_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.families import family
from privimage.families.base import image_shape, public_seed
from privimage.families.matching import MatchedGenerator
from privimage.models.edm import to_unit
from privimage.models.random_features import RandomFeatures
from privimage.privacy.account import Account, open_account
from privimage.privacy.attempts import arranged
from privimage.privacy.embedding import embedding_sum, noisy_mean_embedding
from privimage.privacy.plan import MatchPlan
from privimage.progress import Progress
from privimage.rundir import RunDir, write_whole

BLOCK = 256  # images whose features are computed at once: the same on any number of ranks


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

    file, step = run.stage("match") / "checkpoint.pt", 0
    if (state := checkpoint.load(file, world.device)) is not None:
        generator.load(state)
        step = state["step"]
    curves = Curves(run.tensorboard, "match", step, world.is_main)
    with Progress("match", settings.steps, step, world.is_main) as bar:
        while step < settings.steps:
            distance = generator.step(step)
            step += 1
            bar.advance()
            wanted = stop.agreed(world)
            if step % settings.log_every == 0:
                shown = {"images per second": bar.rate * settings.batch_size, "memory": memory(world.device), "learning rate": settings.learning_rate}
                curves.scalars(step, {"squared distance": distance.item()} | shown)
            if step % settings.checkpoint_every == 0 or wanted:
                curves.flush()
                state = generator.state() | {"step": step}
                if world.is_main:
                    checkpoint.save(file, state)
                    curves.images(step, "samples", generator.samples())
            if wanted and step < settings.steps:
                curves.close()
                raise Stopped(f"match: saved at step {step} of {settings.steps}")
    if world.is_main:
        curves.images(step, "samples", generator.samples())
        weights = {"ema": generator.settled(averaged=True).state_dict(), "n_classes": n_classes, "classes": list(sensitive.classes)}
        checkpoint.save(run.stage("match") / "weights.pt", weights)
    curves.close()
    return {"images": settings.steps * settings.batch_size, "steps": step, "features": settings.features, "parameters": size}


def _embedding(config: Config, run: RunDir, world: World, account: Account, sensitive: ImageSet, rows: int) -> np.ndarray:
    """The noisy mean embedding (rows, F): the one that is there, or the only one that is ever drawn. The ranks share the features."""
    path, plan = run.stage("match") / "embedding.npy", account.plan.training
    assert isinstance(plan, MatchPlan)  # this stage belongs to methods with one
    if not world.broadcast_object(path.exists()):
        total = _sum_over_ranks(config, world, sensitive, rows)
        arrangement = arranged(world.size, world.device, account.root)
        attempt = world.broadcast_object(account.resume_training(run.private / "attempts.json", arrangement, 0) if world.is_main else None)
        if not attempt.last:
            raise UserError(f"{run.path}: the embedding of this run was charged, and lost before it was kept; choose another run.dir")
        if world.is_main:
            account.charge_step(attempt.number, 0)
            key = account.root.derive("match noise", attempt.number)
            np.save(buffer := io.BytesIO(), noisy_mean_embedding(total, plan, config.privacy.noise_source, key))
            write_whole(path, buffer.getvalue())
        world.barrier()
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path}: damaged, and charged already; choose another run.dir") from None


def _sum_over_ranks(config: Config, world: World, sensitive: ImageSet, rows: int) -> np.ndarray:
    features = _features(config, world, torch.float64)
    labels = sensitive.labels if config.data.sensitive.labelled else np.zeros_like(sensitive.labels)
    total = torch.zeros(rows, config.match.features, dtype=torch.int64, device=world.device)
    for start in range(world.rank * BLOCK, len(sensitive.images), world.size * BLOCK):
        images, own = (torch.from_numpy(array[start : start + BLOCK]).to(world.device) for array in (sensitive.images, labels))
        total += embedding_sum(features(to_unit(images)), own, rows)
    return world.all_reduce_(total).cpu().numpy()


def _features(config: Config, world: World, dtype: torch.dtype) -> RandomFeatures:
    pixels, seed = math.prod(image_shape(config)), public_seed(config, "random features", 0)
    return RandomFeatures(pixels, config.match.features, config.match.bandwidth, seed, world.device, dtype)
