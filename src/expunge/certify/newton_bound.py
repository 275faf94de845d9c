"""How far one damped Newton step can end from retraining in a ball: the bound of Zhang et al. (2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from expunge.calculus.head import softmax_hessian_lipschitz
from expunge.certify import gaussian
from expunge.certify.constants import Derivation, derived, estimated, setting, supplied
from expunge.core.claim import Constant
from expunge.core.errors import Misuse

Solver = Literal["exact", "cg", "lissa"]


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """What the bound needs to know of the retained objective (mean loss plus weight decay), all over the ball.

    Of every set of rows that may ever be retained; for ``lissa`` of every batch's objective too. Nobody can compute
    these for a deep network: whoever gives them vouches for them.

    Attributes:
        hessian_lipschitz: M: ``|H(v) - H(w)| <= M |v - w|`` in the operator norm.
        lambda_min: smallest eigenvalue of H; of a network negative.
        gradient_norm: G: norm of the gradient at the retrained weights; 0 only if they are a stationary point, which a
            minimum on the sphere ``|w| = max_norm`` is not.
        gradient_lipschitz: L: largest eigenvalue of H in absolute value; None if not known (``exact`` needs none).
        source: ``supplied`` (somebody vouches for all) or ``estimated`` (measured, which proves nothing).
    """

    hessian_lipschitz: float
    lambda_min: float
    gradient_norm: float = 0.0
    gradient_lipschitz: float | None = None
    source: Literal["supplied", "estimated"] = "supplied"

    def __post_init__(self) -> None:
        known = [self.hessian_lipschitz, self.lambda_min, self.gradient_norm, self.gradient_lipschitz or 0.0]
        if not all(map(math.isfinite, known)) or min(known[0], *known[2:]) < 0:
            raise Misuse(f"constants must be finite, and all but lambda_min >= 0, got {known}")
        if self.source not in ("supplied", "estimated"):
            raise Misuse(f'source must be supplied or estimated, got "{self.source}"')

    def constants(self) -> dict[str, Constant]:
        """The same as constants of a guarantee."""
        kind = supplied if self.source == "supplied" else estimated
        names = ("hessian_lipschitz", "lambda_min", "gradient_norm", "gradient_lipschitz")
        given = {name: getattr(self, name) for name in names}
        return {name: kind(value) for name, value in given.items() if value is not None}


def zhang_bound(
    max_norm: float,
    hessian_lipschitz: float,
    damping: float,
    lambda_min: float = 0.0,
    gradient_norm: float = 0.0,
    *,
    gradient_lipschitz: float = 0.0,
    tolerance: float = 0.0,
    dimension: float | None = None,
    rho: float = 0.0,
) -> float:
    r"""Largest distance of one damped Newton step on the retained objective from the retrained weights.

    .. math:: \Delta = \frac{2C(MC + \lambda) + G + t(2LC + G)}{\lambda + \lambda_{min}}
        + \Bigl(\frac{16\sqrt{\ln(d/\rho)}}{\lambda + \lambda_{min}} + \frac{1}{16}\Bigr)(2LC + G)

    with C the radius that both weights lie in, M, L, :math:`\lambda_{min}` and G as in `Smoothness`, :math:`\lambda`
    the damping; t the relative residual of the linear solver (``cg``); the second line for ``lissa`` only (`dimension`
    given), with probability 1 - rho over its batches.

    Proof. Let w be where the step starts, v the retrained weights, g the gradient and H = H(w). The step ends at
    :math:`w - (H + \lambda)^{-1} g(w)`, which differs from v by :math:`(H + \lambda)^{-1}` times
    :math:`(H + \lambda)(w - v) - (g(w) - g(v)) - g(v)`. Its norm is at most
    :math:`\frac{M}{2}|w - v|^2 + \lambda |w - v| + |g(v)|`, and :math:`|w - v| \le 2C`. An inexact solution adds what
    it misses of :math:`|g(w)| \le 2LC + G`. Nothing is asked of w but to lie in the ball. Source: Zhang, Dong, Wang and
    Li (2024), Theorem 3.4 and its corollaries; without G it needs v to lie inside the ball, not on its sphere.

    It is at least 2C, the diameter of the ball, whenever ``M C >= lambda_min``, for every damping: then two points of
    the ball chosen without any computation are as near.

    Returns:
        The bound; infinite unless ``damping + lambda_min > 0``.
    """
    least = damping + lambda_min
    if not least > 0:
        return math.inf
    slope = 2 * gradient_lipschitz * max_norm + gradient_norm
    step = 2 * max_norm * (hessian_lipschitz * max_norm + damping) + gradient_norm + tolerance * slope
    if dimension is None:
        return step / least
    if not 0 < rho < 1:
        raise Misuse(f"rho, the chance that LiSSA misses its bound, must be > 0 and < 1, got {rho}")
    return step / least + (16 * math.sqrt(math.log(dimension / rho)) / least + 1 / 16) * slope


_STEP = ("max_norm", "hessian_lipschitz", "damping", "lambda_min", "gradient_norm")
BOUNDS: Mapping[Solver, Derivation] = {
    "exact": Derivation(
        name="zhang-exact",
        formula="(2C(MC + lambda) + G) / (lambda + lambda_min) (Zhang et al., 2024)",
        of=_STEP,
        compute=zhang_bound,
    ),
    "cg": Derivation(
        name="zhang-cg",
        formula="zhang-exact + t(2LC + G) / (lambda + lambda_min): relative residual t of conjugate gradients",
        of=(*_STEP, "gradient_lipschitz", "tolerance"),
        compute=lambda *step: zhang_bound(*step[:5], gradient_lipschitz=step[5], tolerance=step[6]),
    ),
    "lissa": Derivation(
        name="zhang-lissa",
        formula="zhang-exact + (16 sqrt(ln(d / rho)) / (lambda + lambda_min) + 1/16)(2LC + G) (Zhang et al., 2024)",
        of=(*_STEP, "gradient_lipschitz", "dimension", "rho"),
        compute=lambda *step: zhang_bound(*step[:5], gradient_lipschitz=step[5], dimension=step[6], rho=step[7]),
    ),
}


def interior(max_norm: float, weight_decay: float, classes: float) -> float:
    """0 if the minimum of any softmax objective with this weight decay lies in the ball, where its gradient is zero.

    There the objective is at most ln(classes), its value at zero weights, so that ``|w|^2 <= 2 ln(classes) /
    weight_decay``. Infinite if that does not fit: then nothing is known of the gradient.
    """
    fits = weight_decay > 0 and max_norm * max_norm * weight_decay >= 2 * math.log(classes)
    return 0.0 if fits else math.inf


RADIUS = Derivation(
    name="radius-with-bias",
    formula="sqrt(r^2 + 1): the norm of a row with its 1 for the bias",
    of=("feature_radius",),
    compute=lambda radius: math.sqrt(radius * radius + 1),
)
_SOFTMAX: Mapping[str, Derivation] = {
    "hessian_lipschitz": Derivation(
        name="softmax-hessian-lipschitz",
        formula="sqrt(2/27) R^3: third central moment of a variable of range sqrt(2) R",
        of=("radius",),
        compute=softmax_hessian_lipschitz,
    ),
    "gradient_lipschitz": Derivation(
        name="softmax-gradient-lipschitz",
        formula="R^2 / 2 + weight_decay: variance of a variable of range sqrt(2) R",
        of=("radius", "weight_decay"),
        compute=lambda radius, decay: radius * radius / 2 + decay,
    ),
    "lambda_min": Derivation(
        name="strong-convexity",
        formula="weight_decay: the loss is convex",
        of=("weight_decay",),
        compute=lambda decay: decay,
    ),
    "gradient_norm": Derivation(
        name="interior-minimum",
        formula="0 if max_norm^2 weight_decay >= 2 ln(classes), the retrained weights being the minimum; else infinite",
        of=("max_norm", "weight_decay", "classes"),
        compute=interior,
    ),
}
SIGMA = Derivation(
    name="sigma-of-share",
    formula="sigma = sensitivity / mu: the smallest that fits a release's share of the budget",
    of=("sensitivity", "share"),
    compute=lambda sensitivity, share: sensitivity / share,
)
EPSILON_BUT_RHO = Derivation(
    name="gaussian-epsilon-but-rho",
    formula="epsilon(sensitivity / sigma, delta - rho) - ln(1 - rho): the bound fails with probability rho",
    of=("sensitivity", "sigma", "delta", "rho"),
    compute=lambda distance, sigma, delta, rho: (
        gaussian.epsilon_of(distance / sigma, delta - rho) - math.log1p(-rho) if sigma > 0 and delta > rho else math.inf
    ),
)
DERIVATIONS: tuple[Derivation, ...] = (*BOUNDS.values(), RADIUS, *_SOFTMAX.values(), SIGMA, EPSILON_BUT_RHO)


def softmax_constants(
    *, max_norm: Constant, feature_radius: float, weight_decay: float, classes: int
) -> dict[str, Constant]:
    """All constants of a softmax model whose rows have a norm of at most `feature_radius`, derived."""
    constants = {
        "max_norm": max_norm,
        "feature_radius": setting(feature_radius, "method.feature_radius"),
        "weight_decay": setting(weight_decay, "recipe.weight_decay"),
        "classes": setting(classes, "recipe.outputs"),
    }
    constants["radius"] = derived(RADIUS, constants)
    for name, derivation in _SOFTMAX.items():
        constants[name] = derived(derivation, constants)
    return constants


def problem_of_lissa(given: Mapping[str, Constant], damping: float, scale: float, steps: int) -> str:
    """What of LiSSA's lemma does not hold by the constants given; empty if nothing."""
    least = damping + given["lambda_min"].value
    if not least > 0:
        return "the bound is infinite: damping + lambda_min must be > 0"
    if scale < damping + given["gradient_lipschitz"].value:
        return "LiSSA needs a scale of at least gradient_lipschitz + damping"
    condition = scale / least
    if steps < 2 * condition * math.log(4 * condition):
        return "LiSSA needs steps >= 2 k ln(4 k), k = scale / (damping + lambda_min)"
    return ""
