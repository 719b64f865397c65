"""Private Evolution (Lin et al. 2024): sensitive images vote for synthetic ones, which are varied; nothing is
trained.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.data.sensitive import ImageDraws
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.blocks import BLOCK, blockwise
from privimage.distributed.microbatch import block_size
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.families.evolution import Population
from privimage.models.edm import to_unit
from privimage.privacy.account import Account, charge_name, open_account
from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.identity import computation, digest_of_tensors
from privimage.privacy.mechanisms import NearestHistogram
from privimage.privacy.mechanisms.histogram import noisy_histogram
from privimage.stages.public_set import load_query
from privimage.storage.rundir import RunDir
from privimage.telemetry.curves import Curves
from privimage.telemetry.progress import Progress


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Private Evolution: T noisy histograms, and a new generation of synthetic images from each.

    Each sensitive image votes for the image of its own class that is nearest in the features of the query
    network. The first generation comes from the public model alone, each further one from the chances that
    the last histogram gave. Writes evolve/weights.pt: the last generation, its chances and the public model,
    from which `synthesize` draws. The mean distance of a vote goes to private/tensorboard. Raises UserError
    if the run has used up its histograms, and what they made is lost.
    """
    sensitive = open_sensitive(config, "train", world, run_dir.sensitive)
    account = open_account(config, run_dir, sensitive, world)
    plan = account.plan.the(NearestHistogram)
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0
    population = _population(config, run_dir, world, max(n_classes, 1))
    voters = Voters(config, run_dir, world, sensitive)
    digest = _digest(config, world, account, sensitive, voters)

    # Go on from the last generation that was voted for, with the charges that made it.
    file, step, charges = run_dir.stage("evolve") / "checkpoint.pt", 0, []
    if (state := checkpoint.load(file, world)) is not None:
        population.load_state_dict(population.state_dict() | state["population"])
        step, charges = state["step"], state["charges"]
        account.require_known({plan.stage: charges}, file, world)

    curves = _Curves(run_dir, account, step, world)
    with Progress("evolve", plan.iterations, step, world.is_main) as bar:
        while step < plan.iterations:
            # A new generation, from public randomness and the last noisy histogram. Its histogram is named by
            # all that it depends on, and charged before anybody votes.
            population.images, population.public = _generation(population, step, config, world)
            name = charge_name(
                account.root, digest, step.to_bytes(8, "big"), digest_of_tensors([population.images])
            ).hex()
            if not world.broadcast_object(account.charge(plan, name, charges) if world.is_main else None):
                break
            charges.append(name)

            # Votes, noise, and chances to have children.
            noisy, distance = _histogram(config, world, account, plan, voters, population, name)
            population.chances = chances(noisy, config.evolve.threshold * plan.standard_deviation)
            step += 1
            bar.advance()
            curves.add(step, population, distance)
            if world.is_main:
                checkpoint.save(file, {"population": population.state(), "step": step, "charges": charges})
    curves.close()
    known = {"n_classes": n_classes, "classes": list(sensitive.classes), "charges": {"evolve": charges}}
    _finish(run_dir, population, step, known, world)
    size = population.public.numel()
    return {"images": step * len(sensitive.images), "iterations": step, "population": size}


def _finish(run_dir: RunDir, population: Population, steps: int, known: dict, world: World) -> None:
    """Write the last generation. Raises UserError if there was no histogram."""
    if not steps:
        raise UserError(
            f"{run_dir.path}: all histograms of this run were drawn before, and what they made is lost; "
            "choose another run.dir"
        )
    if world.is_main:
        state = {"ema": population.state_dict(), "public_classes": population.public_classes, "steps": steps}
        checkpoint.save(run_dir.stage("evolve") / "weights.pt", state | known)


def _digest(config: Config, world: World, account: Account, sensitive: ImageSet, voters: "Voters") -> bytes:
    """All that a histogram depends on beside the generation that is voted for."""
    network = digest_of_tensors(voters.network.state_dict().values())
    stage_values = {"plan": account.plan.to_dict()}
    return computation(world, account.root, sensitive.content, config, "evolve", stage_values, [network])


def _histogram(
    config: Config,
    world: World,
    account: Account,
    plan: NearestHistogram,
    voters: "Voters",
    population: Population,
    name: str,
) -> tuple[Tensor, float]:
    """The noisy votes (R, P) of a charged histogram, equal on all ranks, and the mean distance of a vote,
    which is private.
    """
    votes, distance = voters.vote(population)
    counts = None
    if world.is_main:
        hidden = votes, voters.rows, voters.groups
        key = account.root.derive("evolve noise", name, digest_of_tensors(hidden).hex())
        rows, members = population.chances.shape
        counts = noisy_histogram(*hidden, (rows, members), plan, config.privacy.noise_source, key)
    return torch.from_numpy(world.broadcast_object(counts)).to(world.device), distance


class _Curves:
    """Public curves, from noisy counts alone, and private ones."""

    def __init__(self, run_dir: RunDir, account: Account, step: int, world: World):
        self.account, self.world = account, world
        self.public = Curves(run_dir.tensorboard, "evolve", step, world.is_main, timed=False)
        self.private = Curves(run_dir.private / "tensorboard", "evolve", step, world.is_main)

    def add(self, step: int, population: Population, distance: float) -> None:
        """Points of all curves after an iteration."""
        used = replace(self.account.plan.the(NearestHistogram).composition, count=step)
        self.public.scalars(step, _figures(self.account, population, used, self.world))
        self.public.images(step, "population", population.images[:10, :10].flatten(0, 1))
        self.private.scalars(step, {"mean distance of a vote": distance})
        self.public.flush()
        self.private.flush()

    def close(self) -> None:
        """The end of the curves."""
        self.public.close()
        self.private.close()


def _population(config: Config, run_dir: RunDir, world: World, rows: int) -> Population:
    run_dir.require("pretrain")
    state = checkpoint.required(run_dir.stage("pretrain") / "weights.pt", "pretrain", world)
    population = Population(config, state["n_classes"], rows).to(world.device)
    population.denoiser.load_state_dict(state["ema"])
    return population.eval()


def _generation(population: Population, step: int, config: Config, world: World) -> tuple[Tensor, Tensor]:
    """The images (R, P, C, H, W) and public classes (R, P) that are voted for in `step`.

    The ranks make a block each in turn.

    Raises Stopped between two blocks: what is lost saw no sensitive image, and is made again.
    """
    draws, (rows, members), size = ImageDraws(world.device), population.public.shape, config.evolve.batch_size
    images = torch.zeros_like(population.images.transpose(0, 1).flatten(0, 1))
    public = torch.zeros(len(images), dtype=torch.int64, device=world.device)
    blocks = torch.arange(len(images), device=world.device).split(size)
    # The ranks sample a block each in turn, so that all of them notice a stop between two blocks.
    for turn in range(0, len(blocks), world.size):
        if stop.agreed(world):
            raise Stopped(f"evolve: saved at iteration {step}")
        if turn + world.rank < len(blocks):
            block = blocks[turn + world.rank]
            with torch.autocast(
                world.device.type, torch.bfloat16, enabled=config.runtime.precision == "bf16"
            ):
                images[block], public[block] = (
                    population.offspring(block, draws, step - 1, block % rows)
                    if step
                    else population.first(block, draws)
                )
    # Each block was made by one rank and is zero on all others: sums put them together.
    world.all_reduce_(images)
    world.all_reduce_(public)
    return images.unflatten(0, (members, rows)).transpose(0, 1).contiguous(), public.view(
        members, rows
    ).T.contiguous()


class Voters:
    """Features of the sensitive images under the query network, for this rank's blocks, and their votes."""

    def __init__(self, config: Config, run_dir: RunDir, world: World, sensitive: ImageSet):
        self.world, self.count = world, len(sensitive.images)
        self.rows, self.groups = sensitive.labels, sensitive.groups
        self.block = block_size(sensitive.images.shape, BLOCK)
        run_dir.require("query")
        self.network = load_query(config, run_dir, world).network
        self.own = [
            (block, self._embed(torch.from_numpy(sensitive.images[block])))
            for block in self._blocks(self.count)
        ]

    def _blocks(self, count: int) -> list[slice]:
        """This rank's blocks of `count` images."""
        # self.world.size] :: Blocks in turn, so that ranks finish together.
        starts = range(0, count, self.block)[self.world.rank :: self.world.size]
        return [slice(start, min(start + self.block, count)) for start in starts]

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Features (n, F) of a block of images, each a function of its image alone."""
        ((_, features),) = blockwise(
            lambda block: self.network.features(to_unit(block)), images.to(self.world.device), size=self.block
        )
        return features

    def vote(self, population: Population) -> tuple[np.ndarray, float]:
        """Every image's vote, int64 (N, 1): a member of its own class.

        And the mean distance, for `private/` only.
        """
        # Features of the candidates, a share on each rank.
        images = population.images.flatten(0, 1)
        candidates = torch.zeros(len(images), self.network.head.in_features, device=self.world.device)
        for block in self._blocks(len(images)):
            candidates[block] = self._embed(images[block])
        candidates = self.world.all_reduce_(candidates).unflatten(0, population.public.shape)
        # Each rank finds the votes of the sensitive images that it holds; they leave it only as a sum over
        # ranks.
        votes = torch.zeros(self.count, dtype=torch.int64, device=self.world.device)
        total = torch.zeros((), device=self.world.device)
        for block, features in self.own:
            votes[block], distances = nearest(
                features, torch.from_numpy(self.rows[block]).to(self.world.device), candidates
            )
            total += distances.sum()
        return self.world.all_reduce_(votes)[:, None].cpu().numpy(), self.world.all_reduce_(
            total
        ).item() / self.count


def _figures(
    account: Account, population: Population, charged: SampledGaussian, world: World
) -> dict[str, float]:
    """Numbers computed from the noisy counts alone, and the epsilon spent."""
    shown = {"images with votes": float((population.chances > 0).sum())}
    if account.private and world.is_main:
        shown["epsilon"] = epsilon((charged,), account.plan.delta, account.plan.accountant, 1e-3)
    return shown


def nearest(features: Tensor, labels: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate of its own class that each image is closest to, int64 (B,) in [0, P), and its distance
    (B,).

    features (B, F), labels int64 (B,) in [0, R), candidates (R, P, F). Each distance is computed on its own,
    not by a product of matrices: rounding there depends on what else is multiplied, and one image could turn
    the vote of another.
    """
    votes = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    distances = torch.zeros(len(features), device=features.device)
    # Images vote within their own class, so that one image changes one bin of one row.
    for label in labels.unique().tolist():
        of_class = labels == label
        distances[of_class], votes[of_class] = torch.cdist(
            features[of_class], candidates[label], compute_mode="donot_use_mm_for_euclid_dist"
        ).min(1)
    return votes, distances


def chances(counts: Tensor, threshold: float) -> Tensor:
    """Noisy counts of votes (R, P) -> chances float64 (R, P).

    Counts lowered by `threshold`, to 0 at least, over their sum.

    A row in which nothing is left has equal chances.
    """
    # Counts below the threshold are mostly noise (Lin et al. 2024, algorithm 1).
    left = (counts.double() - threshold).clamp(min=0)
    left = torch.where(left.sum(1, keepdim=True) > 0, left, 1.0)
    return left / left.sum(1, keepdim=True)
