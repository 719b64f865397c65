"""`privimage audit`: attack the private training with canaries, and print what that shows."""

import os
import sys

import torch
from rich.console import Console
from rich.table import Table

from privimage.config import Config
from privimage.distributed.world import connect
from privimage.errors import UserError
from privimage.privacy.accounting import epsilon
from privimage.privacy.audit import SHARES, audit, best, guesses_of
from privimage.privacy.keys import RootKey
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.plan import PrivacyPlan, make_plan
from privimage.privacy.refutation import Finding, find


def run(config: Config, count: int, canaries: int, confidence: float, images: int | None = None) -> int:
    """Audit the fine-tuning that `config` plans for `count` units, once as it is and once with a tenth of
    its noise; print the findings.

    A canary has `images` images: by default 1, or those that a step looks at where groups are the unit.

    Returns 0 if the first keeps its promise and the second is seen to break it, 1 otherwise. Touches neither
    sensitive data nor a ledger. Raises UserError for a method without noise, or for so few canaries that even
    right guesses throughout would refute nothing.
    """
    if not config.spec.private:
        raise UserError(f"method: {config.method} adds no noise; there is no promise to audit")
    plan = make_plan(config, count)
    images = images or plan.the(DPSGD).per_group
    claim = epsilon((plan.the(DPSGD).composition,), plan.delta, plan.accountant)
    # Even right guesses throughout must be able to refute the claim, or the audit can only pass.
    most = guesses_of(canaries)[-1]
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
        # Twice: as planned, where the claim must stand, and with a tenth of the noise, where it must fall. An
        # audit that cannot see the second says nothing.
        runs = {}
        for name, factor in (("as planned", 1.0), ("a tenth", 0.1)):
            root = world.broadcast_object(RootKey(os.urandom(32)))
            runs[name] = audit(config, plan, canaries, confidence, root, world, factor, images)
    except (Exception, KeyboardInterrupt) as error:
        status = world.fail(error)
    else:
        planned, broken = (best(findings) for findings in runs.values())
        status = 0 if planned <= claim < broken else 1
        if world.is_main:
            of = f" of {images} images" if images > 1 else ""
            _show(f"{canaries} canaries{of}, confidence {100 * confidence:g} %", plan, claim, runs)
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
        f"fine-tuning without the query; neighbours: {plan.training.relation}"
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
