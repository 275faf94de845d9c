"""The unit that damping is counted in: the mean eigenvalue of a curvature that is known by its products."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from expunge.calculus.solvers import Product
from expunge.core.coins import child


def mean_eigenvalue(product: Product, like: Tensor, rng: Generator, *, probes: int = 8) -> float:
    """``trace(A) / p`` of a symmetric A: exact if there are as many probes as parameters, else estimated.

    Hutchinson's estimate (1990): the mean of ``z' A z / p`` over vectors z of random signs. Unbiased; for a positive
    semi-definite A its relative standard deviation is at most ``sqrt(2 / probes)``, and near
    ``sqrt(2 / (probes k))`` where k eigenvalues of like size make up the trace.

    Args:
        product: ``A v``.
        like: a vector of p entries, whose dtype and device the probes take.
        rng: names the signs; nothing is drawn from it.
        probes: products to spend.
    """
    size = len(like)
    if size <= probes:
        vectors = list(torch.eye(size, dtype=like.dtype, device=like.device))
        return sum(float(torch.dot(one, product(one))) for one in vectors) / size
    total = 0.0
    for probe in range(probes):
        signs = torch.randint(0, 2, (size,), generator=child(rng, "probe", probe), dtype=torch.int8)
        vector = (2 * signs - 1).to(like)
        total += float(torch.dot(vector, product(vector)))
    return total / probes / size
