"""`privimage audit`: attack what a run draws with canaries, and print what that shows."""

import os
import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from privimage.config import Config
from privimage.distributed.world import connect
from privimage.errors import UserError
from privimage.privacy.accounting import epsilon
from privimage.privacy.audit import Game, Part, audit, best, guesses_of, judged, parts_of
from privimage.privacy.keys import RootKey
from privimage.privacy.plan import PrivacyPlan, make_plan
from privimage.privacy.refutation import Finding


def run(config: Config, count: int, canaries: int, confidence: float, images: int | None = None) -> int:
    """Audit all mechanisms that `config` plans for `count` units, once as they are and once with a tenth of
    their noise; print the findings.

    A canary has `images` images: by default 1, or those that a step looks at where groups are the unit.

    Returns 0 if the first keeps its promise and the second is seen to break it, 1 otherwise. Touches neither
    sensitive data nor a ledger. Raises UserError for a method without noise, or for so few canaries that even
    right guesses throughout would refute nothing.
    """
    if not config.spec.private:
        raise UserError(f"method: {config.method} adds no noise; there is no promise to audit")
    plan = make_plan(config, count)
    images = images or config.per_unit
    parts = parts_of(plan)
    claims = [epsilon(part.compositions, plan.delta, plan.accountant) for part in parts]
    # Even right guesses throughout must be able to refute the claim, or the audit can only pass.
    most = guesses_of(canaries)[-1]
    if best(judged(plan, parts[-1], canaries, [(most, most)], confidence)).epsilon <= claims[-1]:
        raise UserError(
            f"--canaries: {canaries} are too few, even {most} right guesses would not refute epsilon "
            f"{claims[-1]:.4g}"
        )
    world = connect(config.runtime)
    torch.set_num_threads(1)  # a step on canaries is too small to be shared by several
    try:
        # Twice: as planned, where the claim must stand, and with a tenth of the noise, where it must fall. An
        # audit that cannot see the second says nothing.
        runs = []
        for factor in (1.0, 0.1):
            root = world.broadcast_object(RootKey(os.urandom(32)))
            found = audit(Game(config, plan, root, world, factor, images), canaries, confidence)
            runs.append([best(findings) for findings in found])
    except (Exception, KeyboardInterrupt) as error:
        status = world.fail(error)
    else:
        lines = [_Line(*line) for line in zip(parts, claims, *runs, strict=True)]
        status = 0 if all(line.stands for line in lines) and lines[-1].breach_is_seen else 1
        if world.is_main:
            of = f" of {images} images" if images > 1 else ""
            _show(f"{canaries} canaries{of}, confidence {100 * confidence:g} % for all lines", plan, lines)
    world.close()
    return status


@dataclass(frozen=True)
class _Line:
    """What was found of a part of the plan, with its noise and with a tenth of it."""

    part: Part
    claim: float
    planned: Finding
    tenth: Finding

    @property
    def stands(self) -> bool:
        return self.planned.epsilon <= self.claim

    @property
    def breach_is_seen(self) -> bool:
        return self.tenth.epsilon > self.claim


def _show(title: str, plan: PrivacyPlan, lines: list[_Line]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=title, title_justify="left")
    table.add_column("mechanism")
    for column in ("claimed", "at least", "right", "of any mechanism", "a tenth of the noise"):
        table.add_column(column, justify="right")
    for line in lines:
        found = line.planned
        table.add_row(
            f"{line.part.name}{_uses(line.part)}",
            f"{line.claim:.3f}",
            f"{found.epsilon:.2f}" if line.stands else f"[bold red]{found.epsilon:.2f}[/]",
            f"{found.right} of {found.guesses}",
            f"{found.any_epsilon:.2f}",
            f"{line.tenth.epsilon:.2f}",
        )
    console.print(table)
    console.print(
        f"epsilon at delta {plan.delta:.3g}, by {plan.accountant.upper()}; neighbours: "
        f"{plan.training.relation}"
    )
    refuted = ", ".join(line.part.name for line in lines if not line.stands)
    console.print(
        f"noise as planned: [bold red]the claim is refuted[/]: {refuted}"
        if refuted
        else f"noise as planned: epsilon is at least {lines[-1].planned.epsilon:.2f}: the claim stands"
    )
    seen = (
        "the audit sees the breach"
        if lines[-1].breach_is_seen
        else "[bold red]the audit misses the breach; more --canaries may help[/]"
    )
    console.print(f"a tenth of the noise: epsilon is at least {lines[-1].tenth.epsilon:.2f}: {seen}")


def _uses(part: Part) -> str:
    """How often a mechanism is used, on how much of the set."""
    if part.together:
        return ""
    (one,) = part.compositions
    rate = f" at sample rate {one.sample_rate:.6g}" if one.sample_rate < 1 else ""
    return f", {one.count} times{rate}" if one.count > 1 else rate
