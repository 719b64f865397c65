"""Ask the sensitive set, under differential privacy, which public classes resemble it; keep those for pretraining."""

import math

import numpy as np
import torch

from privimage.config import Config
from privimage.data import store
from privimage.data.sources import ImageSet, read_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.models.edm import to_unit
from privimage.models.resnet import classifier
from privimage.privacy.account import open_account
from privimage.privacy.histogram import noisy_histogram
from privimage.privacy.plan import QueryPlan
from privimage.progress import say
from privimage.rundir import RunDir, write_whole


def run(config: Config, run: RunDir, world: World) -> dict:
    """Query, add noise, choose; or choose by lot, for a method that is there to be compared with.

    Writes select/selection.npz: `counts` float64 (rows, public classes), the noisy histogram, zeros without a query; `assignment`
    int64 (public classes,), the sensitive class that each public class serves, or -1. Raises UserError if k1 or k2 exceed the
    public classes.
    """
    settings, classes = config.select, run.require("prepare")["classes"]
    sensitive = read_sensitive(config, "train")
    rows = len(sensitive.classes) if config.data.sensitive.labelled else 1
    if rows * settings.per_class > len(classes):
        raise UserError(f"select.per_class: {rows} sensitive classes times {settings.per_class} are more than the {len(classes)} public classes")
    if config.spec.pretraining == "random":
        counts = np.zeros((rows, len(classes)))
        scores, told = np.random.default_rng([config.runtime.seed, 3]).random(counts.shape), "drawn by lot, without asking the sensitive images"
        record = {}
    else:
        counts, plan = _asked(config, run, world, sensitive, rows, len(classes))
        scores, told = counts, f"noise of {plan.standard_deviation:.3g} votes a bin"
        record = {"noise_multiplier": plan.noise_multiplier}
    if world.is_main:
        assignment = exclusive_top(scores, settings.per_class)
        np.savez(path := run.stage("select") / ".selection.npz", counts=counts, assignment=assignment)
        write_whole(run.stage("select") / "selection.npz", path.read_bytes())
        path.unlink()
        labels = store.labels(run.public_store)
        chosen = int((assignment[labels] >= 0).sum())
        say(f"select: {chosen} of {len(labels)} public images ({100 * chosen / len(labels):.1f} %), {told}")
        for row in range(min(rows, 20)):
            kept = [classes[i] for i in np.flatnonzero(assignment == row)]
            say(f"  {sensitive.classes[row] if config.data.sensitive.labelled else 'all'}: {', '.join(kept[:12])}{' ...' if len(kept) > 12 else ''}")
    return {"images": len(sensitive.images), **record}


def _asked(config: Config, run: RunDir, world: World, sensitive: ImageSet, rows: int, columns: int) -> tuple[np.ndarray, QueryPlan]:
    """The noisy histogram (rows, columns), on the main rank; zeros elsewhere."""
    run.require("query")
    if config.select.per_image > columns:
        raise UserError(f"select.per_image: {config.select.per_image} is more than the {columns} public classes")
    account = open_account(config, run, sensitive.fingerprint, len(sensitive.images), world.broadcast_object, world.is_main)
    plan = account.plan.query
    assert plan is not None  # this stage belongs to methods with a query
    votes = _votes(config, run, world, sensitive.images, columns)
    if not world.is_main:
        return np.zeros((rows, columns)), plan
    rows_of = sensitive.labels if config.data.sensitive.labelled else np.zeros_like(sensitive.labels)
    identity = f"query|{account.root.name}|{config.select.per_image}|{world.size}|{torch.__version__}|{world.device.type}"
    account.charge(plan.mechanism, identity)
    key = account.root.derive("query noise", identity)
    return noisy_histogram(votes, rows_of, rows, columns, plan, config.privacy.noise_source, key), plan


def _votes(config: Config, run: RunDir, world: World, images: np.ndarray, columns: int) -> np.ndarray:
    """The top k1 public classes of every sensitive image, int64 (N, k1); the ranks share the work."""
    network = classifier(config.query.network, config.data.channels, columns).to(world.device)
    state = checkpoint.load(run.stage("query") / "network.pt", world.device)
    if state is None:
        raise UserError(f"{run.stage('query') / 'network.pt'}: no such file; run `privimage query` first")
    network.load_state_dict(state["network"])
    network.eval()
    votes = torch.zeros(len(images), config.select.per_image, dtype=torch.int64, device=world.device)
    share = math.ceil(len(images) / world.size)
    with torch.no_grad():
        for start in range(world.rank * share, min((world.rank + 1) * share, len(images)), 512):
            stop = min(start + 512, (world.rank + 1) * share, len(images))
            batch = to_unit(torch.from_numpy(images[start:stop]).to(world.device))
            votes[start:stop] = network(batch).topk(config.select.per_image, dim=1).indices
    return world.all_reduce_(votes).cpu().numpy()


def exclusive_top(counts: np.ndarray, per_class: int) -> np.ndarray:
    """Give each row its `per_class` largest columns, each column to one row only: int64 (columns,), the row or -1.

    counts (rows, columns). Conflicts are resolved by the counts, the largest over all pairs first, not by the order of rows.
    """
    assignment = np.full(counts.shape[1], -1, dtype=np.int64)
    room = np.full(counts.shape[0], per_class)
    for flat in np.argsort(-counts, axis=None, kind="stable"):
        row, column = divmod(int(flat), counts.shape[1])
        if room[row] and assignment[column] < 0:
            assignment[column] = row
            room[row] -= 1
    return assignment
