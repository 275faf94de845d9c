"""A softmax model with a perturbed objective: its minimum, the step that removes rows, and what that leaves over."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.calculus import conjugate_gradients
from expunge.calculus.head import SOFTMAX_THIRD
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.learn.loop import prepare

_SOLVED = 1e-12
_UNIT = 2.0**-53


@dataclass(frozen=True, eq=False)
class Perturbed:
    """``sum of the rows' cross-entropies + n weight_decay / 2 |W|^2 + <b, W>``: sums over rows, in float64.

    `W` (classes, width + 1) has the bias as its last column, which is penalised and perturbed like the others.

    Attributes:
        x: (n, width + 1) rows, each ending with 1.
        y: (n,) classes.
        classes: number of classes.
        weight_decay: in units of the mean objective.
        b: (classes, width + 1) the noise.
    """

    x: Tensor
    y: Tensor
    classes: int
    weight_decay: float
    b: Tensor

    @property
    def ridge(self) -> float:
        """What the penalty adds to each eigenvalue of the Hessian: weight decay times rows."""
        return self.weight_decay * len(self.x)

    def value(self, w: Float[Tensor, "k p"]) -> float:
        """The objective."""
        losses = torch.nn.functional.cross_entropy(self.x @ w.T, self.y, reduction="sum")
        return float(losses + self.ridge / 2 * w.square().sum() + (self.b * w).sum())

    def pull(self, w: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """Gradient of the losses and the penalty, without the noise's."""
        slopes = (self.x @ w.T).softmax(1) - torch.nn.functional.one_hot(self.y, self.classes)
        return slopes.T @ self.x + self.ridge * w

    def gradient(self, w: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """Gradient of the whole objective."""
        return self.pull(w) + self.b

    def solve(self, w: Float[Tensor, "k p"], right: Float[Tensor, "k p"], tolerance: float) -> Float[Tensor, "k p"]:
        """``H(w)^-1 right`` by conjugate gradients, in products ``x' (diag(p) - pp') (x V)``."""
        p = (self.x @ w.T).softmax(1)

        def product(flat: Tensor) -> Tensor:
            u = p * (self.x @ flat.view_as(w).T)
            return ((u - p * u.sum(1, keepdim=True)).T @ self.x).flatten()

        found = conjugate_gradients(product, right.flatten(), ridge=self.ridge, tolerance=tolerance, most=5000)
        return found.x.view_as(w)

    def minimum(self, start: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """Newton's method with line search, to a gradient of 1e-10 of the rows and noise it is made of.

        Raises:
            Misuse: if it does not get there, for a weight decay so small that rounding is in the way.
        """
        w, goal = start, 1e-10 * (len(self.x) + float(self.b.norm()))
        for _ in range(200):
            slope = self.gradient(w)
            if float(slope.norm()) <= goal:
                return w
            step = self.solve(w, slope, 1e-10)
            here, fall, length = self.value(w), float((slope * step).sum()), 1.0
            near = 1e-12 * (1 + abs(here))  # below that, values do not tell
            while length > 1e-6 and self.value(w - length * step) > here - 1e-4 * length * fall + near:
                length /= 2
            w = w - length * step
        raise Misuse("the perturbed objective was not brought to its minimum in 200 steps; raise weight_decay")


def features(records: Records, radius: float) -> Float[Tensor, "n p"]:
    """The rows flat, in float64, each with a 1 for the bias.

    Raises:
        Misuse: for a row longer than `radius`.
    """
    x = prepare(records.x, torch.float64).flatten(1)
    if len(x) and float(torch.linalg.vector_norm(x, dim=1).max()) > radius:
        raise Misuse(f"a row is longer than feature_radius {radius:g}; scale the rows before training, or raise it")
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def spectral_norm(x: Float[Tensor, "n p"]) -> float:
    """No less than the largest singular value: the root of the largest eigenvalue of ``x'x`` and what rounding takes.

    Not by the power method, which approaches from below. Each entry of ``x'x`` is off by at most n units of rounding
    of the sum of its absolute terms, in all by n of the squared Frobenius norm; the eigenvalues by some p units more.
    """
    largest = float(torch.linalg.eigvalsh(x.T @ x)[-1])
    slack = (len(x) + 20 * x.shape[1]) * _UNIT * float(x.square().sum())
    return math.sqrt(max(largest, 0.0) + slack) * (1 + 4 * _UNIT)


def residual_bound(x: Float[Tensor, "n p"], step: Float[Tensor, "k p"]) -> float:
    r"""Largest gradient, on these retained rows, that a full Newton step leaves over.

    :math:`\frac{\gamma}{2} |X|_2 \sqrt{\sum_i |u_i|^4}`, :math:`u_i = step\,x_i`, :math:`\gamma = \sqrt{2/27}`: a row's
    Hessian in its outputs changes along u by at most :math:`\gamma |u|` in the operator norm (see
    `softmax_hessian_lipschitz`), half of that on average over the step; the rows' shares :math:`v_i x_i'` with
    :math:`|v_i| \le \frac{\gamma}{2} |u_i|^2` sum to V'X. For rows of norm 1 never more
    than half of the paper's :math:`\gamma |X|_2 |step| |X step|` (Guo et al., 2020, corollary 1) of the binary case.
    """
    quartic = float((x @ step.T).square().sum(1).square().sum())
    return SOFTMAX_THIRD / 2 * spectral_norm(x) * math.sqrt(quartic) * (1 + 1e-9)


def removal(
    kept: Perturbed, gone: Perturbed, w: Float[Tensor, "k p"]
) -> tuple[Float[Tensor, "k p"], Float[Tensor, "k p"], float]:
    """The step that removes the rows of `gone`: the weights after, the step, and a bound of the residual it adds.

    ``W + H^-1 D``: D the removed rows' gradients with their share of the penalty, H the retained Hessian.
    """
    change = gone.pull(w)
    step = kept.solve(w, change, _SOLVED)
    p = (kept.x @ w.T).softmax(1)
    u = p * (kept.x @ step.T)
    missed = (u - p * u.sum(1, keepdim=True)).T @ kept.x + kept.ridge * step - change
    return w + step, step, residual_bound(kept.x, step) + float(missed.norm()) * (1 + 1e-9)
