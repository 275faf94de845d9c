"""Linear systems in a curvature that is known by its products only; each says how well it solved them.

Damping is counted in one unit everywhere: the curvature's own mean eigenvalue ``trace(A) / p``, so that a damping means
the same for a mean and for a sum, and for any scale of the loss. A dense matrix has it at hand; of a product it is
estimated by `mean_eigenvalue` and given as `unit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import Misuse

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """What a solver found.

    Attributes:
        x: the solution.
        residual: ``|A x - b| / |b|``, measured by one more product: what the solver reached, not what it aimed at.
        iterations: products that it took.
        converged: whether the residual is at most the tolerance asked for.
    """

    x: Tensor
    residual: float
    iterations: int
    converged: bool


def conjugate_gradients(
    product: Product,
    b: Float[Tensor, " p"],
    *,
    damping: float = 0.0,
    unit: float | None = None,
    ridge: float = 0.0,
    tolerance: float = 1e-6,
    most: int = 500,
) -> Solution:
    """Solve ``(A + (damping unit + ridge) I) x = b``, positive definite (Hestenes and Stiefel, 1952).

    Args:
        product: ``A v``.
        b: right side.
        damping: in mean eigenvalues of A.
        unit: the mean eigenvalue of A; needed if there is damping.
        ridge: added as it is: a weight decay's own second derivative.
        tolerance: on the relative residual.
        most: products at most.

    Raises:
        Misuse: at a direction of negative curvature: the system has no minimum, so that more damping is needed; and
            for damping without a positive unit.
    """
    shift = _shift(damping, unit) + ridge

    def times(v: Tensor) -> Tensor:
        return product(v) + shift * v

    x, r = torch.zeros_like(b), b.clone()
    direction, square, goal = r.clone(), torch.dot(r, r), tolerance**2 * torch.dot(b, b)
    steps = 0
    while steps < most and square > goal:
        image = times(direction)
        curvature = torch.dot(direction, image)
        if curvature <= 0:
            share = float(curvature / torch.dot(direction, direction))
            raise Misuse(f"the curvature is {share:.3g} along a direction; {_more(-share, damping, unit)}")
        step = square / curvature
        x, r = x + step * direction, r - step * image
        square, before = torch.dot(r, r), square
        direction = r + (square / before) * direction
        steps += 1
    return _solution(times, x, b, steps, tolerance)


def lissa(
    products: Iterable[Product],
    b: Float[Tensor, " p"],
    *,
    scale: float,
    damping: float = 0.0,
    unit: float | None = None,
    tolerance: float = 1e-6,
) -> Solution:
    """``x <- b + (I - (A_j + damping unit I) / scale) x``, over ``scale`` in the end (Agarwal et al., 2017).

    Here for comparison: it converges only if every A_j's eigenvalues lie in (0, 2 scale), as slowly as its smallest
    eigenvalue over `scale`, and what stochastic products leave it with is noise. Prefer `conjugate_gradients`.
    """
    x, steps, last, shift = b.clone(), 0, None, _shift(damping, unit)
    for product in products:
        x = b + x - (product(x) + shift * x) / scale
        steps, last = steps + 1, product
        if not bool(torch.isfinite(x).all()):
            raise Misuse(f"it diverged at step {steps}; the largest eigenvalue is above 2 scale = {2 * scale:.3g}")
    if last is None:
        raise Misuse("give at least one product")
    final = last
    return _solution(lambda v: final(v) + shift * v, x / scale, b, steps, tolerance)


def dense(product: Product, size: int, like: Tensor) -> Float[Tensor, "p p"]:
    """The matrix behind a product, column by column. Cost: `size` products, and size^2 numbers of memory."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return torch.stack([product(column) for column in eye], dim=1)


def solve_dense(matrix: Float[Tensor, "p p"], b: Float[Tensor, " p"], *, damping: float = 0.0) -> Solution:
    """Solve ``(A + damping trace(A) / p I) x = b`` by Cholesky, in float64.

    Raises:
        Misuse: if the damped matrix is not positive definite; the message names its smallest eigenvalue.
    """
    held = matrix.double()
    held = (held + held.T) / 2
    shift = _shift(damping, float(held.trace()) / len(held))
    held = held + shift * torch.eye(len(held), dtype=torch.float64, device=held.device)
    factor, failed = torch.linalg.cholesky_ex(held)
    if bool(failed):
        least = float(torch.linalg.eigvalsh(held)[0])
        raise Misuse(f"the matrix is not positive definite, its smallest eigenvalue is {least:.3g}; damp by more")
    x = torch.cholesky_solve(b.double()[:, None], factor)[:, 0].to(b.dtype)
    return _solution(lambda v: (held @ v.double()).to(v.dtype), x, b, 1, 1e-6)


def _shift(damping: float, unit: float | None) -> float:
    """What is added to every eigenvalue."""
    if not damping >= 0:
        raise Misuse(f"damping must be >= 0, got {damping}")
    if damping and (unit is None or not unit > 0):
        raise Misuse(f"damping is in mean eigenvalues, which must be > 0, got {unit}; give unit=mean_eigenvalue(...)")
    return damping * unit if damping and unit else 0.0


def _more(lacking: float, damping: float, unit: float | None) -> str:
    if unit is None or not unit > 0:
        return f"add more than {lacking:.3g} to it, which is damping in mean eigenvalues (unit)"
    return f"raise damping above {damping + lacking / unit:.3g}"


def _solution(times: Product, x: Tensor, b: Tensor, steps: int, tolerance: float) -> Solution:
    norm = float(torch.linalg.vector_norm(b))
    residual = float(torch.linalg.vector_norm(times(x) - b)) / norm if norm else 0.0
    return Solution(x=x, residual=residual, iterations=steps, converged=residual <= tolerance)
