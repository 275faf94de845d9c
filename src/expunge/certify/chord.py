"""The minimiser of a strongly convex head, to within a proved distance, from the neighbourhood of another's.

Chord-Newton steps reuse the factor of an old Hessian and compute only the gradient anew, so that a step costs one pass
over the rows. What decides when to stop is a bound on the distance that holds whatever the steps were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from scipy.linalg.blas import strsv
from scipy.optimize import brentq, minimize
from torch import Tensor

from expunge.calculus.head import HeadObjective
from expunge.calculus.solvers import conjugate_gradients
from expunge.core.errors import Unsupported

DENSE = 12_000
"""Most parameters whose Hessian is factorised: 2.3 GB for a while, .6 GB to keep. Beyond: conjugate gradients."""

SLOW = 0.5
"""A chord step that leaves more than this share of the gradient has the Hessian computed anew."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Upper bounds on the L2 distance from `w` to the minimiser, rounding included.

    Attributes:
        gradient: ``||g|| / weight_decay``: strong convexity alone.
        kantorovich: from the length of the Newton step; infinite where not computed or not applicable.
    """

    gradient: float
    kantorovich: float = math.inf

    @property
    def value(self) -> float:
        """The smaller."""
        return min(self.gradient, self.kantorovich)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """Where the steps ended. All of it is secret: the bound and the gradient depend on the rows.

    Attributes:
        w: within `bound.value` of the minimiser.
        gradient: of the objective at `w`.
        factor: lower Cholesky factor of the Hessian at some earlier point, float32; None where it would be too large.
        bound: on the distance.
        refactored: whether `factor` is of the objective's own rows, computed on the way.
    """

    w: Float[Tensor, "outputs width"]
    gradient: Float[Tensor, "outputs width"]
    factor: Float[Tensor, "p p"] | None = field(repr=False)
    bound: Bound
    refactored: bool


def gradient_bound(objective: HeadObjective, w: Tensor, gradient: Tensor) -> float:
    """``(||g|| + rounding) / weight_decay``, as the objective is weight_decay-strongly convex."""
    return (float(torch.linalg.vector_norm(gradient)) + objective.gradient_error(w)) / objective.weight_decay * _UP


def kantorovich_bound(
    objective: HeadObjective, w: Tensor, gradient: Tensor, step: Tensor, factor: Tensor | None = None, refine: int = 2
) -> float:
    r"""A bound from an approximate Newton step `s` (``H s`` near g), of any quality; infinite where it says nothing.

    Let d be the way from the minimiser to w, and ``s* = H^{-1} g``. As ``g = (mean of H on the way) d``,
    ``d - s* = H^{-1} (H - mean H) d``, and that is small in two ways:

    1. H changes by at most M a unit: ``||d|| <= ||s*|| + M / (2 lambda) ||d||^2`` (Newton-Kantorovich).
    2. H changes by at most a factor ``e^{r ||d||}``, ``r = sqrt 2 max ||x_i||``, as a third cumulant of class
       probabilities is at most the range times the variance (self-concordance; Bach, 2010): with
       ``psi(a) = (e^a - 1) / a - 1``, ``||d|| <= ||s*|| + psi / (1 - psi) ||s*||_H / sqrt lambda`` at
       ``a = r ||d||``.

    Each holds along the whole homotopy from w to the minimiser, on which d grows from 0 without a jump, so that d
    cannot lie beyond the gap that it leaves: d is at most the smallest t that satisfies it with equality. The step's
    own residual ``rho = H s - g`` is paid for: ``||s*|| <= ||s|| + ||rho|| / lambda``; with a factor it is made smaller
    first, `refine` times. Cost: ``1 + refine`` products with H.
    """
    decay = objective.weight_decay
    image = objective.product(w, step)
    for _ in range(refine if factor is not None else 0):
        step = step + newton_step(objective, w, gradient - image, factor)
        image = objective.product(w, step)
    slack = objective.product_error(w, step) + objective.gradient_error(w)
    residual = float(torch.linalg.vector_norm(image - gradient)) + slack
    length = float(torch.linalg.vector_norm(step)) + residual / decay
    energy = math.sqrt(max(0.0, float((step * image).sum())) + slack * float(torch.linalg.vector_norm(step)))
    local = (energy + residual / math.sqrt(decay)) / math.sqrt(decay)
    if objective.loss == "mse":
        return length * _UP
    return min(_lipschitz_root(length, objective), _concordant_root(length, local, objective)) * _UP


def _lipschitz_root(length: float, objective: HeadObjective) -> float:
    h = objective.hessian_lipschitz / objective.weight_decay * length
    return 2 * length / (1 + math.sqrt(1 - 2 * h)) if h < 0.499 else math.inf


def _concordant_root(length: float, local: float, objective: HeadObjective) -> float:
    """The smallest t with ``t = length + psi / (1 - psi) local``, psi at ``r t``; infinite if there is none."""
    rate = math.sqrt(2) * float(objective.norms.max())

    def excess(t: float) -> float:
        psi = _psi(rate * t)
        return length + psi / (1 - psi) * local - t if psi < 1 else math.inf

    if not length > 0:
        return 0.0 if length == 0 else math.inf
    # excess is convex where it is finite: its smallest root lies before its first non-positive value on a fine scan.
    t = length
    for _ in range(60):
        t *= 1.05
        if excess(t) <= 0:
            return float(brentq(excess, t / 1.05, t, xtol=1e-300, rtol=1e-12)) * (1 + 1e-9)
    return math.inf


def _psi(a: float) -> float:
    """``(e^a - 1) / a - 1``, rounded up; infinite where it is above 1 anyway."""
    if a < 1e-3:
        return a / 2 * (1 + a)
    return math.expm1(a) / a - 1 if a < 2 else math.inf


def solve(
    objective: HeadObjective,
    start: Float[Tensor, "outputs width"],
    cap: float,
    *,
    factor: Tensor | None = None,
    guess: Tensor | None = None,
    most: int = 30,
) -> Solved:
    """Go from `start` until the minimiser is within `cap`, by a bound that includes rounding.

    Args:
        objective: with weight decay.
        start: anywhere.
        cap: L2 distance.
        factor: Cholesky factor of a Hessian like this one's, for instance of an objective with a few more rows.
        guess: the gradient at `start` as far as known, which saves a pass; it only chooses a step.
        most: steps before giving up.

    Raises:
        Unsupported: if the cap is below what float64 can vouch for here, or is not reached.

    Cost: a step is one pass over the rows and two triangular solves; a new factor costs
    a Hessian and p^3 / 3 operations.
    """
    floor = 2 * objective.gradient_error(start) / objective.weight_decay
    if not cap > floor:
        raise Unsupported(
            f"the cap of {cap:.3g} on the distance is below what float64 can vouch for on these rows; "
            "raise sigma, the budget's epsilon or weight_decay, or use retrain"
        )
    w, fresh, refactored = start, False, False
    if factor is None:
        w = _descend(objective, start)
    known = guess is None or factor is None or not bool(guess.any())
    gradient = objective.gradient(w) if known or guess is None else guess
    for _ in range(most):
        if known and gradient_bound(objective, w, gradient) <= cap:
            return Solved(
                w=w,
                gradient=gradient,
                factor=factor,
                refactored=refactored,
                bound=Bound(gradient=gradient_bound(objective, w, gradient)),
            )
        if factor is None and w.numel() <= DENSE:
            factor, fresh, refactored = factorise(objective, w), True, True
        step = newton_step(objective, w, gradient, factor)
        if known and float(torch.linalg.vector_norm(step)) <= cap:
            sharper = kantorovich_bound(objective, w, gradient, step, factor)
            if sharper <= cap:
                bound = Bound(gradient=gradient_bound(objective, w, gradient), kantorovich=sharper)
                return Solved(w=w, gradient=gradient, factor=factor, refactored=refactored, bound=bound)
        before = float(torch.linalg.vector_norm(gradient))
        moved, gradient = _backtracked(objective, w, step, before)
        share = float(torch.linalg.vector_norm(gradient)) / before
        w, known = moved, True
        if share > SLOW and not fresh:
            factor = None
        fresh = False
    raise Unsupported(
        f"{most} Newton steps did not come within the cap of {cap:.3g}; raise weight_decay or sigma, or use retrain"
    )


def factorise(objective: HeadObjective, w: Float[Tensor, "outputs width"]) -> Float[Tensor, "p p"]:
    """The lower Cholesky factor of the Hessian at `w`: made in float64, kept in float32, as it only chooses steps."""
    factor: Tensor = torch.linalg.cholesky(objective.hessian(w)).float().contiguous()
    return factor


def _solved(factor: Float[Tensor, "p p"], b: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    if factor.device.type != "cpu":
        return torch.cholesky_solve(b[:, None], factor)[:, 0]
    # BLAS directly: torch copies the factor, at twenty times the cost of the two solves.
    upper = factor.numpy().T
    return torch.from_numpy(strsv(upper, strsv(upper, b.numpy(), lower=0, trans=1), lower=0))


def newton_step(objective: HeadObjective, w: Tensor, gradient: Tensor, factor: Tensor | None) -> Tensor:
    """The Hessian at `w`, or the one behind the factor, solved for the gradient, nearly: bounds never trust it."""
    if factor is not None:
        scale = float(gradient.abs().max()) or 1.0  # so that no gradient is too small for float32
        return (_solved(factor, (gradient / scale).flatten().float()).double() * scale).view(w.shape)
    solution = conjugate_gradients(
        lambda v: objective.product(w, v.view(w.shape)).flatten(), gradient.flatten(), tolerance=1e-2, most=500
    )
    return solution.x.view(w.shape)


def _backtracked(objective: HeadObjective, w: Tensor, step: Tensor, before: float) -> tuple[Tensor, Tensor]:
    """The point after the step, or after a shorter one if the gradient would grow; and the gradient there."""
    for halvings in range(30):
        moved = w - step / 2**halvings
        gradient = objective.gradient(moved)
        if float(torch.linalg.vector_norm(gradient)) < before:
            break
    return moved, gradient


def _descend(objective: HeadObjective, start: Tensor) -> Tensor:
    """By L-BFGS into the region where Newton's steps are good: until the gradient has lost four digits, or so."""
    shape = start.shape

    def both(flat: object) -> tuple[float, object]:
        value, gradient = objective.value_and_gradient(torch.as_tensor(flat).to(start.device).view(shape))
        return value, gradient.flatten().cpu().numpy()

    goal = 1e-3 * objective.weight_decay
    answer = minimize(
        both,
        start.flatten().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 300, "gtol": goal, "maxcor": 20},
    )
    return torch.as_tensor(answer.x).to(start.device).view(shape)


_UP = 1 + 1e-9
"""Covers the few roundings of a bound's own arithmetic."""
