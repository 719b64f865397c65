"""The table of an experiment as Markdown and CSV, gaps and published values included."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from privimage.errors import UserError
from privimage.experiments import figure
from privimage.experiments.gather import Cell, Gathered, Row, gather
from privimage.experiments.settings import Measure, load
from privimage.storage.files import write_whole

MARK = "†"  # of measures that are for the owner of the data
NOTE = (
    f"{MARK} computed on sensitive images without noise: for the owner of the data, the promise does not "
    "cover it."
)
ARROWS = {"highest": " ↑", "lowest": " ↓", None: ""}


def write(path: Path, overrides: Sequence[str] = ()) -> str:
    """Write NAME.md, NAME.csv and NAME.png below the runs of the experiment in the file NAME.yaml at `path`.

    Returns the Markdown.

    `overrides` are those that the runs were made with. Raises UserError for whatever is wrong with the file
    or with a report.
    """
    # Everything is computed before the first file is written.
    gathered = gather(load(path), overrides)
    folder = gathered.file.folder
    text = markdown(gathered)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: could not be made ({error.strerror})") from None
    write_whole(folder / f"{path.stem}.md", text.encode())
    write_whole(folder / f"{path.stem}.csv", comma_separated(gathered).encode())
    figure.draw(folder / f"{path.stem}.png", gathered)
    return text


def markdown(gathered: Gathered) -> str:
    """A table for each combination of all axes but the first, whose options are the rows.

    Below, the runs that are missing and why.
    """
    # Title and command, notes, one table per section, then the gaps.
    experiment, lines = gathered.file.experiment, [f"# {gathered.file.experiment.title}", "", _told(gathered)]
    if experiment.notes:
        lines += ["", experiment.notes.strip()]
    for heading, rows in gathered.sections:
        lines += ["", f"## {heading}", ""] if heading else [""]
        lines += _section(gathered, rows)
    if any(measure.sensitive for measure in experiment.measures.values()):
        lines += ["", NOTE]
    if gathered.gaps:
        lines += [
            "",
            "Not there:",
            "",
            *(f"- {result.run.name}: {result.state.description}" for result in gathered.gaps),
        ]
    return "\n".join(lines) + "\n"


def _told(gathered: Gathered) -> str:
    experiment, total = gathered.file.experiment, len(gathered.results)
    seeds = len(experiment.seeds)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    published = f" In brackets: {experiment.source}." if experiment.source else ""
    return (
        f"`privimage experiment {gathered.file.path}`: {total - len(gathered.gaps)} of {total} runs, "
        f"{spread}.{published}"
    )


def _section(gathered: Gathered, rows: list[Row]) -> list[str]:
    measures = gathered.file.experiment.measures
    axis = next(iter(gathered.file.experiment.axes))
    heads = [_head(name, measure) for name, measure in measures.items()]
    # The best value of each column, within a section, is set in bold.
    best = {name: _best(measure, [row.cells[name] for row in rows]) for name, measure in measures.items()}
    lines = [f"| {axis} | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for row in rows:
        cells = [
            _cell(row.cells[name], measure, row.cells[name] is best[name])
            for name, measure in measures.items()
        ]
        lines.append(f"| {next(iter(row.choice.values()))} | {' | '.join(cells)} |")
    return lines


def _head(name: str, measure: Measure) -> str:
    unit, mark = f" ({measure.unit})" if measure.unit else "", f" {MARK}" if measure.sensitive else ""
    return f"{name}{unit}{ARROWS[measure.best]}{mark}"


def _best(measure: Measure, cells: list[Cell]) -> Cell | None:
    known = [(cell.mean, cell) for cell in cells if cell.mean is not None]
    if measure.best is None or len(known) < 2:
        return None
    return (max if measure.best == "highest" else min)(known, key=lambda pair: pair[0])[1]


def _cell(cell: Cell, measure: Measure, best: bool) -> str:
    text: str = cell.gaps[0].kind if cell.gaps else "-"
    if cell.mean is not None:
        text = f"{cell.mean:.{measure.digits}f}" + (
            f" ± {cell.spread:.{measure.digits}f}" if cell.spread is not None else ""
        )
        text = f"**{text}**" if best else text
        text += f" ({len(cell.values)} of {cell.planned})" if cell.gaps else ""
    return text + (f" [{cell.published:g}]" if cell.published is not None else "")


def comma_separated(gathered: Gathered) -> str:
    """A line for each combination and measure, with full precision.

    `values` are those of the seeds, `gaps` the reasons of the others.
    """
    experiment, out = gathered.file.experiment, io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        [
            *experiment.axes,
            "measure",
            "unit",
            "mean",
            "std",
            "finished",
            "planned",
            "values",
            "published",
            "sensitive",
            "gaps",
        ]
    )
    # One line per combination and measure, gaps included.
    for row in gathered.rows:
        gaps = "; ".join(
            f"seed {result.run.seed} {result.state.description}"
            for result in row.results
            if result.report is None
        )
        for name, measure in experiment.measures.items():
            cell = row.cells[name]
            numbers = [
                cell.mean,
                cell.spread,
                len(cell.values),
                cell.planned,
                " ".join(map(repr, cell.values)),
                cell.published,
            ]
            lines.writerow(
                [
                    *row.choice.values(),
                    name,
                    measure.unit,
                    *("" if number is None else number for number in numbers),
                    "yes" if measure.sensitive else "no",
                    gaps,
                ]
            )
    return out.getvalue()
