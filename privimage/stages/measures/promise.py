"""The promise: what PRIVACY.json states, and how epsilon was spent."""

from pathlib import Path

from privimage.evaluation import figures as draw
from privimage.privacy.accounting import SampledGaussian, best_guess, epsilon
from privimage.privacy.ledger import read
from privimage.privacy.statement import rounded_up
from privimage.stages.measures.subject import Measure, Subject
from privimage.storage.files import read_json
from privimage.telemetry.curves import points

STATED = (
    "private",
    "epsilon",
    "delta",
    "accountant",
    "unit",
    "neighbours",
    "promised_epsilon",
    "reason",
    "mechanisms",
)


def _take(subject: Subject) -> dict:
    if not subject.world.is_main:
        return {}
    privacy = _stated(subject) if subject.after else _nothing()
    # From the public curve, which shows epsilon at a twentieth of the steps.
    steps, spent = points(subject.run.tensorboard / subject.config.spec.training, "epsilon")
    if len(steps) > 1 and privacy["private"]:
        draw.budget(subject.figures / "budget.png", steps, spent, privacy["promised_epsilon"])
    return {"privacy": privacy, "ledger": _ledger(subject)}


def _ledger(subject: Subject) -> dict | None:
    """What all runs have spent on the sensitive set; None where its ledger is not at hand."""
    path = subject.run.private / "account.json"
    account = read_json(path) if path.exists() else None
    if account is None or not account.get("version"):
        return None
    ledger = Path(account["ledger"]["path"])
    if not ledger.exists():
        return None
    spent, plan = read(ledger), account["plan"]
    mechanisms = spent.mechanisms()
    return {
        "runs": len({charge.run for charge in spent.charges.values()} | spent.not_private),
        "not_private": len(spent.not_private),
        "epsilon": rounded_up(epsilon(mechanisms, plan["delta"], plan["accountant"]), 4)
        if mechanisms
        else 0.0,
        "delta": plan["delta"],
    }


def _stated(subject: Subject) -> dict:
    # Only what the release states; nothing is computed again.
    said = read_json(subject.run.release / "PRIVACY.json")
    stated = {name: said[name] for name in STATED if name in said}
    if not said["private"]:
        return stated
    replacement = said["neighbours"].startswith("replace")
    used = [
        SampledGaussian(m["noise_multiplier"], m["sample_rate"], m["count"], replacement)
        for m in said["mechanisms"]
    ]
    return stated | {"best_guess": best_guess(used)}


def _nothing() -> dict:
    return {
        "private": False,
        "epsilon": None,
        "delta": None,
        "accountant": None,
        "reason": "the classifiers were trained on the sensitive images themselves",
        "mechanisms": [],
    }


PROMISE = Measure(("privacy", "ledger"), _take, figures=("budget",))
