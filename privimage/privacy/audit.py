"""An audit of the private training: one run with canaries bounds its epsilon from below.

Each of m canaries takes part or not by an independent fair coin. A canary is the worst image, or group of
images, that there could be: its gradient, much longer than the clipping bound, lies along a coordinate that
no other canary uses.
Everything else is what fine-tuning uses. The attacker sees what DP-SGD releases, the noised sums; it scores
each canary by its coordinate and guesses "took part" for the highest scores, "did not" for the lowest, and
nothing in between. A mechanism that is private lets few guesses be right.

References: Steinke, Nasr and Jagielski 2023 (one run, many canaries); Mahloujifar, Melis and Chaudhuri 2024
(the whole trade-off curve in place of one epsilon and delta).
"""

import numpy as np
import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.data.sensitive import GroupedSet, SensitiveSet, StepData
from privimage.distributed.world import World
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import GRADIENTS, trained_parameters
from privimage.privacy.groups import GroupLosses
from privimage.privacy.keys import RootKey
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.noise import bit_generator
from privimage.privacy.plan import PrivacyPlan
from privimage.privacy.refutation import Finding, find
from privimage.telemetry.progress import Progress

# Shares of the canaries that are guessed. Few guesses tell most of a mechanism that keeps its promise; many
# are needed to show that one breaks a large epsilon. Both are tried, each at half the error.
SHARES = (0.2, 0.8)
LENGTH = 1000.0  # of a canary's gradient, in clipping bounds


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
    present = np.arange(len(coins)) if plan.relation.replacement else np.flatnonzero(coins)
    labels = np.repeat(present, images)
    pixels = np.where(coins[labels], 255, 0).astype(np.uint8).reshape(-1, 1, 1, 1)
    found = SensitiveSet(pixels, labels, device, "device")
    if plan.relation.unit == "image":
        return found
    return GroupedSet(found, np.repeat(np.arange(len(present)), images), plan.per_group)


def play(
    config: Config,
    plan: DPSGD,
    canaries: int,
    root: RootKey,
    world: World,
    noise_factor: float = 1.0,
    images: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """One run of the private training on those canaries whose coin says so, each of `images` images, its
    noise multiplied by `noise_factor`.

    Returns the coins, bool (m,), and the scores, float64 (m,): each canary's coordinate, summed over the
    noised sums of all steps. The same on all ranks.
    """
    # A fair coin per canary decides whether it is in the set.
    source = config.privacy.noise_source
    coins = bit_generator(source, root.derive("audit coins")).random_raw(canaries) < np.uint64(1 << 63)
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
        _set_of(coins, images, plan, world.device),
        world,
        Randomness(root, source, b"audit"),
        physical=physical,
        charge=lambda name: True,
        state=lambda: [module.weight],
        noise_factor=noise_factor,
    )
    with Progress(
        "audit" if noise_factor == 1 else f"audit, noise x {noise_factor:g}", plan.steps, shown=world.is_main
    ) as bar:
        for _ in steps:
            bar.advance()
    # Descent by steps of 1 has led from 0 to minus the sum of what was released, divided by the expected
    # batch.
    return coins, -module.weight.detach().flatten().double().cpu().numpy() * plan.logical_batch_size


def guess(coins: np.ndarray, scores: np.ndarray, guesses: int) -> int:
    """How many of `guesses` guesses are right, for coins bool (m,) and scores float64 (m,).

    "took part" for the `guesses` / 2 highest scores, "did not" for as many lowest.
    """
    # Canaries in the middle are not guessed: the fewer guesses, the surer each.
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    return int(coins[order[-half:]].sum() + (~coins[order[:half]]).sum())


def audit(
    config: Config,
    plan: PrivacyPlan,
    canaries: int,
    confidence: float,
    root: RootKey,
    world: World,
    noise_factor: float = 1.0,
    images: int = 1,
) -> list[Finding]:
    """Play once with canaries of `images` images, and judge the guesses of each share.

    All that is found holds together with probability `confidence`.
    """
    # One game, judged twice; the error is shared between the two shares.
    coins, scores = play(config, plan.the(DPSGD), canaries, root, world, noise_factor, images)
    level = (1 - confidence) / len(SHARES)
    return [
        find(plan.the(DPSGD), plan.delta, canaries, r, guess(coins, scores, r), level)
        for r in guesses_of(canaries)
    ]


def best(findings: list[Finding]) -> float:
    """The lower bound on epsilon that an audit has reached."""
    return max(finding.epsilon for finding in findings)


def guesses_of(canaries: int) -> list[int]:
    return [2 * round(share * canaries / 2) for share in SHARES]
