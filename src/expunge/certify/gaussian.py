"""The Gaussian mechanism, exactly: what noise of a given size hides, without the slack of the textbook formula.

``mu`` is the parameter of Gaussian differential privacy (Dong, Roth and Su, 2022): two models are told apart at most as
well as N(0, 1) and N(mu, 1). For one release ``mu = sensitivity / sigma``; releases compose as the root of the sum of
squares, also if each is chosen after seeing those before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr

from expunge.core.errors import Misuse

_SMALL = 1e-5


def delta_of(mu: float, epsilon: float) -> float:
    """Smallest delta with which `mu` gives (epsilon, delta), of either sign of epsilon (Balle and Wang, 2018, Th. 8).

    ``Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)``, in logarithms, so that no large mu overflows.
    """
    _refuse(mu >= 0, f"mu must be >= 0, got {mu}")
    if mu == 0:
        return max(0.0, -math.expm1(epsilon))
    if math.isinf(mu):
        return 1.0
    if mu < _SMALL:
        # Here the two terms agree in almost all digits; their difference is the density times a Mills ratio's slope.
        if epsilon < 0:
            return -math.expm1(epsilon) + math.exp(epsilon) * delta_of(mu, -epsilon)
        z = epsilon / mu
        slope = 1 - z * math.sqrt(math.pi / 2) * float(erfcx(z / math.sqrt(2)))
        return mu * max(0.0, slope) * math.exp(-((z - mu / 2) ** 2) / 2) / math.sqrt(2 * math.pi)
    above, below = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(above) * -math.expm1(min(0.0, below - above)))


def epsilon_of(mu: float, delta: float) -> float:
    """Smallest epsilon >= 0 with which `mu` gives (epsilon, delta); infinite if mu is, or delta is 0 and mu is not.

    Rounded up by 10^-12 and one part in 10^9 so that no root finder's tolerance makes it too small.
    """
    _refuse(0 <= delta < 1, f"delta must be >= 0 and < 1, got {delta}")
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    if math.isinf(mu) or delta == 0:
        return math.inf
    high = 1.0
    while delta_of(mu, high) > delta:
        high *= 2
    root = brentq(lambda epsilon: delta_of(mu, epsilon) - delta, 0.0, high, xtol=1e-13, rtol=1e-13)
    return (float(root) + 1e-12) * (1 + 1e-9)


def mu_of(epsilon: float, delta: float) -> float:
    """Largest mu that still gives (epsilon, delta)."""
    _refuse(epsilon >= 0 and 0 < delta < 1, f"need epsilon >= 0 and 0 < delta < 1, got {epsilon} and {delta}")
    root = brentq(lambda log: delta_of(math.exp(log), epsilon) - delta, -60.0, 20.0, xtol=1e-13, rtol=1e-13)
    return math.exp(root) * (1 - 1e-9)


def sigma_of(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Smallest standard deviation with which one release of this L2 sensitivity is (epsilon, delta)."""
    _refuse(sensitivity >= 0, f"sensitivity must be >= 0, got {sensitivity}")
    return sensitivity / mu_of(epsilon, delta)


def classical_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The textbook's ``sensitivity sqrt(2 ln(1.25 / delta)) / epsilon`` (Dwork and Roth, 2014, Th. A.1), to compare.

    Not valid for epsilon > 1, where its true epsilon is larger than asked, and 30 % too large at epsilon 1.
    """
    _refuse(epsilon > 0 and 0 < delta < 1, f"need epsilon > 0 and 0 < delta < 1, got {epsilon} and {delta}")
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def compose(mus: Iterable[float]) -> float:
    """The mu of several releases, each chosen with knowledge of those before (Dong, Roth and Su, 2022, Cor. 2).

    Why it holds for adaptive requests: whatever was seen before, the next release is the reference's plus a shift of at
    most its sensitivity, under fresh Gaussian noise. Given the releases before, it is told apart no better than N(0, 1)
    and N(mu_k, 1), and the trade-off functions of such releases multiply to that of N(0, 1) and N(root of the sum of
    squares, 1), whoever chose the requests. It needs caps that hold for every request and noise that is fresh.
    """
    return math.hypot(*mus)


def _refuse(fine: bool, message: str) -> None:
    if not fine:
        raise Misuse(message)
