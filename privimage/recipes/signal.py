"""How much a budget lets a network learn, in closed form.

T steps of DP-SGD add up T clipped mean gradients, at most C each, and noise of standard deviation sigma C / B
in every one of d parameters. The noise over the largest possible signal is therefore

    R = sigma sqrt(d) / (B sqrt(T)) = sqrt(d) / S,   S = sqrt(T) B / sigma.

By the central limit theorem for Gaussian differential privacy (Bu, Dong, Long and Su 2020) the noise of T
samples of rate q = B / N that together are mu-GDP is sigma = ln(1 + mu^2 / (q^2 T))^(-1/2). With
x = B sqrt(T) / (N mu) it follows that

    S = N mu x sqrt(ln(1 + 1 / x^2)),

which grows with x towards N mu: no choice of batch and steps buys more than `reach` = N mu, and x = 1.5 buys
nine tenths of it.
"""

import math

WIDEST = 10.0  # of x: 99.8 % of what can be reached


def gaussian_mu(epsilon: float, delta: float) -> float:
    """mu of the Gaussian mechanism (sensitivity over noise) that costs exactly `epsilon` at `delta`.

    Balle and Wang 2018, Theorem 8.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(first + math.log1p(-min(math.exp(second - first), 1 - 1e-15)) - math.log(delta))

    return math.exp(brentq(excess, math.log(1e-6), math.log(1e3), xtol=1e-6))


def reach(count: int, epsilon: float, delta: float) -> float:
    """N mu: what S = sqrt(T) B / sigma cannot exceed."""
    return count * gaussian_mu(epsilon, delta)


def noise_over_signal(parameters: int, count: int, epsilon: float, delta: float) -> float:
    """The smallest R of any batch and number of steps; above 1 the noise is larger than the signal."""
    return math.sqrt(parameters) / reach(count, epsilon, delta)


def share(x: float) -> float:
    """S over N mu, in (0, 1)."""
    return x * math.sqrt(math.log1p(1 / x**2))


def needed(wanted: float) -> float:
    """The smallest x whose `share` is `wanted`, in (0, 0.99]."""
    from scipy.optimize import brentq

    return float(brentq(lambda x: share(x) - min(wanted, 0.99), 1e-6, WIDEST))
