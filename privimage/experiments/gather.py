"""What the runs of an experiment have given so far.

Values, their mean and spread, and why some are not there.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from privimage.experiments.settings import Choice, ExperimentFile, PlannedRun
from privimage.recipes import as_begun
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir


@dataclass(frozen=True)
class State:
    """How far a run has come, and for one that is not finished the reason if there is one."""

    kind: Literal["finished", "running", "failed", "stopped", "missing"]
    reason: str = ""

    @property
    def description(self) -> str:
        """In one line."""
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


@dataclass(frozen=True)
class Result:
    """One run and what it has given: its report.json once it is finished."""

    run: PlannedRun
    state: State
    report: dict | None


@dataclass(frozen=True)
class Cell:
    """One measure of one combination over its seeds."""

    values: tuple[float, ...]
    planned: int
    gaps: tuple[State, ...]
    published: float | None

    @property
    def mean(self) -> float | None:
        """Over the seeds that are finished."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, with n - 1; None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One combination: a cell for each measure."""

    choice: Choice
    results: tuple[Result, ...]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Gathered:
    """All combinations of an experiment in the order of its file."""

    file: ExperimentFile
    rows: tuple[Row, ...]

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """All runs."""
        return tuple(result for row in self.rows for result in row.results)

    @property
    def sections(self) -> list[tuple[str, list[Row]]]:
        """The rows that differ in the first axis only, under the names of the others."""
        sections: dict[str, list[Row]] = {}
        for row in self.rows:
            others = list(row.choice.items())[1:]
            sections.setdefault(", ".join(f"{axis} {name}" for axis, name in others), []).append(row)
        return list(sections.items())

    @property
    def gaps(self) -> tuple[Result, ...]:
        """The runs that are not finished."""
        return tuple(result for result in self.results if result.report is None)


def state_of(run: PlannedRun) -> State:
    """How far a run has come, from what it left in its directory."""
    # The order of these questions matters: a lock says more than a missing file, a clash more than a record.
    config = run.config
    folder = RunDir(config.run.dir)
    if not (folder.path / "config.yaml").exists() and folder.failure is None:
        return State("running") if folder.is_running else State("missing", "not started")
    if clashes := folder.clashes(as_begun(config, folder)):
        return State(
            "missing",
            (
                f"{folder.path} was made with other settings ({clashes[0][0]} was {clashes[0][1]!r}, now "
                f"{clashes[0][2]!r})"
            ),
        )
    left = [stage for stage in config.stages if folder.record(stage) is None]
    if not left:
        return State("finished")
    if folder.is_running:
        return State("running", f"at {left[0]}")
    if (reason := folder.failure) is not None:
        return State("failed", reason)
    return State("stopped", f"before {left[0]} was finished; run the experiment again to go on")


def gather(file: ExperimentFile, more: Sequence[str] = ()) -> Gathered:
    """Read the reports of all runs; `more` are the settings that they were given beside the file's.

    Raises UserError for wrong settings and for a damaged report.
    """
    runs, rows = file.all_runs(more), []
    for choice in file.experiment.choices:
        results = tuple(_result(run) for run in runs if run.choice == choice)
        rows.append(Row(choice, results, _cells(file, choice, results)))
    return Gathered(file, tuple(rows))


def _result(run: PlannedRun) -> Result:
    state = state_of(run)
    report = read_json(run.config.run.dir / "evaluate" / "report.json") if state.kind == "finished" else None
    return Result(run, state, report)


def _cells(file: ExperimentFile, choice: Choice, results: tuple[Result, ...]) -> dict[str, Cell]:
    gaps, cells = tuple(result.state for result in results if result.report is None), {}
    for name, measure in file.experiment.measures.items():
        numbers = [_value(result.report, measure.key) for result in results if result.report is not None]
        values = tuple(value / measure.divide_by for value in numbers if value is not None)
        cells[name] = Cell(values, len(results), gaps, file.experiment.published_value(choice, name))
    return cells


def _value(report: dict, key: str) -> float | None:
    """The number at ``a.b.c``; None where this method has none."""
    value: object = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None
