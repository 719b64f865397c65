"""Curves over training steps."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from privimage.evaluation.figures.theme import beside, save


def loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float]) -> None:
    """The pretraining loss, on public images."""

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=theme["accent"], linewidth=1.6)
        beside(axes, steps[-1], losses[-1], f"{losses[-1]:.3f}", gap=6, fontweight="bold")
        axes.set(xlabel="pretraining step", ylabel="loss", xlim=(0, steps[-1]))
        # A logarithmic axis where the beginning would squeeze the rest.
        if max(losses) > 5 * min(losses) > 0:
            axes.set_yscale("log")
        axes.tick_params(length=0, which="both")

    save(path, (9.4, 2.4), draw)


def budget(path: Path, steps: Sequence[int], spent: Sequence[float], promised: float) -> None:
    """Epsilon spent after each private step; the first point is the query alone."""

    def draw(figure: Figure, theme: dict[str, str]) -> None:
        axes = figure.add_subplot()
        # The promised epsilon as a line that the curve must not cross.
        axes.axhline(promised, color=theme["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "promised", (0, promised), (2, 4), textcoords="offset points", color=theme["muted"], fontsize=8
        )
        axes.plot(steps, spent, color=theme["accent"])
        axes.fill_between(steps, spent, color=theme["accent"], alpha=0.12, linewidth=0)
        axes.scatter(steps[-1], spent[-1], s=40, color=theme["accent"], clip_on=False, zorder=3)
        beside(axes, steps[-1], spent[-1], f"{spent[-1]:.3g}", fontweight="bold")
        axes.set(xlabel="private step", ylabel="ε spent", xlim=(0, steps[-1]), ylim=(0, promised * 1.15))
        axes.tick_params(length=0)

    save(path, (4.6, 3.0), draw)
