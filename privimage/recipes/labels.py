"""What a private classifier for the labels may cost, and whether it can learn them."""

import math

from privimage.recipes.facts import Facts
from privimage.recipes.signal import reach

# N over the noise at which a linear classifier is nearly as good as without noise, and at which it is still
# better than labels that a generator was asked for, for each class (docs/method-notes.md).
WANTED, LEAST_OF_A_CLASS = 7000.0, 20.0
LEAST, MOST = 0.005, 0.2  # relative rise of the training's noise


def can_be_learned(facts: Facts) -> bool:
    """Whether the labels of a set can be told through the noise at the largest rise."""
    return facts.classes > 1 and _clearness(facts, MOST) > LEAST_OF_A_CLASS * facts.classes


def labels_rise(facts: Facts) -> float:
    """The rise of the training's noise that pays for a classifier.

    A rise r leaves mu_c = mu sqrt(1 - 1 / (1 + r)^2) of a mu-GDP run to it, and N over its noise is N mu_c.
    """
    share = min(WANTED / reach(facts.count, facts.epsilon, facts.delta), 0.9)
    rise = 1 / math.sqrt(1 - share**2) - 1
    return float(f"{min(max(rise, LEAST), MOST):.1g}")


def _clearness(facts: Facts, rise: float) -> float:
    return reach(facts.count, facts.epsilon, facts.delta) * math.sqrt(1 - (1 + rise) ** -2)
