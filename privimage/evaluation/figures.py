"""The figures of the report, each in a light and a dark version.

What shows sensitive data is named `sensitive-...`.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

LIGHT = {
    "ink": "#1d2733",
    "muted": "#66717e",
    "grid": "#e3e7eb",
    "surface": "#ffffff",
    "accent": "#0072b2",
    "second": "#9aa5b1",
}
DARK = {
    "ink": "#e6eaef",
    "muted": "#98a3af",
    "grid": "#2e3843",
    "surface": "#171d24",
    "accent": "#56b4e9",
    "second": "#6b7784",
}
OKABE_ITO = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#b3a100",
    "#8c6bb1",
    "#7f7f7f",
    "#8c5a2b",
)
ANNOTATED = 12  # classes up to which the cells of a matrix show their number
Draw = Callable[[Figure, dict[str, str]], None]


def save(path: Path, size: tuple[float, float], draw: Draw) -> None:
    """Draw in both themes: NAME.png and NAME-dark.png. `size` in inches at 200 dots an inch."""
    for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
        style: Any = {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.color": theme["ink"],
            "axes.labelcolor": theme["muted"],
            "axes.edgecolor": theme["grid"],
            "axes.facecolor": theme["surface"],
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": theme["surface"],
            "grid.color": theme["grid"],
            "grid.linewidth": 0.8,
            "lines.linewidth": 2,
            "xtick.color": theme["grid"],
            "ytick.color": theme["grid"],
            "xtick.labelcolor": theme["muted"],
            "ytick.labelcolor": theme["muted"],
        }
        with rc_context(style):
            figure = Figure(figsize=size, dpi=200, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure, theme)
            figure.savefig(path.with_name(f"{path.stem}{suffix}.png"))


def _tiled(rows: Sequence[np.ndarray], scale: int, gap: int = 4) -> Image.Image:
    """Rows of images uint8 (n, C, H, W) as one picture with transparent gaps.

    Pixels are enlarged `scale` times, not smoothed.
    """
    side, columns = rows[0].shape[-1] * scale, max(len(row) for row in rows)
    height = rows[0].shape[-2] * scale
    canvas = np.zeros((len(rows) * (height + gap) - gap, columns * (side + gap) - gap, 4), np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            big = (
                np.broadcast_to(image, (3, *image.shape[1:]))
                .transpose(1, 2, 0)
                .repeat(scale, 0)
                .repeat(scale, 1)
            )
            top, left = y * (height + gap), x * (side + gap)
            canvas[top : top + height, left : left + side, :3] = big
            canvas[top : top + height, left : left + side, 3] = 255
    return Image.fromarray(canvas, "RGBA")


def _enlargement(resolution: int, columns: int, width: int = 1400) -> int:
    return max(1, width // (columns * resolution))


def sample_grid(
    path: Path, images: np.ndarray, labels: np.ndarray, n_classes: int, columns: int = 16
) -> list[int]:
    """The first images of each class, one row a class; returns the classes of the rows.

    images uint8 (N, C, H, W), labels (N,). With one class, or more than twelve, eight rows of whatever comes
    first, and [].
    """
    if 1 < n_classes <= ANNOTATED:
        shown = [c for c in range(n_classes) if np.any(labels == c)]
        rows = [images[labels == c][:columns] for c in shown]
    else:
        shown, rows = (
            [],
            [images[start : start + columns] for start in range(0, min(len(images), 8 * columns), columns)],
        )
    _tiled(rows, _enlargement(images.shape[-1], columns)).save(path, optimize=True)
    return shown


def nearest_pairs(
    path: Path, synthetic: np.ndarray, training: np.ndarray, distance: np.ndarray, pairs: int = 16
) -> None:
    """Pairs: synthetic images uint8 (N, C, H, W) above, the nearest training image of each below."""
    closest = np.argsort(distance, kind="stable")[:pairs]
    _tiled([synthetic[closest], training[closest]], _enlargement(synthetic.shape[-1], pairs)).save(
        path, optimize=True
    )


def _beside(axes: Axes, x: float, y: float, text: str, right: bool, **style: Any) -> None:
    axes.annotate(
        text,
        (x, y),
        (8 if right else -8, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        **style,
    )


def accuracies(path: Path, after: dict[str, float], before: dict[str, float], chance: float) -> None:
    """Accuracy in percent of each classifier, trained before and after private fine-tuning."""
    names = {"lr": "logistic regression", "mlp": "MLP", "cnn": "CNN"}

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        for y, key in enumerate(reversed(after)):
            rise = after[key] - before.get(key, 0.0)
            if key in before:
                axes.plot(
                    [before[key], after[key]],
                    [y, y],
                    color=theme["grid"],
                    linewidth=5,
                    solid_capstyle="round",
                    zorder=1,
                )
                axes.scatter(before[key], y, s=55, color=theme["second"], zorder=2)
                _beside(axes, before[key], y, f"{before[key]:.1f}", right=rise < 0, color=theme["muted"])
            axes.scatter(after[key], y, s=75, color=theme["accent"], zorder=3)
            _beside(
                axes,
                after[key],
                y,
                f"{after[key]:.1f}",
                right=rise >= 0,
                color=theme["ink"],
                fontweight="bold",
            )
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
            handles = [
                axes.scatter([], [], s=55, color=theme["second"]),
                axes.scatter([], [], s=75, color=theme["accent"]),
            ]
            labels = ["before private fine-tuning", "after"]
            figure.legend(
                handles,
                labels,
                loc="outside upper left",
                ncols=2,
                frameon=False,
                handletextpad=0.2,
                fontsize=8,
            )

    save(path, (5.2, 0.9 + 0.62 * len(after)), draw)


def confusion_matrix(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Confusion matrix in percent of each row (true class). counts int (classes, classes)."""
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("share", [theme["surface"], theme["accent"]])
        axes.imshow(share, cmap=colours, vmin=0, vmax=100)
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


def embedding(
    path: Path,
    synthetic: np.ndarray,
    synthetic_labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> None:
    """t-SNE (van der Maaten and Hinton 2008) of penultimate features (N, F) and (M, F), in one plane, side by
    side.
    """
    from sklearn.manifold import TSNE

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


def loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float]) -> None:
    """The pretraining loss, on public images."""

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=theme["accent"], linewidth=1.6)
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
        axes.set(xlabel="pretraining step", ylabel="loss", xlim=(0, steps[-1]))
        if max(losses) > 5 * min(losses) > 0:
            axes.set_yscale("log")
        axes.tick_params(length=0, which="both")

    save(path, (9.4, 2.4), draw)


def selection(
    path: Path,
    counts: np.ndarray,
    assignment: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    kind: str,
    shown: int = 40,
) -> None:
    """The noisy votes (rows, columns) for public classes or clusters, as `kind` says.

    A ring marks those that were kept for a row.

    At most `shown` columns are drawn: those with the most votes.
    """
    top = np.sort(np.argsort(-counts.max(0), kind="stable")[:shown])
    votes = np.maximum(counts[:, top], 0)

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        colours = LinearSegmentedColormap.from_list("votes", [theme["surface"], theme["accent"]])
        picture = axes.imshow(votes, cmap=colours, vmin=0, aspect="auto")
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


def budget(path: Path, steps: Sequence[int], spent: Sequence[float], promised: float) -> None:
    """Epsilon spent after each private step; the first point is the query alone."""

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        axes.axhline(promised, color=theme["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "promised", (0, promised), (2, 4), textcoords="offset points", color=theme["muted"], fontsize=8
        )
        axes.plot(steps, spent, color=theme["accent"])
        axes.fill_between(steps, spent, color=theme["accent"], alpha=0.12, linewidth=0)
        axes.scatter(steps[-1], spent[-1], s=40, color=theme["accent"], clip_on=False, zorder=3)
        axes.annotate(
            f"{spent[-1]:.3g}",
            (steps[-1], spent[-1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
        axes.set(xlabel="private step", ylabel="ε spent", xlim=(0, steps[-1]), ylim=(0, promised * 1.15))
        axes.tick_params(length=0)

    save(path, (4.6, 3.0), draw)
