"""The promise: what PRIVACY.json states, and how epsilon was spent."""

from privimage.evaluation import figures as draw
from privimage.privacy.accounting import SampledGaussian, best_guess
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
    return {"privacy": privacy}


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


PROMISE = Measure(("privacy",), _take, figures=("budget",))
