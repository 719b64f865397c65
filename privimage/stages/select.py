"""Query the sensitive set, under differential privacy, for the public classes that resemble it, and select
these.
"""

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data.private_store import ImageSet
from privimage.data.sources import open_sensitive
from privimage.distributed.blocks import in_blocks
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.models.edm import to_unit
from privimage.models.semantic import SemanticQuery
from privimage.privacy.account import charge_name, open_account
from privimage.privacy.identity import computation, digest_of_tensors
from privimage.privacy.mechanisms import SemanticHistogram
from privimage.privacy.mechanisms.histogram import noisy_histogram
from privimage.stages.public_set import Semantics, load_scores, public_semantics
from privimage.storage.array_file import Images
from privimage.storage.files import write_arrays
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Query, add noise and select classes; or select them at random, for the baseline.

    Writes select/selection.npz: `counts` float64 (rows, public classes), the noisy histogram, zeros without a
    query; `assignment` int64 (public classes,), the sensitive class that each public class serves, or -1;
    `charges`, the names of those in the ledger that the histogram has cost. Raises UserError if k1 or k2
    exceed the public classes, or if the run has asked before and the answer is lost.
    """
    settings, public = config.select, public_semantics(config, run_dir, world)
    sensitive = open_sensitive(config, "train", world, run_dir.sensitive)
    # One row of the histogram per sensitive class, one column per public class.
    rows = len(sensitive.classes) if config.data.sensitive.labelled else 1
    columns = len(public.names)
    if rows * settings.per_class > columns:
        raise UserError(
            f"select.per_class: {rows} sensitive classes times {settings.per_class} are more than the "
            f"{columns} {public.kind}"
        )
    # The baseline selects as many classes at random, and spends no privacy.
    if config.spec.pretraining == "random":
        counts = np.zeros((rows, columns))
        scores, how = (
            np.random.default_rng(public_seed(config, "random selection")).random(counts.shape),
            "drawn at random, without the sensitive images",
        )
        record, charges = {}, []
    else:
        counts, plan, charge = _asked(config, run_dir, world, sensitive, rows, public)
        charges = [charge]
        scores, how = counts, f"noise of {plan.standard_deviation:.3g} votes per bin"
        record = {"noise_multiplier": plan.noise_multiplier}
    if world.is_main:
        # From here on all is post-processing of the noisy counts.
        assignment = exclusive_top(scores, settings.per_class)
        write_arrays(
            run_dir.stage("select") / "selection.npz",
            {"counts": counts, "assignment": assignment, "charges": np.array(charges, np.str_)},
        )
        chosen = (assignment[public.of_images] >= 0).mean()
        say(
            f"select: {chosen * len(public.of_images):.0f} of {len(public.of_images)} public images "
            f"({100 * chosen:.1f} %), {how}"
        )
        for row in range(min(rows, 20)):
            chosen_names = [public.names[i] for i in np.flatnonzero(assignment == row)]
            say(
                f"  {sensitive.classes[row] if config.data.sensitive.labelled else 'all'}: "
                f"{', '.join(chosen_names[:12])}{' ...' if len(chosen_names) > 12 else ''}"
            )
    return {"images": len(sensitive.images), **record}


def _asked(
    config: Config, run_dir: RunDir, world: World, sensitive: ImageSet, rows: int, public: Semantics
) -> tuple[np.ndarray, SemanticHistogram, str]:
    """The noisy histogram (rows, columns), on the main rank, zeros elsewhere; and the name of its charge.

    What is charged depends on nothing that the images vote; the noise does, so that two histograms with one
    noise cannot be.
    """
    run_dir.require("query")
    columns, per_image = len(public.names), config.select.per_image
    if per_image > columns:
        raise UserError(f"select.per_image: {per_image} is more than the {columns} {public.kind}")
    account = open_account(config, run_dir, sensitive, world)
    plan = account.plan.the(SemanticHistogram)
    # The identity of the query: all that a histogram depends on but the votes themselves.
    query = load_scores(config, run_dir, world)
    stage_values = {"plan": account.plan.to_dict(), "rows": rows, "columns": columns}
    network = digest_of_tensors(
        [*query.state_dict().values(), *([] if query.centroids is None else [query.centroids])]
    )
    name = charge_name(
        account.root,
        computation(world, account.root, sensitive.content, config, "select", stage_values, [network]),
    ).hex()
    # Votes come before the charge, so that a failure until then costs nothing; they stay in memory.
    votes = top_votes(query, sensitive.images, per_image, world)
    account.charge_once(plan, name, world, run_dir.path)
    if not world.is_main:
        return np.zeros((rows, columns)), plan, name
    # The key of the noise depends on the votes as well: other votes never get the same noise.
    hidden = votes, sensitive.labels, sensitive.groups
    key = account.root.derive("query noise", name, digest_of_tensors(hidden).hex())
    counts = noisy_histogram(*hidden, (rows, columns), plan, config.privacy.noise_source, key)
    return counts, plan, name


@torch.no_grad()
def top_votes(query: SemanticQuery, images: Images, per_image: int, world: World) -> np.ndarray:
    """The `per_image` classes or clusters with the largest scores of each image uint8 (N, C, H, W), all
    different: int64 (N, per_image).

    The votes of an image depend on no other image and on no number of ranks.
    """

    def read(start: int, end: int) -> Tensor:
        return torch.from_numpy(images[start:end])

    def best(block: Tensor) -> Tensor:
        return query(to_unit(block)).topk(per_image, dim=1).indices

    stopped = "select: nothing was drawn yet"
    votes = in_blocks(len(images), images.shape[1:], per_image, torch.int64, read, best, world, stopped)
    return votes.cpu().numpy()


def exclusive_top(counts: np.ndarray, per_class: int) -> np.ndarray:
    """Assign to each row its `per_class` largest columns of counts (rows, columns), each column to one row.

    Returns int64 (columns,), the row or -1. Conflicts are resolved by the counts, the largest over all pairs
    first, not by the order of rows.
    """
    assignment = np.full(counts.shape[1], -1, dtype=np.int64)
    # Greedy over all pairs: the largest count first, until each row has its columns.
    room = np.full(counts.shape[0], per_class)
    for flat in np.argsort(-counts, axis=None, kind="stable"):
        row, column = divmod(int(flat), counts.shape[1])
        if room[row] and assignment[column] < 0:
            assignment[column] = row
            room[row] -= 1
    return assignment
