"""Facility location: choose few points that cover all others well, greedily."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from expunge.core.errors import Misuse


def value(similar: Tensor, chosen: list[int]) -> float:
    """``sum_i max_{j chosen} similar[i, j]``, similarities >= 0: how well the chosen columns cover the rows."""
    return float(similar[:, chosen].max(1).values.double().sum()) if chosen else 0.0


def cover(similar: Tensor, budget: int) -> tuple[list[int], Tensor]:
    """Columns chosen one after another, each where it adds most; ties go to the lowest column.

    The value is monotone and submodular, so that the greedy choice reaches at least ``1 - 1/e`` of the best one of the
    same size (Nemhauser, Wolsey and Fisher, 1978). Gains only fall, so that a column is looked at again only while its
    old gain is the largest (Minoux, 1978): the same choice as looking at all of them.

    Args:
        similar: (n, m) similarities >= 0 of the rows to be covered to the columns that may be chosen.
        budget: how many to choose.

    Returns:
        The columns in the order chosen, and what each of them added.

    Raises:
        Misuse: for a budget below 1 or above m, or a negative similarity.

    Cost: n m to begin, then n a look; memory n m.
    """
    n, m = similar.shape
    if not 1 <= budget <= m:
        raise Misuse(f"the budget must be 1 to {m} columns, got {budget}")
    if n and float(similar.min()) < 0:
        raise Misuse(f"similarities must be >= 0, got {float(similar.min()):.3g}; subtract the smallest")
    columns = similar.T.contiguous()
    best = torch.zeros(n, dtype=similar.dtype, device=similar.device)
    heap = [(-gain, column, 0) for column, gain in enumerate(columns.sum(1, dtype=torch.float64).tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < budget:
        gain, column, seen = heapq.heappop(heap)
        if seen == len(chosen):
            chosen.append(column)
            gains.append(-gain)
            best = torch.maximum(best, columns[column])
        else:
            fresh = float((columns[column] - best).clamp_min(0).sum(dtype=torch.float64))
            heapq.heappush(heap, (-fresh, column, len(chosen)))
    return chosen, torch.tensor(gains, dtype=torch.float64)
