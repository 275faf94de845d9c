"""Nearest rows of other owners, in blocks: sorted along one direction, so that most pairs are never looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.records import Records
from expunge.learn.loop import prepare

_BLOCK = 2048
_WIDTH = 24


@dataclass(frozen=True, kw_only=True, eq=False)
class Near:
    """The nearest row within reach.

    Attributes:
        row: (n,) its position; -1 if none is within reach.
        distance: (n,) in the unit of `spread`; infinite if none is.
    """

    row: Tensor
    distance: Tensor


def flat(records: Records) -> Tensor:
    """(n, d) float32 rows as a model reads them. Cost: a copy, 190 MB for 60,000 rows of 784."""
    parts = [prepare(x, torch.float32).flatten(1) for x, _ in records.batches(torch.arange(len(records)).split(_BLOCK))]
    return torch.cat(parts).float().cpu() if parts else torch.zeros(0, 1)


def spread(rows: Tensor) -> float:
    """Root mean squared distance of two random rows: the unit in which distances are told."""
    return float((2 * rows.var(0, correction=0).sum()).sqrt().clamp_min(1e-12))


def nearest(queries: Tensor, rows: Tensor, forbidden: Tensor | None = None) -> Near:
    """For each query its nearest row, whatever the distance. Cost: queries times rows times width."""
    found, where = [], []
    for start in range(0, len(queries), _BLOCK):
        apart = torch.cdist(queries[start : start + _BLOCK], rows)
        if forbidden is not None:
            apart[forbidden[start : start + _BLOCK]] = torch.inf
        distance, place = apart.min(1)
        found.append(distance)
        where.append(torch.where(distance.isinf(), -1, place))
    return Near(row=torch.cat(where), distance=torch.cat(found))


def others_within(rows: Tensor, owners: Tensor, reach: float, rng: Generator) -> Near:
    """For each row the nearest row of another owner, if one is within `reach`.

    Rows are projected on `_WIDTH` orthonormal directions, which never makes a distance longer, and sorted along the
    first: only rows within `reach` along it are compared at all, and only pairs within reach in the projection are
    compared in full. Nothing within reach is missed.

    Cost: at worst ``n^2 / 2`` products of 24 numbers, far fewer where `reach` is small beside the rows' spread; blocks
    of 2,048 by 2,048 numbers at a time.
    """
    n, width = rows.shape
    shadow = rows @ _directions(rows, min(_WIDTH, width), rng)
    order = shadow[:, 0].argsort()
    state = _Search(rows[order], owners[order], shadow[order] - shadow.mean(0), reach)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        last = int(torch.searchsorted(state.first, state.first[stop - 1] + state.slack, right=True))
        for at in range(start, max(last, stop), _BLOCK):
            state.compare(slice(start, stop), slice(at, min(at + _BLOCK, n)))
    row, far = torch.empty_like(order), torch.empty(n)
    row[order] = torch.where(state.where < 0, -1, order[state.where.clamp_min(0)])
    far[order] = state.best
    return Near(row=row, distance=far)


class _Search:
    """The nearest rows found so far, of rows sorted along their first direction."""

    def __init__(self, rows: Tensor, owners: Tensor, shadow: Tensor, reach: float) -> None:
        self.rows, self.owners, self.shadow, self.reach = rows, owners, shadow, reach
        self.first, self.squares = shadow[:, 0].contiguous(), shadow.square().sum(1)
        # Squared distances come from differences of squares, and may be off by rounding of those.
        self.slack = reach * (1 + 1e-4)
        self.most = self.slack**2 + 1e-5 * float(self.squares.max())
        self.best = torch.full((len(rows),), torch.inf)
        self.where = torch.full((len(rows),), -1, dtype=torch.int64)

    def compare(self, one: slice, two: slice) -> None:
        """Look for pairs within reach between two blocks, which may be the same."""
        apart = torch.addmm(self.squares[two][None], self.shadow[one], self.shadow[two].T, alpha=-2)
        near = apart <= (self.most - self.squares[one])[:, None]
        if one.start == two.start:
            near.fill_diagonal_(False)
        mine = one.start + near.any(1).nonzero().flatten()
        if not len(mine):
            return
        theirs = two.start + near.any(0).nonzero().flatten()
        full = torch.cdist(self.rows[mine], self.rows[theirs])
        full[self.owners[mine][:, None] == self.owners[theirs][None]] = torch.inf
        self._keep(mine, *_smallest(full, theirs))
        self._keep(theirs, *_smallest(full.T, mine))

    def _keep(self, rows: Tensor, distance: Tensor, place: Tensor) -> None:
        better = (distance < self.best[rows]) & (distance <= self.reach)
        self.best[rows[better]] = distance[better]
        self.where[rows[better]] = place[better]


def _smallest(apart: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    distance, place = apart.min(1)
    return distance, names[place]


def _directions(rows: Tensor, width: int, rng: Generator) -> Tensor:
    """(d, width) orthonormal directions in which a sample of the rows varies most."""
    some = torch.randperm(len(rows), generator=child(rng, "directions"))[:1000]
    sample = rows[some] - rows[some].mean(0)
    _, vectors = torch.linalg.eigh((sample.T @ sample).double())
    chosen: Tensor = vectors.flip(1)[:, :width].to(rows.dtype)
    return chosen
