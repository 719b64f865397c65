"""An audit of all that a run draws: one play with canaries bounds its epsilon from below.

Each of m canaries takes part or not by an independent fair coin. A canary is the worst image, or group of
images, that there could be: what it adds to a sum, much more than the bound on it, lies along a coordinate
that no other canary uses. Everything else is what the stages use. The attacker sees what the mechanisms
release, the noised sums of each; it scores each canary by its coordinate in all of them and guesses "took
part" for the highest scores, "did not" for the lowest, and nothing in between. A run that is private lets few
guesses be right.

References: Steinke, Nasr and Jagielski 2023 (one run, many canaries); Mahloujifar, Melis and Chaudhuri 2024
(the whole trade-off curve in place of one epsilon and delta).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.data.sensitive import GroupedSet, SensitiveSet, StepData
from privimage.distributed.world import World
from privimage.privacy import audit_statistics
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.audit_statistics import LENGTH, Canaries
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import GRADIENTS, trained_parameters
from privimage.privacy.groups import GroupLosses
from privimage.privacy.keys import RootKey
from privimage.privacy.mechanisms import DPSGD, Mechanism
from privimage.privacy.noise import bit_generator
from privimage.privacy.plan import PrivacyPlan
from privimage.privacy.refutation import Finding, find
from privimage.telemetry.progress import Progress

# Shares of the canaries that are guessed. Few guesses tell most of a mechanism that keeps its promise; many
# are needed to show that one breaks a large epsilon. Both are tried, each at half the error.
SHARES = (0.2, 0.8)


class CanaryLosses:
    """Loss of a canary's image: the coordinate of the canary, scaled so that the gradient is much longer than
    the clipping bound.

    The label of an image is its canary. A black one has the opposite gradient of a white one.
    """

    def __init__(self, plan: DPSGD, device: torch.device):
        self.plan, self.device = plan, device

    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, 1, 1, 1) and labels (B,) with K copies each, (B, K); there is nothing to draw."""
        signs = images.flatten() / 127.5 - 1
        copies = self.plan.noise_copies
        return labels[:, None].expand(-1, copies), signs[:, None].expand(-1, copies)

    def probe(self, count: int) -> tuple[Tensor, Tensor]:
        """The tensors (B, K) of `draw` for the first `count` canaries."""
        labels = torch.arange(count, device=self.device)
        return self.draw(torch.full((count, 1, 1, 1), 255, device=self.device), labels, labels, seed=0)

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """Canaries (n,) and signs (n,) -> losses (n,)."""
        canaries, signs = tensors
        return LENGTH * self.plan.max_grad_norm * signs * module(canaries).flatten()


def _set_of(coins: np.ndarray, images: int, plan: DPSGD, device: torch.device) -> StepData:
    """The set that the coins bool (m,) have made of the canaries, each of which has `images` alike.

    A canary takes part or not; where neighbours have a unit replaced it is white, or black.
    """
    canaries = Canaries.of(coins, images, plan)
    pixels = np.where(canaries.signs > 0, 255, 0).astype(np.uint8).reshape(-1, 1, 1, 1)
    found = SensitiveSet(pixels, canaries.owners, device, "device")
    if plan.relation.unit == "image":
        return found
    # Numbered from 0 without gaps.
    return GroupedSet(found, np.unique(canaries.owners, return_inverse=True)[1], plan.per_group)


def tossed(config: Config, canaries: int, root: RootKey) -> np.ndarray:
    """A fair coin for each canary, bool (m,): whether it takes part."""
    bits = bit_generator(config.privacy.noise_source, root.derive("audit coins"))
    return bits.random_raw(canaries) < np.uint64(1 << 63)


@dataclass(frozen=True)
class Part:
    """A claim that is attacked: of one mechanism, or of all that a run uses together."""

    name: str
    compositions: tuple[SampledGaussian, ...]

    @property
    def together(self) -> bool:
        return len(self.compositions) > 1


def parts_of(plan: PrivacyPlan) -> list[Part]:
    """Each mechanism of a plan, and last, where there are several, all of them."""
    parts = [Part(one.name, (one.composition,)) for one in plan.mechanisms]
    return parts if len(parts) == 1 else [*parts, Part("all together", plan.compositions)]


@dataclass(frozen=True)
class Game:
    """What canaries take part in: all that a run draws, once."""

    config: Config
    plan: PrivacyPlan
    root: RootKey
    world: World
    noise_factor: float = 1.0  # by which all noise is multiplied
    images: int = 1  # of each canary


def play(game: Game, coins: np.ndarray) -> list[np.ndarray]:
    """One use of all mechanisms of the plan on the canaries that the coins bool (m,) have chosen.

    Returns scores, float64 (m,), for each of `parts_of`, the same on all ranks: each canary's coordinate in
    what the mechanism has released, weighted by what it adds there over the variance of the noise, as the
    likelihood ratio of independent normal numbers is.
    """
    scores = []
    for mechanism in game.plan.mechanisms:
        noise = mechanism.noise_multiplier
        if isinstance(mechanism, DPSGD):
            found = train(game, coins)
            # Over T steps a canary adds about q T, beside noise of variance T sigma^2.
            scores.append(float(mechanism.sample_rate) / noise**2 * found / mechanism.contribution)
        else:
            changed, keys = mechanism.with_noise(game.noise_factor * noise), _keys(mechanism, game.root)
            found = audit_statistics.scores(changed, coins, game.images, game.config, keys)
            scores.append(mechanism.composition.count / noise**2 * found)
    return scores if len(scores) == 1 else [*scores, np.sum(scores, axis=0)]


def _keys(mechanism: Mechanism, root: RootKey) -> list[bytes]:
    """A key for each draw of the noise of a mechanism."""
    return [root.derive("audit noise", mechanism.stage, str(draw)) for draw in range(mechanism.draws)]


def train(game: Game, coins: np.ndarray) -> np.ndarray:
    """The private training on those canaries: each canary's coordinate, summed over the noised sums of all
    steps, float64 (m,); see `play`.
    """
    config, plan, world = game.config, game.plan.the(DPSGD), game.world
    source, canaries = config.privacy.noise_source, len(coins)
    # One weight per canary, so that no two gradients share a coordinate.
    module = nn.Embedding(canaries, 1, device=world.device)
    nn.init.zeros_(module.weight)
    losses: CanaryLosses | GroupLosses = CanaryLosses(plan, world.device)
    if plan.relation.unit == "group":
        losses = GroupLosses(losses, plan.per_group)
    physical = physical_batch_size(
        config.finetune, module, losses, losses.probe, world.device, world.size, plan.per_group
    )
    steps = PrivateSteps(
        plan,
        GRADIENTS[config.finetune.gradients](module, filled_to=physical),
        losses,
        torch.optim.SGD(trained_parameters(module), lr=1.0),
        _set_of(coins, game.images, plan, world.device),
        world,
        Randomness(game.root, source, b"audit"),
        physical=physical,
        charge=lambda name: True,
        state=lambda: [module.weight],
        noise_factor=game.noise_factor,
    )
    label = "audit" if game.noise_factor == 1 else f"audit, noise x {game.noise_factor:g}"
    with Progress(label, plan.steps, shown=world.is_main) as bar:
        for _ in steps:
            bar.advance()
    # Descent by steps of 1 has led from 0 to minus the sum of what was released, divided by the expected
    # batch.
    return -module.weight.detach().flatten().double().cpu().numpy() * plan.logical_batch_size


def guess(coins: np.ndarray, scores: np.ndarray, guesses: int) -> int:
    """How many of `guesses` guesses are right, for coins bool (m,) and scores float64 (m,).

    "took part" for the `guesses` / 2 highest scores, "did not" for as many lowest.
    """
    # Canaries in the middle are not guessed: the fewer guesses, the surer each.
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    return int(coins[order[-half:]].sum() + (~coins[order[:half]]).sum())


def audit(game: Game, canaries: int, confidence: float) -> list[list[Finding]]:
    """Play once, and judge the guesses of each share for each of `parts_of`.

    All that is found holds together with probability `confidence`.
    """
    coins = tossed(game.config, canaries, game.root)
    return [
        judged(
            game.plan,
            part,
            canaries,
            [(guesses, guess(coins, scores_of_part, guesses)) for guesses in guesses_of(canaries)],
            confidence,
        )
        for part, scores_of_part in zip(parts_of(game.plan), play(game, coins), strict=True)
    ]


def judged(
    plan: PrivacyPlan, part: Part, canaries: int, guesses: Iterable[tuple[int, int]], confidence: float
) -> list[Finding]:
    """What follows for a part of a plan from `guesses`: how many, and how many of them were right; see
    `audit`.
    """
    level = level_of(plan, part, confidence)
    return [find(part.compositions, plan.delta, canaries, made, right, level) for made, right in guesses]


def level_of(plan: PrivacyPlan, part: Part, confidence: float) -> float:
    """The error of each finding of a part, of which one is made for each of `SHARES`.

    One game is judged for all parts, whose errors add up: half of it is for all mechanisms together.
    """
    several = len(plan.mechanisms)
    of_part = 1.0 if several == 1 else 0.5 if part.together else 0.5 / several
    return (1 - confidence) / len(SHARES) * of_part


def best(findings: list[Finding]) -> Finding:
    """The finding with the highest lower bound on epsilon."""
    return max(findings, key=lambda finding: finding.epsilon)


def guesses_of(canaries: int) -> list[int]:
    return [2 * round(share * canaries / 2) for share in SHARES]
