"""A linear head on fixed features: its objective, exact derivatives, and bounds that hold of what was computed.

The objective is ``f(W) = (1/n) sum_i l(W x_i, y_i) + weight_decay / 2 ||W||^2`` over the kept rows, in float64. `W` is
(outputs, width), its last column the bias, as every feature row ends with a 1: the bias is regularised too. `l` is
cross-entropy of the softmax, or the squared error summed over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from scipy.linalg.blas import dsyrk
from torch import Tensor

from expunge.core.errors import Misuse

UNIT = 2.0**-53
"""Unit roundoff of float64."""

_ROWS = 256
"""Rows a block: their features stay in a core's cache between the two products of a gradient."""

_MANY_ROWS = 16_384
"""Rows a block of a Hessian: large products are quicker, and take 100 MB at 785 features."""


class HeadObjective:
    """The objective of a linear head on the kept rows of a set, and its derivatives.

    Attributes:
        x: (n, width) float64 features, each row ending with a 1.
        y: (n,) classes, or (n, outputs) float64 targets.
        keep: (n,) true for the rows that the objective is a mean over.
        outputs: rows of `W`.
        weight_decay: of the whole of `W`.
        loss: ``cross_entropy`` or ``mse``.
        count: number of kept rows.
    """

    def __init__(
        self,
        x: Float[Tensor, "n width"],
        y: Tensor,
        *,
        outputs: int,
        weight_decay: float,
        loss: str = "cross_entropy",
        keep: Tensor | None = None,
    ) -> None:
        if x.dtype is not torch.float64 or x.ndim != 2:
            raise Misuse(f"features must be a float64 matrix, got {x.dtype} of shape {tuple(x.shape)}; use .double()")
        if loss not in ("cross_entropy", "mse"):
            raise Misuse(f'loss must be cross_entropy or mse, got "{loss}"')
        self.x, self.outputs, self.weight_decay, self.loss = x, outputs, weight_decay, loss
        self.y = y if loss == "cross_entropy" else y.to(torch.float64).reshape(len(y), -1)
        self.keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if keep is None else keep
        self.count = int(self.keep.sum())
        if not self.count:
            raise Misuse("no row is kept, so that there is no mean; keep at least one")
        self._all = self.count == len(x)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(self.x.split(_ROWS), self.y.split(_ROWS), self.keep.split(_ROWS), strict=True)

    def _slopes(self, z: Float[Tensor, "outputs block"], y: Tensor) -> Float[Tensor, "outputs block"]:
        """Derivative of each row's loss by its outputs, one column a row."""
        if self.loss == "mse":
            return 2 * (z - y.T)
        p = torch.softmax(z, 0)
        p[y, torch.arange(len(y), device=y.device)] -= 1
        return p

    def rows_gradient(self, w: Float[Tensor, "outputs width"], rows: Tensor) -> Float[Tensor, "outputs width"]:
        """Sum of the losses' gradients of the rows at these positions, kept or not, without weight decay."""
        x = self.x[rows]
        answer: Tensor = self._slopes(w @ x.T, self.y[rows]) @ x
        return answer

    def gradient(self, w: Float[Tensor, "outputs width"]) -> Float[Tensor, "outputs width"]:
        """Gradient of the objective. Cost: one pass over the features, about .1 s for 60,000 rows of 785 on 2 cores."""
        total = torch.zeros_like(w)
        for x, y, keep in self._blocks():
            total.addmm_(self._kept(self._slopes(w @ x.T, y), keep), x)
        return total / self.count + self.weight_decay * w

    def value_and_gradient(self, w: Float[Tensor, "outputs width"]) -> tuple[float, Float[Tensor, "outputs width"]]:
        """The objective and its gradient, in one pass."""
        total, gradient = torch.zeros((), dtype=torch.float64, device=w.device), torch.zeros_like(w)
        for x, y, keep in self._blocks():
            z = w @ x.T
            if self.loss == "mse":
                losses = (z - y.T).square().sum(0)
            else:
                losses = torch.logsumexp(z, 0) - z.gather(0, y[None])[0]
            total += self._kept(losses, keep).sum()
            gradient.addmm_(self._kept(self._slopes(z, y), keep), x)
        decay = self.weight_decay / 2 * float(w.square().sum())
        return float(total) / self.count + decay, gradient / self.count + self.weight_decay * w

    def _kept(self, of_rows: Tensor, keep: Tensor) -> Tensor:
        return of_rows if self._all else of_rows.mul_(keep)

    def product(
        self, w: Float[Tensor, "outputs width"], v: Float[Tensor, "*k outputs width"]
    ) -> Float[Tensor, "*k outputs width"]:
        """The Hessian at `w` times one matrix `v`, or many at once. Cost: two passes of `gradient` for each."""
        many = v.reshape(-1, *w.shape)
        total = torch.zeros_like(many)
        for x, _, keep in self._blocks():
            u = many @ x.T
            if self.loss == "mse":
                u *= 2
            else:
                p = torch.softmax(w @ x.T, 0)
                u = p * (u - (p * u).sum(1, keepdim=True))
            total += self._kept(u, keep) @ x
        return (total / self.count + self.weight_decay * many).view(v.shape)

    def hessian(self, w: Float[Tensor, "outputs width"]) -> Float[Tensor, "p p"]:
        """The Hessian at `w`, of the entries of `W` row after row: (outputs width) squared, exact up to rounding.

        Of cross-entropy it consists of ``outputs^2`` symmetric blocks ``X' diag(p_a (1[a = b] - p_b)) X / n``, and each
        row of blocks sums to zero: only those above the diagonal are computed, each a symmetric product of half the
        cost. Cost: ``outputs (outputs - 1) / 2`` products of ``n width^2`` multiplications, and p^2 numbers.
        """
        k, width = self.outputs, self.x.shape[1]
        answer = torch.zeros(k, width, k, width, dtype=torch.float64, device=self.x.device)
        blocks = self._softmax_blocks(w) if self.loss != "mse" else self._squared_blocks()
        for a, b, block in blocks:
            if a == b:
                answer[a, :, a] += block
                continue
            answer[a, :, b] -= block
            answer[b, :, a] -= block
            answer[a, :, a] += block
            answer[b, :, b] += block
        flat = answer.view(k * width, k * width)
        flat.diagonal().add_(self.weight_decay)
        return flat

    def _squared_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        for x in (self.x if self._all else self.x[self.keep]).split(_MANY_ROWS):
            block = _gram(x) * (2 / self.count)
            yield from ((a, a, block) for a in range(self.outputs))

    def _softmax_blocks(self, w: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """For each pair of classes ``X' diag(p_a p_b) X / n``, some rows after others."""
        for x, keep in zip(self.x.split(_MANY_ROWS), self.keep.split(_MANY_ROWS), strict=True):
            root = torch.softmax(x @ w.T, 1).mul_(keep[:, None]).sqrt_()
            scaled = torch.empty_like(x)
            for a in range(self.outputs):
                for b in range(a + 1, self.outputs):
                    torch.mul(x, (root[:, a] * root[:, b])[:, None], out=scaled)
                    yield a, b, _gram(scaled) / self.count

    @cached_property
    def norms(self) -> Float[Tensor, " n"]:
        """L2 norm of each kept row's features."""
        of_all: Tensor = torch.linalg.vector_norm(self.x, dim=1)
        return of_all if self._all else of_all[self.keep]

    @cached_property
    def hessian_lipschitz(self) -> float:
        r"""A number that the Hessian's change is at most, per unit of Frobenius distance: 0 for squared error.

        For cross-entropy :math:`\sqrt{2/27}` times the mean of :math:`\|x_i\|^3`. Proof: the third derivative of
        log-sum-exp along a unit u is the third central moment of a random entry of u; entries of a unit vector lie
        within sqrt 2 of each other, and a variable of range r has a third central moment of at most
        :math:`r^3 / (6 \sqrt 3)`. A symmetric trilinear form takes its norm on the diagonal (Banach, 1938), and the
        outputs ``W x`` change by at most ``||x||`` times W. Two classes of equal and opposite weight attain it.
        """
        return 0.0 if self.loss == "mse" else softmax_hessian_lipschitz(1.0) * float(self.norms.pow(3).mean()) * _UP

    def gradient_error(self, w: Float[Tensor, "outputs width"]) -> float:
        """A number that ``||gradient(w) - the true gradient||`` is at most, whatever the order of the sums.

        Standard bounds of floating point (Higham, 2002, ch. 3); exp is taken to be within 4 units in the last place.
        """
        n, width = self.count, self.x.shape[1]
        size = float(torch.linalg.vector_norm(w))
        mean, square = float(self.norms.mean()), float(self.norms.square().mean())
        if self.loss == "mse":
            largest = float((self.y if self._all else self.y[self.keep]).abs().max()) * math.sqrt(self.outputs)
            sums = 2 * (size * square + largest * mean)  # mean of slope times norm, row by row
            outputs = 2 * _gamma(width) * size * square + 2 * UNIT * sums
        else:
            sums = math.sqrt(2) * mean
            # softmax is 1/2-Lipschitz; its own exps, sum and division cost each entry about outputs + 16 roundings.
            outputs = 0.5 * _gamma(width) * size * square + (self.outputs + 16) * UNIT * math.sqrt(2) * mean
        return (_gamma(n + 4) * sums + outputs + 4 * UNIT * self.weight_decay * size) * _UP

    def product_error(self, w: Float[Tensor, "outputs width"], v: Float[Tensor, "outputs width"]) -> float:
        """A number that ``||product(w, v) - the true product||`` is at most."""
        n, width = self.count, self.x.shape[1]
        size, step = float(torch.linalg.vector_norm(w)), float(torch.linalg.vector_norm(v))
        square, cube = float(self.norms.square().mean()), float(self.norms.pow(3).mean())
        own = (_gamma(n + width + 4) + (self.outputs + 40) * UNIT) * 2 * step * square
        of_w = 0.0 if self.loss == "mse" else 1.5 * _gamma(width) * size * step * cube
        return (own + of_w + 4 * UNIT * self.weight_decay * step) * _UP


_UP = 1 + 1e-6
"""Covers the rounding of the bounds themselves: sums of at most some millions of positive numbers."""


SOFTMAX_THIRD = math.sqrt(2 / 27)
"""Largest third derivative of log-sum-exp along a unit direction; the proof is at `HeadObjective.hessian_lipschitz`."""


def softmax_hessian_lipschitz(radius: float) -> float:
    """How fast the Hessian of one row's cross-entropy changes: ``sqrt(2 / 27) radius^3``, features of norm `radius`."""
    return SOFTMAX_THIRD * radius**3


def _gamma(n: int) -> float:
    """Higham's ``n u / (1 - n u)``."""
    return n * UNIT / (1 - n * UNIT)


def _gram(x: Tensor) -> Tensor:
    """``x' x``, both triangles."""
    if x.device.type != "cpu":
        whole: Tensor = x.T @ x
        return whole
    # In Fortran's order the transpose of a matrix in C's order: nothing is copied.
    upper: Tensor = torch.from_numpy(dsyrk(1.0, x.contiguous().numpy().T))
    both: Tensor = upper.triu() + upper.triu(1).T
    return both
