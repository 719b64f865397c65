"""The file of an experiment.

A base configuration, axes of settings, seeds, and what to tabulate beside the published numbers.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from privimage.config import Config
from privimage.config import load as load_config
from privimage.config.section import Section, nearest, read_yaml, validated
from privimage.errors import UserError
from privimage.evaluation.report import NUMBERS, covered

Choice = dict[str, str]  # axis -> the name of one of its options
When = dict[str, tuple[str, ...]]  # axis -> names of options; axes that are not named may have any


class Option(Section):
    """One value of an axis; in the file also just the list of its settings."""

    base: Path | None = Field(None, description="configuration in place of the experiment's")
    settings: tuple[str, ...] = Field((), description="section.key=value, as on the command line")

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return {"settings": value} if isinstance(value, list) else value


class _Conditional(Section):
    when: When = Field(description="which combinations, as {axis: option} or {axis: [options]}")

    @field_validator("when", mode="before")
    @classmethod
    def _lists_of_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            str(axis): [str(name) for name in (names if isinstance(names, list) else [names])]
            for axis, names in value.items()
        }

    def fits(self, choice: Choice) -> bool:
        """Whether a combination is meant."""
        return all(choice[axis] in names for axis, names in self.when.items())


class Rule(_Conditional):
    """Settings of some combinations only; they go before those of the axes."""

    settings: tuple[str, ...] = Field(description="section.key=value")


class Skip(_Conditional):
    """Combinations that are not run."""


class Measure(Section):
    """A column of the table."""

    key: str = Field(description="where it is in report.json, as accuracy.lr")
    best: Literal["highest", "lowest"] | None = Field(None, description="which value is set in bold")
    unit: str = Field("", description="shown beside the name")
    divide_by: float = Field(1.0, gt=0, description="from the report's unit to this one")
    digits: int = Field(1, ge=0, le=6, description="digits after the point")

    @property
    def sensitive(self) -> bool:
        """Whether it was computed on sensitive images without noise, or follows them in time.

        The promise does not cover it.
        """
        return not covered(self.key)

    @field_validator("key")
    @classmethod
    def _is_in_reports(cls, value: str) -> str:
        if value not in NUMBERS:
            raise ValueError(f"no report has this number{nearest(value, NUMBERS)}")
        return value


class Published(_Conditional):
    """What others measured, by measure."""

    values: dict[str, float] = Field(description="measure -> value, in the measure's unit")


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment: an ordinary configuration with its own settings, directory and seed."""

    choice: Choice
    seed: int
    name: str
    path: Path
    overrides: tuple[str, ...]

    @cached_property
    def config(self) -> Config:
        """Its settings. Raises UserError that says which run it is."""
        try:
            return load_config(self.path, self.overrides)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None


class Experiment(Section):
    """All runs of a table or a figure. Paths of configurations are seen from the experiment's file."""

    title: str = Field(description="heading of the table")
    notes: str = Field("", description="what a reader of the table must know")
    base: Path | None = Field(None, description="configuration of all runs, unless an option has its own")
    runs: Path | None = Field(
        None, description="folder of the run directories; unset: runs/ and the name of the file"
    )
    settings: tuple[str, ...] = Field((), description="section.key=value of all runs")
    axes: dict[str, dict[str, Option]] = Field(
        min_length=1, description="what is varied; the first axis is that of the table's rows"
    )
    rules: tuple[Rule, ...] = Field((), description="settings of some combinations only")
    skip: tuple[Skip, ...] = Field((), description="combinations that are not run")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="values of runtime.seed, one run each")
    measures: dict[str, Measure] = Field(min_length=1, description="columns of the table")
    source: str = Field("", description="where the published values are from")
    published: tuple[Published, ...] = Field((), description="values to show beside")

    @field_validator("axes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        # YAML takes 10 for a number
        if not isinstance(value, dict):
            return value
        return {
            axis: {str(name): option for name, option in options.items()}
            if isinstance(options, dict)
            else options
            for axis, options in value.items()
        }

    @model_validator(mode="after")
    def _names_are_known(self) -> "Experiment":
        for axis, options in self.axes.items():
            if not options:
                raise ValueError(f"axes.{axis}: has no option")
        for section, items in (("rules", self.rules), ("skip", self.skip), ("published", self.published)):
            for number, item in enumerate(items):
                for axis, names in item.when.items():
                    _must_know(f"{section}.{number}.when", "axis", axis, self.axes)
                    for name in names:
                        _must_know(f"{section}.{number}.when.{axis}", "option", name, self.axes[axis])
                for name in item.values if isinstance(item, Published) else ():
                    _must_know(f"{section}.{number}.values", "measure", name, self.measures)
        return self

    @property
    def choices(self) -> list[Choice]:
        """All combinations, the last axis varying first."""
        return [dict(zip(self.axes, names, strict=True)) for names in itertools.product(*self.axes.values())]

    def skips(self, choice: Choice) -> bool:
        """Whether a combination is not run."""
        return any(item.fits(choice) for item in self.skip)

    def published_value(self, choice: Choice, measure: str) -> float | None:
        """What others measured; of several entries that fit, the last."""
        values = [
            item.values[measure] for item in self.published if item.fits(choice) and measure in item.values
        ]
        return values[-1] if values else None


def _must_know(where: str, kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{where}: unknown {kind} {name!r}{nearest(name, known)}")


@dataclass(frozen=True)
class ExperimentFile:
    """An experiment and where its file is."""

    path: Path
    experiment: Experiment

    @property
    def folder(self) -> Path:
        """Where its run directories and tables are."""
        return self.experiment.runs or Path("runs") / self.path.stem

    def runs_of(self, choice: Choice, more: Sequence[str] = ()) -> list[PlannedRun]:
        """The runs of a combination, one for each seed; `more` settings go before all others.

        None for one that is skipped.
        """
        experiment = self.experiment
        if experiment.skips(choice):
            return []
        # The last axis with a base of its own wins; settings of rules come after those of options.
        options = [experiment.axes[axis][name] for axis, name in choice.items()]
        base = next((option.base for option in reversed(options) if option.base), experiment.base)
        if base is None:
            raise UserError(
                f"{self.path}: base: required setting is missing; no option of {_name(choice)} has one either"
            )
        settings = [*experiment.settings, *(text for option in options for text in option.settings)]
        settings += [text for rule in experiment.rules if rule.fits(choice) for text in rule.settings]
        runs = []
        for seed in experiment.seeds:
            name = f"{_name(choice)}-seed{seed}"
            place = (
                f"runtime.seed={seed}",
                f"run.dir={self.folder / name}",
                f"run.shared={self.folder / 'shared'}",
            )
            runs.append(PlannedRun(choice, seed, name, self.path.parent / base, (*settings, *place, *more)))
        return runs

    def all_runs(self, more: Sequence[str] = ()) -> list[PlannedRun]:
        """All runs, in the order in which they are made.

        Every combination once, then again with the next seed, so that an unfinished experiment has a table of
        all rows.

        Raises UserError if two of them would have one directory, or one's settings are wrong.
        """
        # Transposed: all combinations with the first seed, then all with the second.
        planned = [runs for choice in self.experiment.choices if (runs := self.runs_of(choice, more))]
        runs = [run for one_seed in zip(*planned, strict=True) for run in one_seed]
        directories: dict[Path, PlannedRun] = {}
        for run in runs:
            try:
                other = directories.setdefault(run.config.run.dir, run)
            except UserError as error:
                raise UserError(f"{self.path}: {error}") from None
            if other is not run:
                raise UserError(
                    f"{self.path}: axes: two combinations would have the run directory "
                    f"{run.config.run.dir}; give their options other names"
                )
        return runs


def _name(choice: Choice) -> str:
    """`privimage+d-epsilon10` of {method: privimage+d, epsilon: 10}.

    An option that is a number is named by its axis.
    """
    # Names of directories: letters, digits, dots and plus signs only.
    parts = [name if name[:1].isalpha() else f"{axis}{name}" for axis, name in choice.items()]
    return "-".join(re.sub(r"[^A-Za-z0-9+.]+", "-", part).strip("-").lower() for part in parts)


def is_experiment(path: Path) -> bool:
    """Whether a YAML file describes an experiment, not a single run.

    Raises UserError for a file that cannot be read.
    """
    return path.is_file() and "axes" in read_yaml(path)


def load(path: Path) -> ExperimentFile:
    """Read an experiment's file.

    Raises UserError, in one line that names the file and the key, for whatever is wrong with it.
    """
    return ExperimentFile(path, validated(Experiment, read_yaml(path), str(path)))
