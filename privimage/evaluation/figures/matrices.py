"""Matrices of counts: confusion, and the selection."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from privimage.evaluation.figures.theme import ANNOTATED, OKABE_ITO, save


def confusion_matrix(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Confusion matrix in percent of each row (true class). counts int (classes, classes)."""
    # A class without test images has a row of zeros, not a division by zero.
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("share", [theme["surface"], theme["accent"]])
        axes.imshow(share, cmap=colours, vmin=0, vmax=100)
        # Numbers in the cells only where they can be read.
        if len(classes) <= ANNOTATED:
            for y, x in np.ndindex(share.shape):
                if share[y, x] >= 0.5:
                    colour = theme["surface"] if share[y, x] > 55 else theme["ink"]
                    axes.text(x, y, f"{share[y, x]:.0f}", ha="center", va="center", fontsize=7, color=colour)
            _name_ticks(axes, classes, classes, theme)
        axes.set(xlabel="said to be", ylabel="is")
        axes.grid(visible=False)

    save(path, (4.6, 4.2), draw)


def _short(name: str, letters: int = 18) -> str:
    """The first of several synonyms, cut where it is long."""
    first = name.split(",")[0]
    return first if len(first) <= letters else f"{first[: letters - 1]}…"


def _name_ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], theme: dict[str, str]) -> None:
    rows, columns = [_short(name) for name in rows], [_short(name) for name in columns]
    # Long names stand upright.
    upright = max(map(len, columns)) > 3
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=90 if upright else 0,
        color=theme["ink"],
        fontsize=8 if len(columns) <= 40 else 5,
    )
    axes.set_yticks(range(len(rows)), rows, color=theme["ink"], fontsize=8 if len(rows) <= 40 else 5)
    axes.tick_params(length=0)


def selection(
    path: Path,
    counts: np.ndarray,
    assignment: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    kind: str,
    shown: int = 40,
) -> None:
    """The noisy votes (rows, columns) for public classes or clusters; a ring marks those selected for a row.

    At most `shown` columns are drawn: those with the most votes.
    """
    top = np.sort(np.argsort(-counts.max(0), kind="stable")[:shown])
    votes = np.maximum(counts[:, top], 0)

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("votes", [theme["surface"], theme["accent"]])
        picture = axes.imshow(votes, cmap=colours, vmin=0, aspect="auto")
        # A ring around each public class at the row that it was given to.
        for x, column in enumerate(top):
            if assignment[column] >= 0:
                axes.scatter(
                    x, assignment[column], s=42, facecolors="none", edgecolors=OKABE_ITO[4], linewidths=1.6
                )
        _name_ticks(axes, rows, [columns[i] for i in top], theme)
        axes.set(xlabel=kind, ylabel="sensitive class")
        axes.grid(visible=False)
        bar = figure.colorbar(picture, ax=axes, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("votes, with noise")
        bar.ax.tick_params(length=0)

    save(path, (9.4, 0.7 + 0.07 * max(len(_short(columns[i])) for i in top) + 0.25 * len(rows)), draw)
