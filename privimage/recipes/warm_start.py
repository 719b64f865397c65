"""What a warm start by moments may cost."""

from privimage.recipes.facts import Facts
from privimage.recipes.signal import gaussian_mu

# Deviation of the noise on a coordinate of a class's mean, images having a norm of at most 1: where the means
# of faces, letters and digits still stand out clearly (docs/results.md).
NOISE = 0.003
LEAST, MOST = 0.005, 0.2  # relative rise of the noise of the private steps


def stands_out(facts: Facts) -> bool:
    """Whether means with noise of `NOISE` cost less than the largest rise."""
    return warm_rise(facts) < MOST


def warm_rise(facts: Facts) -> float:
    """The rise of the training's noise that pays for means of the classes with noise of `NOISE`.

    Where the whole run is mu-GDP, a small rise r of the training's noise leaves 2 r mu^2 to other mechanisms,
    half of it to the means: sigma = 1 / (mu sqrt(r)), and the noise on a mean is sigma rows / N.
    """
    mu = gaussian_mu(facts.epsilon, facts.delta)
    wanted = (facts.rows / (facts.count * NOISE * mu)) ** 2
    return float(f"{min(max(wanted, LEAST), MOST):.1g}")
