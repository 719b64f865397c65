"""Private Evolution (Lin et al. 2024): sensitive images vote for synthetic ones, which are varied; nothing is
trained.
"""

from dataclasses import replace

import torch
from torch import Tensor

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.data.sensitive import ImageDraws
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.blocks import made_in_turn
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.families.evolution import Population, by_class, places
from privimage.privacy.account import Account, charge_name, open_account
from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.identity import computation, digest_of_tensors
from privimage.privacy.mechanisms import NearestHistogram
from privimage.privacy.mechanisms.histogram import noisy_histogram
from privimage.stages.nearest import Features, Voters, candidates
from privimage.storage.rundir import RunDir
from privimage.telemetry.curves import Curves
from privimage.telemetry.progress import Progress


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Private Evolution: T noisy histograms, and a new generation of synthetic images from each.

    Each sensitive image votes for the image of its own class that is nearest in the features of a public
    network; with a look-ahead, those of an image are the mean over variations of it. The first generation
    comes from public knowledge alone, each further one from the chances that the last histogram gave. Writes
    evolve/weights.pt: the last generation, its chances and the public model, from which `synthesize` draws.
    The mean distance of a vote goes to private/tensorboard. Raises UserError if all histograms are lost.
    """
    sensitive = open_sensitive(config, "train", world, run_dir.sensitive)
    account = open_account(config, run_dir, sensitive, world)
    plan = account.plan.the(NearestHistogram)
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0
    population = _population(config, run_dir, world, max(n_classes, 1))
    voters = Voters(Features(config, run_dir, world), world, sensitive)
    digest = _digest(config, world, account, sensitive, voters.features)

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
            population.images, population.traits = _generation(population, step, config, world)
            members = candidates(config, voters.features, population, step, world)
            voted_for = digest_of_tensors([population.images, members])
            name = charge_name(account.root, digest, step.to_bytes(8, "big"), voted_for).hex()
            if not world.broadcast_object(account.charge(plan, name, charges) if world.is_main else None):
                break
            charges.append(name)

            # Votes, noise, and chances to have children.
            noisy, distance = _histogram(config, world, account, plan, voters, members, name)
            population.chances = chances(noisy, config.evolve.threshold * plan.standard_deviation)
            step += 1
            bar.advance()
            curves.add(step, population, distance)
            if world.is_main:
                checkpoint.save(file, {"population": population.state(), "step": step, "charges": charges})
    curves.close()
    known = {"n_classes": n_classes, "classes": list(sensitive.classes), "charges": {"evolve": charges}}
    _finish(run_dir, population, step, known, world)
    votes = step * len(sensitive.images)
    return {"images": votes, "iterations": step, "population": population.chances.numel()}


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


def _digest(config: Config, world: World, account: Account, sensitive: ImageSet, features: Features) -> bytes:
    """All that a histogram depends on beside the generation that is voted for."""
    own, networks = {"plan": account.plan.to_dict()}, [features.digest]
    return computation(world, account.root, sensitive.content, config, "evolve", own, networks)


def _histogram(
    config: Config,
    world: World,
    account: Account,
    plan: NearestHistogram,
    voters: Voters,
    members: Tensor,
    name: str,
) -> tuple[Tensor, float]:
    """The noisy votes (R, P) of a charged histogram for the features `members` (R, P, F), equal on all ranks,
    and the mean distance of a vote, which is private.
    """
    votes, distance = voters.vote(members)
    counts = None
    if world.is_main:
        hidden = votes, voters.rows, voters.groups
        key = account.root.derive("evolve noise", name, digest_of_tensors(hidden).hex())
        rows, columns = members.shape[:2]
        counts = noisy_histogram(*hidden, (rows, columns), plan, config.privacy.noise_source, key)
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
    if config.evolve.simulated:
        return Population(config, 0, rows).to(world.device).eval()
    run_dir.require("pretrain")
    state = checkpoint.required(run_dir.stage("pretrain") / "weights.pt", "pretrain", world)
    population = Population(config, state["n_classes"], rows).to(world.device)
    population.api.load_state_dict({f"denoiser.{name}": value for name, value in state["ema"].items()})
    return population.eval()


def _generation(population: Population, step: int, config: Config, world: World) -> tuple[Tensor, Tensor]:
    """The images (R, P, C, H, W) and traits (R, P, T) that are voted for in `step`.

    The ranks make a block each in turn.

    Raises Stopped between two blocks: what is lost saw no sensitive image, and is made again.
    """
    draws, rows = ImageDraws(world.device), len(population.images)
    into = [torch.zeros_like(tensor.flatten(0, 1)) for tensor in (population.images, population.traits)]

    def make(block: Tensor) -> tuple[Tensor, Tensor]:
        if step:
            return population.offspring(block, draws, step - 1, places(block, rows)[0])
        return population.first(block, draws)

    made_in_turn(into, make, config.evolve.batch_size, world, f"evolve: saved at iteration {step}")
    images, traits = (by_class(values, rows) for values in into)
    return images, traits


def _figures(
    account: Account, population: Population, charged: SampledGaussian, world: World
) -> dict[str, float]:
    """Numbers computed from the noisy counts alone, and the epsilon spent."""
    shown = {"images with votes": float((population.chances > 0).sum())}
    if account.private and world.is_main:
        shown["epsilon"] = epsilon((charged,), account.plan.delta, account.plan.accountant, 1e-3)
    return shown


def chances(counts: Tensor, threshold: float) -> Tensor:
    """Noisy counts of votes (R, P) -> chances float64 (R, P).

    Counts lowered by `threshold`, to 0 at least, over their sum.

    A row in which nothing is left has equal chances.
    """
    # Counts below the threshold are mostly noise (Lin et al. 2024, algorithm 1).
    left = (counts.double() - threshold).clamp(min=0)
    left = torch.where(left.sum(1, keepdim=True) > 0, left, 1.0)
    return left / left.sum(1, keepdim=True)
