"""Many linear systems in one victim's curvature, solved together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.attack.victim import _DENSE, Victim
from expunge.core.coins import generator
from expunge.core.errors import Misuse

_ROWS = 4096
_RANK = 192
"""Directions that the preconditioner knows; it keeps as many numbers times the parameters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Solves:
    """``(H + d I)^-1 b`` of many b: what `Victim.solve` gives for one after the other, to the same tolerance.

    Up to 8192 parameters by the factored curvature, all b of a block at once. Above, by conjugate gradients that look
    at the sampled rows once for a whole block, preconditioned by what a sketch tells of the largest eigenvalues.

    Source: Frangella, Tropp and Udell (2021), algorithms 2.1 and 5.1. Differs: several right sides, each of which stops
    where it has converged. Cost: a sketch of 192 products, and some products for each b; 192 p numbers of memory, some
    times p numbers for each b of a block, and the activations of 4096 rows.

    Attributes:
        victim: whose curvature.
        tolerance: on each relative residual; of the factored curvature it is that of rounding.
        most: products for each b at most; what is not converged by then is given as it is, as `Victim.solve` does.
        block: how many b at once.
    """

    victim: Victim
    tolerance: float = 1e-3
    most: int = 300
    block: int = 32

    def of_gradients(self, x: Tensor, y: Tensor) -> Iterator[Float[Tensor, "b p"]]:
        """``(H + d I)^-1 g_i`` of these rows, a block at a time."""
        for some, labels in zip(x.split(self.block), y.split(self.block), strict=True):
            yield self(self.victim.objective.gradients(some, labels))

    def __call__(self, right: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        """Solve for each row of `right`.

        Raises:
            Misuse: where the curvature is not positive definite.
        """
        if self.victim.objective.size <= _DENSE:
            found = torch.cholesky_solve(right.double().T, self.victim._factor)
            return found.T.to(right.dtype)
        return torch.cat([self._gradients(some) for some in right.split(self.block)])

    def products(self, vectors: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        """``(H + d I) v`` of each row, in one look at the sampled rows."""
        x, y, weights = self.victim._sampled
        rows, total = max(1, _ROWS // len(vectors)), torch.zeros_like(vectors)
        for some, labels, each in zip(x.split(rows), y.split(rows), weights.split(rows), strict=True):
            total += self._curved(some, labels, each, vectors)
        return total / len(x) + (self.victim.weight_decay + self._shift) * vectors

    def _curved(self, x: Tensor, y: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
        def product(v: Tensor) -> Tensor:
            return self.victim.objective.gauss_newton_product(x, y, v, weights=weights)

        found: Tensor = torch.func.vmap(product)(vectors)
        return found

    @cached_property
    def _shift(self) -> float:
        damping = self.victim.reaction.damping
        return damping * self.victim._unit if damping else 0.0

    @cached_property
    def _sketch(self) -> tuple[Tensor, Tensor]:
        """Orthonormal rows, and of each what its part of a vector is to be multiplied by, less 1."""
        size, like = self.victim.objective.size, self.victim.objective.vector()
        drawn = torch.randn((size, min(_RANK, size)), generator=generator(0), dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.T.contiguous()
        image = torch.cat([self.products(some.to(like)) for some in basis.split(self.block)]).double()
        slack = torch.finfo(like.dtype).eps * float(image.norm())
        image = image + slack * basis
        core = image @ basis.T
        root, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if bool(failed):
            raise Misuse("the curvature is not positive definite; train with weight_decay > 0")
        _, lengths, known = torch.linalg.svd(
            torch.linalg.solve_triangular(root, image, upper=False), full_matrices=False
        )
        large = (lengths.square() - slack).clamp_min(torch.finfo(like.dtype).tiny)
        return known.to(like), (large[-1] / large - 1).to(like)

    def _nearly(self, right: Tensor) -> Tensor:
        known, less = self._sketch
        return right + (right @ known.T * less) @ known

    def _gradients(self, right: Tensor) -> Tensor:
        x, left = torch.zeros_like(right), right.clone()
        near = self._nearly(left)
        direction, square = near.clone(), (left * near).sum(1)
        goal = self.tolerance**2 * right.square().sum(1)
        for _ in range(self.most):
            going = (left.square().sum(1) > goal).nonzero().flatten()
            if not len(going):
                break
            along = direction[going]
            image = self.products(along)
            curvature = (along * image).sum(1)
            if bool((curvature <= 0).any()):
                raise Misuse("the curvature is not positive along a direction; train with weight_decay > 0")
            step = (square[going] / curvature)[:, None]
            x[going] += step * along
            left[going] -= step * image
            near = self._nearly(left[going])
            fresh = (left[going] * near).sum(1)
            direction[going] = near + (fresh / square[going])[:, None] * along
            square[going] = fresh
        return x
