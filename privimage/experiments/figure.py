"""The figure of an experiment: a panel for each measure, the options of the first axis from left to right."""

import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from privimage.evaluation.figures import OKABE_ITO, save
from privimage.experiments.gather import Cell, Gathered
from privimage.experiments.settings import Measure

COLUMNS = 3  # panels side by side


def draw(path: Path, gathered: Gathered) -> None:
    """Means with bars of one standard deviation, in a colour for each combination of the other axes.

    Published values are drawn as empty circles.
    """
    experiment = gathered.file.experiment
    axis, options = next((name, list(options)) for name, options in experiment.axes.items())
    series = gathered.sections
    legend = len(series) > 1 or bool(experiment.published)
    across = min(COLUMNS, len(experiment.measures))
    down = -(-len(experiment.measures) // across)
    width = max(3.2, 0.45 * len(options))

    def draw_all(figure: Figure, theme: dict[str, str]) -> None:
        panels = list(figure.subplots(down, across, squeeze=False).flat)
        for axes in panels[len(experiment.measures) :]:
            axes.set_visible(False)
        for axes, (name, measure) in zip(panels, experiment.measures.items(), strict=False):
            for number, (heading, rows) in enumerate(series):
                shift = (number - (len(series) - 1) / 2) * min(0.12, 0.7 / len(series))
                _draw_series(
                    axes,
                    [row.cells[name] for row in rows],
                    shift,
                    OKABE_ITO[number % len(OKABE_ITO)],
                    heading or "measured",
                    _numeric(options),
                )
            _label(axes, name, measure, options, theme)
            if _numeric(options):  # a bare number does not say what it counts
                axes.set_xlabel(axis, fontsize=8, color=theme["muted"])
        if legend:
            handles, labels = panels[0].get_legend_handles_labels()
            if experiment.published:
                handles.append(
                    panels[0].scatter(
                        [], [], s=30, marker="D", facecolors="none", edgecolors=theme["muted"], linewidths=1
                    )
                )
                labels.append("published")
            figure.legend(
                handles,
                labels,
                loc="outside upper left",
                ncols=min(len(labels), 5),
                frameon=False,
                fontsize=8,
            )

    save(path, (width * across, 2.6 * down + 0.3 * legend + 0.06 * max(map(len, options))), draw_all)


def _draw_series(
    axes: Axes, cells: list[Cell], shift: float, colour: str, label: str, connected: bool
) -> None:
    known = [
        (place + shift, cell.mean, cell.spread or 0.0)
        for place, cell in enumerate(cells)
        if cell.mean is not None
    ]
    places, means, spreads = np.array(known).reshape(-1, 3).T
    axes.errorbar(
        places,
        means,
        spreads,
        fmt="-o" if connected else "o",
        color=colour,
        markersize=5,
        linewidth=1.4,
        capsize=2,
        label=label,
    )
    published = [
        (place + shift, cell.published) for place, cell in enumerate(cells) if cell.published is not None
    ]
    if published:
        x, y = zip(*published, strict=True)
        axes.scatter(x, y, s=30, marker="D", facecolors="none", edgecolors=colour, linewidths=1)


def _label(axes: Axes, name: str, measure: Measure, options: list[str], theme: dict[str, str]) -> None:
    title = f"{name} ({measure.unit})" if measure.unit else name
    axes.set_title(
        f"{title} †" if measure.sensitive else title, fontsize=9, color=theme["ink"]
    )  # as in the table
    upright = sum(map(len, options)) > 24
    axes.set_xticks(
        range(len(options)),
        options,
        rotation=40 if upright else 0,
        ha="right" if upright else "center",
        fontsize=7,
    )
    axes.set_xlim(-0.6, len(options) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)


def _numeric(options: list[str]) -> bool:
    return all(re.match(r"\d", option) for option in options)
