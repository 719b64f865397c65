"""What a ledger allows a run to begin: within its budget, and for the relation of all its runs."""

from collections.abc import Mapping
from pathlib import Path

from privimage.errors import UserError
from privimage.privacy.accounting import SampledGaussian, epsilon
from privimage.privacy.relation import Relation
from privimage.privacy.spent import Spent

Plans = Mapping[str, SampledGaussian]  # what a run is going to do, by part


def require_relation(spent: Spent, plan: Plans, relation: Relation, path: Path) -> None:
    """Raise UserError if the ledger at `path` has a run whose promise is for another relation."""
    # A run that adds no noise promises nothing, for no relation.
    for held in spent.relations if plan else ():
        if held != relation:
            otherwise = ", with other groups" if str(held) == str(relation) else ""
            raise UserError(
                f"privacy.unit, privacy.neighbours: this run would promise for neighbours that {relation}, "
                f"and the ledger of the set ({path}) has runs for neighbours that {held}{otherwise}; "
                "what they spend does not add up"
            )


def require_room(
    spent: Spent,
    run: str,
    plan: Plans,
    budget: tuple[float, float] | None,
    accountant: str,
    path: Path,
) -> None:
    """Raise UserError if `run` with its `plan` would exceed a budget, or names another than the ledger."""
    if budget is not None and spent.budget is not None and budget != spent.budget:
        raise UserError(
            f"privacy.budget: {describe(budget)} is not the one that the ledger of the set holds, "
            f"{describe(spent.budget)}; whoever owns the"
            f" data may change it with `privimage privacy {path} --budget EPSILON --delta DELTA`"
        )
    # Announced and unfinished plans count in full, so that several runs cannot exceed the budget
    # together.
    if (budget := budget or spent.budget) is None:
        return
    limit, delta = budget
    total = epsilon(spent.promised(run, plan), delta, accountant)
    if spent.not_private or total > limit:
        sum_told = "infinite, since a run without noise used it" if spent.not_private else f"{total:.4g}"
        raise UserError(
            f"privacy.budget: with this run epsilon on the sensitive set would be {sum_told}, more than "
            f"{limit:g} (ledger {path})"
        )


def describe(budget: tuple[float, float]) -> str:
    """A budget in words."""
    return f"epsilon {budget[0]:g} at delta {budget[1]:g}"
