"""The way to the minimum of a model's training objective once its rows weigh otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.calculus import Objective
from expunge.core.errors import Misuse

_PAIRS = 10
"""Steps that the quasi-Newton way remembers."""


class Point(Protocol):
    """Where a convex objective stands, at some parameters; a `Victim` is one."""

    @property
    def few(self) -> bool:
        """Whether `solve` knows the curvature of this very point: then steps are Newton's, else quasi-Newton."""

    @property
    def gradient(self) -> Float[Tensor, " p"]:
        """Of the objective."""

    def solve(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """The inverse curvature, or one near it, times v."""

    def stepped(self, step: Float[Tensor, " p"]) -> Self:
        """The point that lies this far from here."""


P = TypeVar("P", bound=Point)


def minimum(now: P, *, goal: float, most: int) -> P:
    """The minimum, by Newton's steps where the curvature is known anew at every point, else by L-BFGS.

    Args:
        now: where to start.
        goal: the gradient's norm to come down to.
        most: steps at most; a gradient and a solve each, of steps that are halved some gradients more.

    Raises:
        Misuse: if they do not suffice.
    """
    left = now.gradient
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(most):
        if float(left.norm()) <= goal:
            return now
        step = -now.solve(left) if now.few else -_two_loops(left, pairs, now.solve)
        now, after, taken = _shorter(now, step, left)
        if float(torch.dot(after - left, taken)) > 0:
            pairs = [*pairs[1 - _PAIRS :], (taken, after - left)]
        left = after
    raise Misuse(
        f"after {most} steps the gradient is {float(left.norm()):.2g}, above {goal:g}; raise most or tolerance"
    )


def summed_gradient(
    objective: Objective, batches: Iterable[tuple[Tensor, Tensor]], weights: Float[Tensor, " n"]
) -> Float[Tensor, " p"]:
    """Of the rows' losses, weighted. Cost: one gradient of the rows whose weight is not 0."""
    total, start = torch.zeros_like(objective.vector()), 0
    for x, y in batches:
        some = weights[start : start + len(x)]
        start += len(x)
        moved = some.nonzero().flatten()
        if len(moved):
            total += objective.gradient(x[moved], y[moved], weights=some[moved])
    return total


def _shorter(now: P, step: Tensor, left: Tensor) -> tuple[P, Tensor, Tensor]:
    """The point after this step, halved until the gradient does not double; its gradient, and the step taken."""
    for _ in range(10):
        there = now.stepped(step)
        after = there.gradient
        if float(after.norm()) <= 2 * float(left.norm()):
            break
        step = step / 2
    return there, after, step


def _two_loops(
    v: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], first: Callable[[Tensor], Tensor]
) -> Float[Tensor, " p"]:
    """L-BFGS's inverse curvature times `v` (Nocedal, 1980), starting from `first`."""
    rest, shares = v, []
    for moved, changed in reversed(pairs):
        shares.append(torch.dot(moved, rest) / torch.dot(moved, changed))
        rest = rest - shares[-1] * changed
    answer = first(rest)
    for (moved, changed), share in zip(pairs, reversed(shares), strict=True):
        answer = answer + (share - torch.dot(changed, answer) / torch.dot(moved, changed)) * moved
    return answer
