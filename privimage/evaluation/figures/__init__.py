"""The figures of the report, each in a light and a dark version.

What shows sensitive data is named `sensitive-...`.
"""

from privimage.evaluation.figures.curves import budget, loss_curve
from privimage.evaluation.figures.grids import nearest_pairs, sample_grid
from privimage.evaluation.figures.matrices import confusion_matrix, selection
from privimage.evaluation.figures.scores import accuracies, embedding
from privimage.evaluation.figures.theme import DARK, LIGHT, OKABE_ITO, save

__all__ = [
    "DARK",
    "LIGHT",
    "OKABE_ITO",
    "accuracies",
    "budget",
    "confusion_matrix",
    "embedding",
    "loss_curve",
    "nearest_pairs",
    "sample_grid",
    "save",
    "selection",
]
