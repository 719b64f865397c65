"""`privimage audit`.

Does the private training keep its promise? One run with canaries bounds its epsilon from below.

Each of m canaries takes part or not by a fair coin of its own. A canary is the worst image that there could
be: its gradient, much longer than the clipping bound, lies along a coordinate that is nobody else's.
Everything else is what fine-tuning uses. The attacker sees what DP-SGD releases, the noised sums; it scores
each canary by its coordinate and guesses "took part" for the highest scores, "did not" for the lowest, and
nothing in between. A mechanism that is private lets few guesses be right.

References: Steinke, Nasr and Jagielski 2023 (one run, many canaries); Mahloujifar, Melis and Chaudhuri 2024
(the whole trade-off curve in place of one epsilon and delta).
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset

from privimage.config import Config
from privimage.distributed.world import World, connect
from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian, epsilon, profile
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import GRADIENTS, trained_parameters
from privimage.privacy.keys import RootKey
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.noise import bit_generator
from privimage.privacy.plan import PrivacyPlan, make_plan
from privimage.telemetry.progress import Progress

EPSILONS = (
    40 * np.linspace(0, 1, 401) ** 2
)  # where a trade-off curve is touched by its lines: more closely near 0
# Shares of the canaries that are guessed. Few guesses tell most of a mechanism that keeps its promise; many
# are needed to show that one breaks a large epsilon. Both are tried, each at half the error.
SHARES = (0.2, 0.8)
LENGTH = 1000.0  # of a canary's gradient, in clipping bounds


class TradeOff:
    """What a mechanism allows an attacker, as lines under its trade-off curve.

    It is (epsilon, delta)-DP for each pair given.

    An event of probability y under one data set has at least `least(y)` under each neighbour.
    """

    def __init__(self, epsilons: np.ndarray, deltas: np.ndarray):
        """`epsilons` >= 0 (E,), `deltas` in [0, 1] (E,)."""
        # P(E) <= e^eps Q(E) + delta for the event, and for its complement with P and Q exchanged.
        grown = np.exp(epsilons)
        self.slopes = np.concatenate([1 / grown, grown, [0.0]])
        self.intercepts = np.concatenate([-deltas / grown, 1 - deltas - grown, [0.0]])

    def least(self, y: float) -> float:
        """The smallest probability under a neighbour of an event of probability `y` in [0, 1]."""
        return float((self.slopes * y + self.intercepts).max())


def refuted(curve: TradeOff, canaries: int, guesses: int, right: int, level: float) -> bool:
    """Whether a mechanism with this curve gets `right` or more of `guesses` guesses right with a probability
    below `level`.

    m canaries, r guesses, W of them right, p_c = P(W = c). Turn the coin of canary i: a guess that was right
    is now wrong, the others stay. So for any j, averaging over all i and all coins (the curve is convex),
        sum_{c >= j} (c / m) p_c <= y  implies  sum_{c >= j} ((r - c + 1) / m) p_{c-1} >= least(y). With a =
        sum_{c >= j} (c / m) p_c and b = sum_{c >= j} ((r - c) / m) p_c, the second sum is b one step down,
        and a + b = (r / m) P(W >= j). P(W >= right) = level costs the other outcomes least if all of it sits
        on W = right; from there down to W = 0 each p is taken as small as the curve allows. The level cannot
        be reached if the total exceeds 1 (Mahloujifar et al. 2024, Algorithm 1).
    """
    a, b = right * level / canaries, (guesses - right) * level / canaries
    for j in range(right, 0, -1):
        lower = curve.least(a)
        if lower <= b:
            return False  # the curve asks for nothing more: further down neither a nor b would change
        a += (lower - b) * (j - 1) / (guesses - j + 1)
        b = lower
        if (a + b) * canaries > guesses:
            return True
    return False


@dataclass(frozen=True)
class Finding:
    """What the guesses of one run show: with the confidence of the audit, epsilon is at least this."""

    guesses: int
    right: int
    any_epsilon: float  # of any mechanism whatever, at the delta of the plan
    # of the planned mechanism with another amount of noise: tighter, since its whole trade-off curve counts
    epsilon: float


def find(plan: DPSGD, delta: float, canaries: int, guesses: int, right: int, level: float) -> Finding:
    """The largest epsilons at `delta` that the guesses refute with an error of at most `level`."""

    def any_refuted(value: float) -> bool:
        return refuted(TradeOff(np.array([value]), np.array([delta])), canaries, guesses, right, level)

    def less_noise(by: float) -> SampledGaussian:
        return dataclasses.replace(plan.composition, noise_multiplier=plan.noise_multiplier * math.exp(-by))

    def planned_refuted(by: float) -> bool:
        return refuted(
            TradeOff(EPSILONS, profile((less_noise(by),), EPSILONS)), canaries, guesses, right, level
        )

    any_epsilon = _largest(any_refuted, 0.0, 1.0, 0.0, 1e-3)
    by = _largest(planned_refuted, 0.0, 0.25, -4.0, 5e-3)
    return Finding(
        guesses, right, any_epsilon or 0.0, 0.0 if by is None else epsilon((less_noise(by),), delta)
    )


def _largest(
    holds: Callable[[float], bool], start: float, step: float, floor: float, tolerance: float
) -> float | None:
    """The largest value at which `holds` (true up to there, false beyond), to `tolerance`.

    None if it is below `floor`.
    """
    low = start
    while not holds(low):
        low -= step
        if low < floor:
            return None
    high = low + step
    while holds(high):
        low, high = high, high + step
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


class Canaries(Dataset):
    """Those that take part: int64 (m,); a batch is the canaries alone, and an empty one is a batch."""

    def __init__(self, present: Tensor):
        self.present = present

    def __len__(self) -> int:
        return len(self.present)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor]:
        return (self.present[indices],)


class CanaryLosses:
    """The loss of a canary.

    Its coordinate, so steep that its gradient is much longer than the clipping bound.
    """

    def __init__(self, plan: DPSGD, device: torch.device):
        self.plan, self.device = plan, device

    def draw(self, canaries: Tensor, seed: int) -> tuple[Tensor]:
        """Canaries int64 (B,) with K copies each, (B, K); there is nothing to draw."""
        return (canaries.to(self.device)[:, None].expand(-1, self.plan.noise_copies),)

    def probe(self, count: int) -> tuple[Tensor]:
        """What `draw` gives for the first `count` canaries."""
        return self.draw(torch.arange(count), seed=0)

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """Canaries (n,) -> losses (n,)."""
        return LENGTH * self.plan.max_grad_norm * module(tensors[0]).flatten()


def play(
    config: Config, plan: DPSGD, canaries: int, root: RootKey, world: World, noise_factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """One run of the private training on those canaries whose coin says so, its noise multiplied by
    `noise_factor`.

    Returns the coins, bool (m,), and the scores, float64 (m,): each canary's coordinate, summed over the
    noised sums of all steps. The same on all ranks.
    """
    source = config.privacy.noise_source
    coins = bit_generator(source, root.derive("audit coins")).random_raw(canaries) < np.uint64(1 << 63)
    module = nn.Embedding(canaries, 1, device=world.device)
    nn.init.zeros_(module.weight)
    losses = CanaryLosses(plan, world.device)
    physical = physical_batch_size(config.finetune, module, losses, losses.probe, world.device, world.size)
    steps = PrivateSteps(
        plan,
        GRADIENTS[config.finetune.gradients](module, filled_to=physical),
        losses,
        torch.optim.SGD(trained_parameters(module), lr=1.0),
        Canaries(torch.from_numpy(np.flatnonzero(coins))),
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
    """How many guesses are right.

    "took part" for the `guesses` / 2 highest scores, "did not" for as many lowest.
    """
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
) -> list[Finding]:
    """Play once, and judge the guesses of each share.

    All that is found holds together with probability `confidence`.
    """
    coins, scores = play(config, plan.the(DPSGD), canaries, root, world, noise_factor)
    level = (1 - confidence) / len(SHARES)
    return [
        find(plan.the(DPSGD), plan.delta, canaries, r, guess(coins, scores, r), level)
        for r in _guesses(canaries)
    ]


def best(findings: list[Finding]) -> float:
    """The lower bound on epsilon that an audit has reached."""
    return max(finding.epsilon for finding in findings)


def _guesses(canaries: int) -> list[int]:
    return [2 * round(share * canaries / 2) for share in SHARES]


def run(config: Config, count: int, canaries: int, confidence: float) -> int:
    """Audit the fine-tuning that `config` plans for `count` images, once as it is and once with a tenth of
    its noise; print the findings.

    Returns 0 if the first keeps its promise and the second is seen to break it, 1 otherwise. Touches neither
    sensitive data nor a ledger. Raises UserError for a method without noise, or for so few canaries that even
    right guesses throughout would refute nothing.
    """
    if not config.spec.private:
        raise UserError(f"method: {config.method} adds no noise; there is no promise to audit")
    plan = make_plan(config, count)
    claim = epsilon((plan.the(DPSGD).composition,), plan.delta, plan.accountant)
    most = _guesses(canaries)[-1]
    if (
        find(plan.the(DPSGD), plan.delta, canaries, most, most, (1 - confidence) / len(SHARES)).epsilon
        <= claim
    ):
        raise UserError(
            f"--canaries: {canaries} are too few, even {most} right guesses would not refute epsilon "
            f"{claim:.4g}"
        )
    world = connect(config.runtime)
    torch.set_num_threads(1)  # a step on canaries is too small to be shared by several
    try:
        runs = {}
        for name, factor in (("as planned", 1.0), ("a tenth", 0.1)):
            root = world.broadcast_object(RootKey(os.urandom(32)))
            runs[name] = audit(config, plan, canaries, confidence, root, world, factor)
    except (Exception, KeyboardInterrupt) as error:
        status = world.fail(error)
    else:
        planned, broken = (best(findings) for findings in runs.values())
        status = 0 if planned <= claim < broken else 1
        if world.is_main:
            _show(f"{canaries} canaries, confidence {100 * confidence:g} %", plan, claim, runs)
    world.close()
    return status


def _show(title: str, plan: PrivacyPlan, claim: float, runs: dict[str, list[Finding]]) -> None:
    console, finetune = Console(width=None if sys.stdout.isatty() else 160, highlight=False), plan.the(DPSGD)
    console.print(f"{finetune.steps} private steps at sample rate {float(finetune.sample_rate):.6g}; {title}")
    table = Table()
    for column in ("noise", "guesses", "right", "epsilon at least", "of any mechanism"):
        table.add_column(column, justify="left" if column == "noise" else "right")
    for name, findings in runs.items():
        for f in findings:
            table.add_row(name, str(f.guesses), str(f.right), f"{f.epsilon:.2f}", f"{f.any_epsilon:.2f}")
    console.print(table)
    planned, broken = (best(findings) for findings in runs.values())
    console.print(
        f"claimed: epsilon {claim:.3f} at delta {plan.delta:.3g}, by {plan.accountant.upper()}, for "
        "fine-tuning without the query"
    )
    console.print(
        f"noise as planned: epsilon is at least {planned:.2f}: "
        + ("the claim stands" if planned <= claim else "[bold red]the claim is refuted[/]")
    )
    seen = (
        "the audit sees the breach"
        if broken > claim
        else "[bold red]the audit misses the breach; more --canaries may help[/]"
    )
    console.print(f"a tenth of the noise: epsilon is at least {broken:.2f}: {seen}")
