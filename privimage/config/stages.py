"""The stages of a run, in the order in which they run.

This is the only list of stages: the command line, methods, checks before a run, sharing, jobs and the report
are derived from it.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What the rest of the package needs to know about one stage."""

    title: str  # heading in reports
    help: str  # of its command
    inputs: tuple[str, ...] = ()  # stages whose output it reads, where the method has them
    sensitive: bool = False  # whether it reads the sensitive set
    trains: bool = False  # whether it makes the generator from which the release is sampled


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "Prepare the public images",
        "Resize the public set and write it in the format that training streams.",
    ),
    "query": Stage(
        "Train the query function",
        "Train the semantic query function on the public labels.",
        ("prepare",),
    ),
    "select": Stage(
        "Select, privately",
        "Query the sensitive set, with noise, for the public classes that resemble it.",
        ("prepare", "query"),
        sensitive=True,
    ),
    "pretrain": Stage(
        "Pretrain on public images",
        "Pretrain the generator on the selected public images.",
        ("prepare", "select"),
    ),
    "warm": Stage(
        "Warm start",
        "Train the generator on what noisy statistics of the sensitive set tell, before private steps.",
        ("query", "pretrain"),
        sensitive=True,
    ),
    "classify": Stage(
        "Learn the labels, privately",
        "Train a private classifier, which labels the synthetic images.",
        ("query",),
        sensitive=True,
    ),
    "finetune": Stage(
        "Fine-tune, privately",
        "Fine-tune the generator on the sensitive set with differential privacy.",
        ("pretrain", "warm"),
        sensitive=True,
        trains=True,
    ),
    "match": Stage(
        "Match a noisy embedding",
        "Train a generator towards the noisy mean embedding of the sensitive set (DP-MERF, DP-MEPF).",
        ("query",),
        sensitive=True,
        trains=True,
    ),
    "evolve": Stage(
        "Evolve a population, privately",
        "Let the sensitive set vote, with noise, for synthetic images of the public model, and vary those "
        "with votes (Private Evolution).",
        ("query", "pretrain"),
        sensitive=True,
        trains=True,
    ),
    "synthesize": Stage(
        "Synthesise",
        "Sample the synthetic set into release/.",
        ("pretrain", "classify", "finetune", "match", "evolve"),
        sensitive=True,
    ),
    "evaluate": Stage(
        "Evaluate",
        "Evaluate the synthetic set and write the report.",
        ("prepare", "query", "select", "synthesize"),
        sensitive=True,
    ),
}
# Stages that no method has by itself, and the setting that asks for each.
ON_REQUEST = {"warm": "warm.starts", "classify": "classify.use"}
SENSITIVE = tuple(name for name, stage in STAGES.items() if stage.sensitive)
DRAWING = tuple(name for name in SENSITIVE if name != "evaluate")  # with noise, that a release may tell
TRAINING = tuple(name for name, stage in STAGES.items() if stage.trains)


def upstream(stage: str, among: Iterable[str]) -> tuple[str, ...]:
    """A stage and all stages of a method (`among`) whose output it depends on, in order."""
    names, open_ = set(), [stage]
    while open_:
        name = open_.pop()
        names.add(name)
        open_ += [before for before in STAGES[name].inputs if before in among and before not in names]
    return tuple(name for name in STAGES if name in names)
