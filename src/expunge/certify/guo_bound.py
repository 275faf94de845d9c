r"""What a perturbed objective hides of the step that removes rows from its minimum: two figures, and why they differ.

The mean objective :math:`\frac1n\sum\ell_i(w) + \frac{\lambda}{2}|w|^2 + \frac1n b\cdot w`, b ~ N(0, s^2 I), is
trained to its minimum w. A removal moves w by :math:`H^{-1}\Delta`, which leaves a residual u: the new w is the exact
minimum on the retained rows for the noise b - u instead of b. With `|u| <= beta`, Guo et al. (2020, theorem 3) compare
N(0, s^2) with its shift by u, as for a fixed u: s = c beta / epsilon, delta = 1.5 exp(-c^2 / 2).

But u is a function of b, through w. Of ``|u(b)| <= beta`` alone nothing follows at all: with u(b) = b less its nearest
point on a grid whose cells have radius beta, b - u(b) lies on the grid always and a fresh b never, so that delta is 1.
Even where u is as smooth as ``beta b / |b|``, the formula promises too much: the norm of b has a standard deviation of
s / sqrt(2), so that mu is sqrt(2) beta / s where the fixed shift has beta / s. What is needed is a bound of the density
of b - u(b), and so of the determinant of that map: `worst_case_epsilon` has one, and is proved.
"""

from __future__ import annotations

import math

from scipy.stats import chi

from expunge.calculus.head import SOFTMAX_THIRD
from expunge.certify.constants import Derivation
from expunge.certify.newton_bound import RADIUS


def paper_epsilon(residual: float, sigma: float, delta: float) -> float:
    """``residual / sigma * sqrt(2 ln(1.5 / delta))``: Guo et al. (2020), theorem 3, as if the residual were fixed."""
    return residual / sigma * math.sqrt(2 * math.log(1.5 / delta))


def paper_cap(epsilon: float, sigma: float, delta: float) -> float:
    """The residual at which `paper_epsilon` is `epsilon`."""
    return epsilon * sigma / math.sqrt(2 * math.log(1.5 / delta))


def noise_radius(sigma: float, delta: float, dimension: float) -> float:
    """What the norm of the noise exceeds with probability `delta` only."""
    return float(sigma * chi.isf(delta, dimension))


def norm_epsilon(residual: float, sigma: float, delta: float, dimension: float) -> float:
    r"""How much the noise's own density can differ: :math:`\beta r / s^2 + \beta^2 / (2 s^2)`, r = `noise_radius`.

    As ``||b - u|^2 - |b|^2| <= 2 beta |b| + beta^2``. No guarantee by itself: it leaves out the determinant.
    """
    share = residual / sigma
    return share * noise_radius(1.0, delta, dimension) + share * share / 2


def worst_step(rows: float, removals: float, radius: float, weight_decay: float, noise: float) -> float:
    r"""Largest step :math:`|H^{-1}\Delta|` for `removals` rows, wherever the weights are, for noise of norm `noise`.

    Sums, not means: a row's gradient has norm at most :math:`\sqrt 2 R`, so that at the minimum
    :math:`\lambda|w| \le \sqrt 2 R + |b| / n`; :math:`\Delta` sums ``gradient + lambda w`` over the removed rows; and
    no eigenvalue of H is below :math:`\lambda` times the rows that remain.
    """
    return worst_change(rows, removals, radius, noise) / (weight_decay * rows)


def worst_change(rows: float, removals: float, radius: float, noise: float) -> float:
    r"""Largest :math:`|\Delta|`; see `worst_step`."""
    return removals * (2 * math.sqrt(2) * radius + noise / rows)


def worst_residual(
    rows: float, removals: float, radius: float, weight_decay: float, sigma: float, delta: float, dimension: float
) -> float:
    r"""Largest residual of removals of `removals` rows in all, in any number of requests, while `rows` remain.

    :math:`\frac{\gamma}{2} n R^3 |step|^2` each, :math:`\gamma = \sqrt{2/27}` (see `residual_bound`); it grows with the
    square of a request's rows, so that one request for all of them is the worst. Noise is counted up to twice
    `noise_radius`, so that moving it a little stays within.
    """
    noise = 2 * noise_radius(sigma, delta, dimension)
    step = worst_step(rows, removals, radius, weight_decay, noise)
    return SOFTMAX_THIRD / 2 * rows * radius**3 * step * step


def determinant(change: float, dimension: float, share: float) -> float:
    r"""Largest logarithm of the determinant of the map from the noise before a removal to the noise after.

    With H the retained Hessian at w, D that of all rows, :math:`A = H(w + s) - H(w)`, T[s] the third derivative along
    the step s, the map's derivative is :math:`(H + A) H^{-1} (D - T[s]) D^{-1}`. Let x be the largest difference of two
    changes of one row's logits. Along s, softmax losses have ``|T[s]| <= x H_loss`` and a fourth derivative within
    ``x^2 H_loss`` (central moments of a variable of range x), so that ``|A| <= (e^x - 1) H_loss`` and
    ``|A - T[s]| <= (e^x - 1 - x) H_loss``; and ``H_loss <= H <= D``. To the first order the two factors cancel but for
    the removed rows' share of D, :math:`\operatorname{tr}(D^{-1}(D - H))`:

    ``|ln det| <= d (e^x - 1 - x) + x share + d a^2 / (2 (1 - a)) + d x^2 / (2 (1 - x))``, ``a = e^x - 1``.

    Args:
        change: x.
        dimension: d, the number of parameters.
        share: the removed rows' share of D.

    Returns:
        The bound; infinite if a >= 1.
    """
    a = math.expm1(min(change, 1.0))
    if a >= 1:
        return math.inf
    second = a * a / (2 * (1 - a)) + change * change / (2 * (1 - change))
    return dimension * (a - change) + change * share + dimension * second


def worst_determinant(
    rows: float, removals: float, radius: float, weight_decay: float, sigma: float, delta: float, dimension: float
) -> float:
    """The largest `determinant`: ``x <= sqrt(2) R |step|``, ``share <= m (R^2 / lambda + d) / n``.

    It is convex in the rows m of a request, so that one request for all of them is the worst.
    """
    noise = 2 * noise_radius(sigma, delta, dimension)
    change = math.sqrt(2) * radius * worst_step(rows, removals, radius, weight_decay, noise)
    return determinant(change, dimension, removals * (radius * radius / weight_decay + dimension) / rows)


def worst_case_epsilon(
    rows: float, removals: float, radius: float, weight_decay: float, sigma: float, delta: float, dimension: float
) -> float:
    r"""The proved epsilon of a perturbed softmax objective after removals: `norm_epsilon` plus `worst_determinant`.

    Proof. Let r = `noise_radius`. The map T from noise to noise moves by at most beta, and its derivative has a
    positive determinant wherever ``|b| <= 2 r``. It is homotopic, through :math:`-\nabla L(w + \tau s)` on the retained
    rows, to the diffeomorphism :math:`b \mapsto b + \Delta`, never farther than ``|Delta| + beta`` from b, so that by
    its degree each point of norm at most ``r + 2 beta`` has exactly one preimage in that ball, as long as
    ``|Delta| + 3 beta <= r``. Hence the densities of T(b) and of b differ by at most the factor e^epsilon but where
    ``|b|`` or ``|T(b)|`` exceeds r, which has probability at most delta, both ways. Steps of a sequence compose:
    residuals and logarithms add. Requests must not depend on the noise, that is, on the released model.

    Returns:
        epsilon; infinite where the conditions fail, or so little weight decay that nothing is proved.
    """
    if not (weight_decay > 0 and rows >= 1 and 0 < delta < 1):
        return math.inf
    given = (rows, removals, radius, weight_decay, sigma, delta, dimension)
    beta, reach = worst_residual(*given), noise_radius(sigma, delta, dimension)
    if worst_change(rows, removals, radius, 2 * reach) + 3 * beta > reach:
        return math.inf
    return norm_epsilon(beta, sigma, delta, dimension) + worst_determinant(*given)


_ALL = ("rows", "removals", "radius", "weight_decay", "sigma", "delta", "dimension")
WORST_RESIDUAL = Derivation(
    name="guo-worst-residual",
    formula="sqrt(2/27) / 2 n R^3 (m (2 sqrt(2) R + 2 r / n) / (weight_decay n))^2, r the noise's (1 - delta) radius",
    of=_ALL,
    compute=worst_residual,
)
WORST_EPSILON = Derivation(
    name="guo-worst-epsilon",
    formula="beta r / sigma^2 + beta^2 / (2 sigma^2) + the log-determinant of the noise's map; see worst_case_epsilon",
    of=_ALL,
    compute=worst_case_epsilon,
)
PAPER_CAP = Derivation(
    name="guo-paper-cap",
    formula="epsilon sigma / sqrt(2 ln(1.5 / delta)) (Guo et al., 2020, theorem 3)",
    of=("budget", "sigma", "delta"),
    compute=paper_cap,
)
PAPER_EPSILON = Derivation(
    name="guo-paper-epsilon",
    formula="sensitivity / sigma sqrt(2 ln(1.5 / delta)), the residual taken as independent of the noise",
    of=("sensitivity", "sigma", "delta", "independence"),
    compute=lambda residual, sigma, delta, _: paper_epsilon(residual, sigma, delta),
)
DERIVATIONS: tuple[Derivation, ...] = (WORST_RESIDUAL, WORST_EPSILON, PAPER_CAP, PAPER_EPSILON, RADIUS)
