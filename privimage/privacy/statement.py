"""PRIVACY.json and PRIVACY.md, from the charges behind a release in the ledger, never from the plan alone."""

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy.account import Account
from privimage.privacy.accounting import epsilon
from privimage.privacy.spent import Spent


def statement(
    config: Config,
    account: Account,
    made_by: Mapping[str, Sequence[str]],
    steps: int,
    versions: dict[str, str],
) -> dict:
    """What PRIVACY.json says of weights that `steps` uses of the training's mechanism have made, on the main
    rank.

    `made_by` are the names of the charges behind the weights, by stage. Raises UserError unless the ledger
    holds all of them, one at least for each mechanism of the plan and one for each step. Epsilon and delta
    are rounded up.
    """
    assert account.ledger is not None  # the main rank's
    # The charges behind the weights may belong to other runs as well, where this one is a copy.
    plan, settings, spent = account.plan, config.privacy, account.ledger.spent
    names = {name for stage in made_by.values() for name in stage}
    head = {
        "method": config.method,
        "private": True,
        "unit": plan.training.relation.unit,
        "neighbours": str(plan.training.relation),
        "accountant": plan.accountant,
    }
    tail = {
        "noise_source": settings.noise_source,
        "cryptographic_noise": settings.noise_source != "insecure-philox",
        "versions": versions,
    }
    if (why := _not_private(config, account, spent, names)) is not None:
        nothing: dict[str, Any] = {"private": False, "epsilon": None, "delta": None, "mechanisms": []}
        return head | nothing | {"reason": f"not private: {why}"} | tail

    # What is stated is what the ledger has, not what was planned: it may be less, never more.
    _require_proof(account, spent, made_by, steps)
    used = spent.by_part(account.run, names)
    by_stage = {mechanism.stage: mechanism for mechanism in plan.mechanisms}
    total = epsilon([m for uses in used.values() for m in uses], plan.delta, plan.accountant)
    promise = {
        "epsilon": rounded_up(total, places=4),
        "delta": rounded_up(plan.delta, digits=6),
        "promised_epsilon": plan.epsilon,
        "mechanisms": [
            by_stage[stage].described(uses) for stage, all_uses in used.items() for uses in all_uses
        ],
    }
    return head | promise | tail


def _not_private(config: Config, account: Account, spent: Spent, names: set[str]) -> str | None:
    """Why nothing is promised, as the ledger has it; None if it is private."""
    # One run without noise anywhere behind the weights is enough.
    runs = {account.run} | {spent.charges[name].run for name in names if name in spent.charges}
    if not runs & spent.not_private and account.private:
        return None
    return "a fixed key was used" if config.spec.private else "this method adds no noise"


def _require_proof(account: Account, spent: Spent, made_by: Mapping[str, Sequence[str]], steps: int) -> None:
    assert account.ledger is not None  # the main rank's
    # Each mechanism must have left as many charges as it was used, and each of them must be found.
    for part in account.plan.mechanisms:
        names = made_by.get(part.stage, ())
        needed = steps if part is account.plan.training else 1
        if needed < 1 or len(set(names)) < needed:
            raise UserError(
                f"{account.ledger.path}: {len(set(names))} of the {needed} uses of the {part.name} that "
                "made these weights are known;"
                " what came out of them must not be released"
            )
        missing = sum(name not in spent.charges for name in names)
        if missing:
            raise UserError(
                f"{account.ledger.path}: {missing} of the {len(names)} uses of the {part.name} that made "
                "these weights are not in the"
                " ledger; what came out of them must not be released"
            )


def rounded_up(value: float, places: int | None = None, digits: int | None = None) -> float:
    """`value` rounded up to so many decimal places or significant digits, so that the printed number is a
    bound.
    """
    # Through the decimal text: binary rounding could lower a bound by its last digit.
    exact = Decimal(repr(float(value)))
    if places is not None:
        return float(exact.quantize(Decimal(1).scaleb(-places), ROUND_CEILING))
    return float(Context(prec=digits, rounding=ROUND_CEILING).plus(exact))


def _what_may_differ(said: dict) -> str:
    replaced = said["neighbours"].startswith("replace")
    if said["unit"] == "group":
        return (
            "Whether the sensitive set held all images of any single group (those that its owner has "
            "declared to belong together, as those of one person) "
            + ("or those of another group in their place" if replaced else "or none of them")
        )
    if replaced:
        return "Whether any single image of the sensitive set was this one or another"
    return "Whether any single image was in the sensitive set or not"


def _whom_it_covers(said: dict) -> str:
    if said["unit"] == "group":
        return "a person whose images are in several groups, or in those of others, is protected less"
    return "a person with several images is protected less"


def statement_for_people(said: dict) -> str:
    """PRIVACY.md: the same in words."""
    if not said["private"]:
        return (
            f"# Not private\n\nThis data set is **{said['reason']}**. Do not share it as if it protected "
            "anyone.\n"
        )
    lines = [
        "# What this data set promises\n",
        (
            f"It was made by {said['method']} under **({said['epsilon']}, {said['delta']})-differential "
            f"privacy** (accountant: {said['accountant']})."
        ),
        (
            f"{_what_may_differ(said)} changes the probability of anything that could be learned from this "
            f"folder by a factor of at most e^{said['epsilon']}, but for a probability of {said['delta']}."
        ),
        f"Neighbouring sets: {said['neighbours']}; {_whom_it_covers(said)}.\n",
        "What was drawn from the sensitive set:\n",
        *(
            f"- {m['name']}: {m['mechanism']}, noise multiplier {m['noise_multiplier']:g}, sample rate "
            f"{m['sample_rate']:.6g}, {m['count']} times"
            for m in said["mechanisms"]
        ),
        f"\nNoise: {said['noise_source']}"
        + (
            "."
            if said["cryptographic_noise"]
            else " - not a cryptographic generator: whoever can guess its state can subtract the noise."
        ),
        (
            "\nThe promise covers what is in this folder, and nothing else: neither when it was made nor how "
            "long that took (dates of files"
        ),
        (
            "included), nor other releases from the same sensitive set, which add to it; the owner's ledger "
            "keeps the sum.\n"
        ),
    ]
    return "\n".join(lines)
