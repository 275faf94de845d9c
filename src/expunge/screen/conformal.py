"""p-values of a request among benign ones: each screen's, and that of the smallest of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expunge.core.errors import Misuse


def least_draws(rate: float) -> int:
    """How many benign draws a false-alarm rate takes at least: with fewer, no p-value can be as small."""
    if not 0 < rate < 1:
        raise Misuse(f"the false-alarm rate must lie between 0 and 1, got {rate}")
    return math.ceil(1 / rate - 1e-9) - 1


def p_values(benign: Tensor, found: Tensor) -> tuple[Tensor, float]:
    """Each screen's p-value of a request, and the request's own.

    A screen's is ``(1 + #{benign >= found}) / (m + 1)``. The request's is that of its smallest p-value, ranked among
    the smallest p-values of the m benign requests, all of them ranked within the same pool of m + 1: the pool is
    treated alike, so that no draw need be held out (Westfall and Young, 1993). If the request is exchangeable with the
    draws, each of these numbers is at most `rate` with probability at most `rate`, over the request and the draws
    together; ties only make it rarer. For draws that are fixed the rate varies, by about
    ``sqrt(rate (1 - rate) / m)``.

    Args:
        benign: (m, screens) scores of benign requests.
        found: (screens,) scores of the request.

    Returns:
        (screens,) p-values, and the combined one.

    Raises:
        Misuse: for a score that is no number.
    """
    pool = torch.cat([benign, found[None]]).double()
    if bool(pool.isnan().any()):
        raise Misuse("a screen's score is NaN; a model whose outputs are not finite cannot be screened")
    total = len(pool)
    each = torch.empty_like(pool)
    for column in range(pool.shape[1]):
        ordered = pool[:, column].sort().values
        above = total - torch.searchsorted(ordered, pool[:, column].contiguous())
        each[:, column] = above.double() / total  # whole numbers would be divided in float32, and 1/20 be above .05
    least = each.min(1).values
    return each[-1], int((least <= least[-1]).sum()) / total
