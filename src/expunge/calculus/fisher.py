"""The empirical Fisher matrix of a few rows, in dual form: exact inverse products without the matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import Misuse


class FisherDual:
    r"""The damped empirical Fisher matrix :math:`F = \lambda I + \frac{1}{n} G^\top G` of n gradients (rows of G).

    By the Woodbury identity
    :math:`F^{-1} v = \frac{1}{\lambda}\bigl(v - G^\top (n\lambda I + G G^\top)^{-1} G v\bigr)`: one Cholesky factor
    of n by n, in float64. Linear, symmetric, and the same in whatever order the rows come.

    It is not the Hessian, not even of a quadratic: it is made of the gradients at one point, and vanishes with them.

    Cost: n^2 p to build, n p a product.
    """

    def __init__(self, gradients: Float[Tensor, "n p"], damping: float) -> None:
        """Factor the matrix of these gradients.

        Args:
            gradients: one row each; kept, not copied.
            damping: lambda as a share of the mean eigenvalue ``trace(G'G / n) / p``: 1 doubles an average direction.

        Raises:
            Misuse: unless damping > 0 and some gradient is not zero: without damping the matrix has no inverse.
        """
        if damping <= 0:
            raise Misuse(f"damping must be > 0, got {damping}: of fewer rows than parameters it alone makes an inverse")
        self.gradients = gradients
        rows, size = gradients.shape
        gram = (gradients @ gradients.T).double()
        self.mean_eigenvalue = float(gram.trace()) / rows / size
        if self.mean_eigenvalue == 0:
            raise Misuse("all gradients are zero, so that their Fisher matrix is zero; there is nothing to invert")
        self.damping = damping * self.mean_eigenvalue
        eye = torch.eye(rows, dtype=torch.float64, device=gram.device)
        self._factor = torch.linalg.cholesky(gram + rows * self.damping * eye)

    def product(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``F v``."""
        rows = len(self.gradients)
        return self.damping * v + self.gradients.T @ (self.gradients @ v) / rows

    def solve(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``F^-1 v``."""
        inner = (self.gradients @ v).double()[:, None]
        dual = torch.cholesky_solve(inner, self._factor)[:, 0].to(v.dtype)
        return (v - self.gradients.T @ dual) / self.damping
