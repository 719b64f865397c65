"""Warnings of a report: what its numbers say is wrong, and the likely reasons."""

import math
from dataclasses import dataclass, field
from typing import Any

NEAR_CHANCE = 0.2  # of the way from guessing to the real-data ceiling
DISAGREE = 0.5  # of the way from guessing to always right
REASONS = 3


@dataclass(frozen=True)
class Warned:
    """One box of the page."""

    title: str
    text: str
    reasons: list[str] = field(default_factory=list)


def warnings(report: dict[str, Any]) -> list[Warned]:
    """The warnings of report.json, most serious first; none for a method that makes no synthetic set."""
    if not report["synthetic"]:
        return []
    found = []
    if (share := _above_chance(report, report["accuracy"])) is not None and share < NEAR_CHANCE:
        best, chance = _best(report["accuracy"]), report["accuracy_chance"]
        text = (
            f"The best of the classifiers gets {best:.1f} % of the real test images right; saying always the "
            f"same class would get {chance:.1f} %. As it is, the synthetic set teaches next to nothing about "
            "the classes. The most likely reasons:"
        )
        found.append(Warned("The result is near chance", text, _reasons(report)))
    agreement = report.get("agreement")
    if agreement and _agrees(agreement) < DISAGREE:
        text = (
            "A classifier that learnt from one half of the synthetic set names only "
            f"{agreement['percent']:.1f} % of the other half as it is labelled (guessing: "
            f"{agreement['chance']:.1f} %). Either the images do not show their classes, or the labels are "
            "not theirs: whoever trains on them learns little. "
        )
        text += (
            "The labels are those of the private classifier, which sees more in an image than so few images "
            "can teach. More of them cost no privacy (privimage sample, synthesize.samples); better ones "
            "take more pretraining and private steps."
            if _by_classifier(agreement)
            else "Stronger guidance (synthesize.guidance) costs no privacy; the labels themselves are learnt "
            "in the private steps."
        )
        found.append(Warned("Labels and images disagree", text))
    return found


def _by_classifier(agreement: dict[str, Any]) -> bool:
    """Whether a private classifier gave the labels."""
    return agreement.get("relabelled") is not None


def _best(scores: dict[str, float | None] | None) -> float | None:
    return max((score for score in (scores or {}).values() if score is not None), default=None)


def _above_chance(report: dict[str, Any], scores: dict[str, float | None] | None) -> float | None:
    """How far the best of some accuracies is on the way from guessing (0) to the real-data ceiling (1)."""
    best, chance = _best(scores), report.get("accuracy_chance")
    if best is None or chance is None:
        return None
    top = max(_best(report.get("accuracy_ceiling")) or 100.0, chance + 1)
    return (best - chance) / (top - chance)


def _agrees(agreement: dict[str, Any]) -> float:
    return (agreement["percent"] - agreement["chance"]) / (100 - agreement["chance"])


def _reasons(report: dict[str, Any]) -> list[str]:
    """The most likely reasons for a result near chance, by what the report knows, most likely first."""
    checks = (_hard, _noise, _disagree, _foreign, _wrong_labels, _worse, _few)
    known = [reason for check in checks if (reason := check(report))]
    # Where the numbers name fewer, what is most often the matter.
    usual = [
        "The private steps were too few, or too small, to teach the classes: finetune.steps and "
        "finetune.learning_rate, tried on a public stand-in.",
        "The public images that the generator learnt from first do not resemble the sensitive ones.",
        "The generator is larger than this number of images and this epsilon can pay for (model.width).",
    ]
    return (known + usual)[:REASONS]


def _hard(report: dict[str, Any]) -> str | None:
    top, chance = _best(report.get("accuracy_ceiling")), report["accuracy_chance"]
    if top is None or top - chance > 20:
        return None
    return (
        f"The task is hard: classifiers trained on the real images themselves reach {top:.1f} %. Their "
        "labels, or so small images, may not hold what is asked for."
    )


def _noise(report: dict[str, Any]) -> str | None:
    """The longest sum of clipped gradients over all steps against the noise on all parameters."""
    steps = [m for m in report["privacy"]["mechanisms"] if m["sample_rate"] < 1]
    if not steps or not report["parameters"]:
        return None
    # N counts groups where they are the unit of the promise.
    units = report["sensitive"]["images"] or report["sensitive"]["groups"]
    batch = steps[0]["sample_rate"] * units
    signal = math.sqrt(sum(m["count"] for m in steps)) * batch
    ratio = signal / (steps[0]["noise_multiplier"] * math.sqrt(report["parameters"]))
    if ratio > 5:
        return None
    return (
        f"The noise drowns the signal: if all images pulled one way in all steps, their sum would be "
        f"{ratio:.2g} times as long as the noise on the {report['parameters']:,} parameters, and they "
        "never do. More images, a larger epsilon, more or larger steps, or a smaller model (model.width)."
    )


def _disagree(report: dict[str, Any]) -> str | None:
    agreement = report.get("agreement")
    if not agreement or _agrees(agreement) >= DISAGREE:
        return None
    more = "more images" if _by_classifier(agreement) else "guidance"
    return f"The synthetic images do not show their labels (see below): {more}, or more private steps."


def _wrong_labels(report: dict[str, Any]) -> str | None:
    agreement = report.get("agreement")
    if not agreement or _agrees(agreement) < DISAGREE:
        return None
    why = (
        "what the private classifier sees in these images is not in real ones: they are still too rough."
        if _by_classifier(agreement)
        else "the classes are not the real ones: those of the public images stayed. The private steps did "
        "not reach the labels."
    )
    return f"Images and labels agree among themselves ({agreement['percent']:.0f} %), but {why}"


def _foreign(report: dict[str, Any]) -> str | None:
    share = _above_chance(report, report.get("accuracy_before"))
    if share is None or share >= NEAR_CHANCE:
        return None
    return (
        "Before the private steps the result was near chance too: the public images that the generator "
        "learnt from first do not resemble the sensitive ones, class by class."
    )


def _worse(report: dict[str, Any]) -> str | None:
    before, after = _best(report.get("accuracy_before")), _best(report["accuracy"])
    if before is None or after is None or before <= after:
        return None
    return (
        f"The private steps made it worse (before: {before:.1f} %): a smaller finetune.learning_rate, or "
        "fewer and larger steps."
    )


def _few(report: dict[str, Any]) -> str | None:
    synthetic = report["synthetic"]
    of_class = synthetic["images"] / max(1, len(synthetic["classes"]))
    if of_class >= 100:
        return None
    return (
        f"There are {of_class:.0f} synthetic images of a class to learn from: more of them cost no privacy "
        "(privimage sample, synthesize.samples)."
    )
