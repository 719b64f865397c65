"""Colours and sizes of all figures, each in a light and a dark version.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


def beside(axes: Axes, x: float, y: float, text: str, right: bool = True, gap: int = 8, **style: Any) -> None:
    """Write `text` to the right or left of a point, `gap` points away."""
    axes.annotate(
        text,
        (x, y),
        (gap if right else -gap, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        **style,
    )
