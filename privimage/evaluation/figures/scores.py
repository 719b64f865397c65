"""Bars of accuracies, and the plane of the features behind them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from privimage.evaluation.figures.theme import ANNOTATED, OKABE_ITO, beside, save


def accuracies(
    path: Path, after: dict[str, float], before: dict[str, float], chance: float, names: Mapping[str, str]
) -> None:
    """Accuracy in percent of each classifier, by its key in `names`, before and after private fine-tuning."""

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        for y, key in enumerate(reversed(after)):
            _score(axes, y, after[key], before.get(key), theme)
        axes.axvline(chance, color=theme["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "guessing", (chance, -0.62), (4, 0), textcoords="offset points", color=theme["muted"], fontsize=8
        )
        axes.set(
            xlim=(-8, 108),
            ylim=(-0.7, len(after) - 0.4),
            xlabel="% of real test images classified right",
            yticks=range(len(after)),
        )
        axes.set_yticklabels([names[key] for key in reversed(after)], color=theme["ink"])
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        if before:
            _legend(figure, axes, theme)

    save(path, (5.2, 0.9 + 0.62 * len(after)), draw)


def _score(axes: Axes, y: int, after: float, before: float | None, theme: dict[str, str]) -> None:
    """One row: a point, and where there is an earlier score a line that leads to it."""
    # The two numbers stand on the outer sides of their points, so that they never overlap.
    rises = after >= (before or 0.0)
    if before is not None:
        style: dict[str, Any] = {"linewidth": 5, "solid_capstyle": "round", "zorder": 1}
        axes.plot([before, after], [y, y], color=theme["grid"], **style)
        axes.scatter(before, y, s=55, color=theme["second"], zorder=2)
        beside(axes, before, y, f"{before:.1f}", right=not rises, color=theme["muted"])
    axes.scatter(after, y, s=75, color=theme["accent"], zorder=3)
    beside(axes, after, y, f"{after:.1f}", right=rises, color=theme["ink"], fontweight="bold")


def _legend(figure: Figure, axes: Axes, theme: dict[str, str]) -> None:
    handles = [
        axes.scatter([], [], s=55, color=theme["second"]),
        axes.scatter([], [], s=75, color=theme["accent"]),
    ]
    style: dict[str, Any] = {"ncols": 2, "frameon": False, "handletextpad": 0.2, "fontsize": 8}
    labels = ["before private fine-tuning", "after"]
    figure.legend(handles, labels, loc="outside upper left", **style)


def embedding(
    path: Path,
    synthetic: np.ndarray,
    synthetic_labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> None:
    """t-SNE (van der Maaten and Hinton 2008) of penultimate features (N, F) and (M, F) in one plane."""
    from sklearn.manifold import TSNE

    # One embedding of both sets: two would not be comparable.
    everything = np.concatenate([synthetic, real])
    perplexity = min(30.0, (len(everything) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(everything)
    parts = (
        (points[: len(synthetic)], synthetic_labels, "synthetic images"),
        (points[len(synthetic) :], real_labels, "real test images"),
    )

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (at, labels, title) in zip(panels, parts, strict=True):
            axes.scatter(
                *at.T,
                s=5,
                linewidths=0,
                alpha=0.75,
                color=[OKABE_ITO[label % len(OKABE_ITO)] for label in labels],
            )
            # The name of a class stands at the median of its points.
            for label in np.unique(labels) if len(classes) <= ANNOTATED else ():
                centre = np.median(at[labels == label], 0)
                box = {
                    "boxstyle": "round,pad=0.2",
                    "facecolor": theme["surface"],
                    "edgecolor": OKABE_ITO[label % len(OKABE_ITO)],
                    "alpha": 0.9,
                }
                axes.annotate(classes[label], centre, ha="center", va="center", fontsize=8, bbox=box)
            axes.set_title(title, fontsize=9, color=theme["muted"])
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)

    save(path, (9.4, 4.6), draw)
