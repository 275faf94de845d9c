"""Nearest neighbours by the rows' raw values, within a class, in blocks: one index a row, and never a full sort."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from expunge.attack.selectors import Gap, assign
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.learn.loop import prepare

_ASKED, _POOL, _CLOSE = 1024, 8192, 4
Metric = Literal["cosine", "l2"]


@dataclass(frozen=True, kw_only=True)
class NearestNeighbour:
    """For each forgotten row the retained row of its class that looks most like it. Uses no gradient.

    With reuse a table made before the first step is looked up; an identical twin, if there is one, is what it holds.
    Without, the nearest row that is not yet taken is looked for in every step. Where no row of the class is left, rows
    of all others are looked at.

    Attributes:
        metric: ``cosine`` of the angle between rows, or ``l2``.
        table: (n,) int32 position of each row's neighbour, -1 where there is none; `prepared` makes it.
    """

    metric: Metric = "cosine"
    table: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.metric not in ("cosine", "l2"):
            raise Misuse(f'metric must be "cosine" or "l2", got "{self.metric}"')

    def prepared(self, records: Records, forgotten: Tensor, pool: Tensor) -> NearestNeighbour:
        """With the table of these rows' neighbours. Cost: see `nearest_table`."""
        table = torch.full((len(records),), -1, dtype=torch.int32)
        table[forgotten] = nearest_table(records, forgotten, pool, self.metric)
        return replace(self, table=table)

    def __call__(self, gap: Gap, *, rng: Generator) -> Tensor:
        """The neighbours; nothing is drawn."""
        if gap.reuse:
            if self.table is None:
                return nearest_table(gap.records, gap.forgotten, gap.pool, self.metric).long()
            found = self.table[gap.forgotten].long()
            if bool((found < 0).any()):
                raise Misuse("the table holds no neighbour of some row; prepare it for all forgotten rows")
            return found
        labels = None if gap.records.classes is None else gap.records.y.cpu()
        kept = self._same_class_first(gap, labels)
        asked = _Rows(gap.records, gap.forgotten, self.metric)
        parts = [asked.squared_distances(_Rows(gap.records, part, self.metric)) for part in kept.split(_POOL)]
        off = torch.cat(parts, 1)
        score = off / (1 + off)
        if labels is not None:
            score += labels[gap.forgotten][:, None] != labels[kept][None]
        least, where = score.topk(min(len(kept), len(gap.spots)), largest=False)
        return assign(least, kept[where], reuse=False)

    def _same_class_first(self, gap: Gap, labels: Tensor | None) -> Tensor:
        """The rows of the pool that are of a forgotten row's class, if these are enough for every class."""
        if labels is None:
            return gap.pool
        count = torch.bincount(labels[gap.forgotten], minlength=gap.records.classes or 0)
        held = torch.bincount(labels[gap.pool], minlength=gap.records.classes or 0)
        if bool((held < count).any()):
            return gap.pool
        return gap.pool[torch.isin(labels[gap.pool], labels[gap.forgotten])]


def nearest_table(records: Records, rows: Tensor, pool: Tensor, metric: Metric = "cosine") -> Tensor:
    """For each of these rows, the nearest row of its class in the pool, other than itself.

    Args:
        records: all rows; labels of a regression are no classes, and play no part.
        rows: positions, all of whose neighbours are looked for.
        pool: positions of the rows that may be neighbours, each once.
        metric: ``cosine`` or ``l2``.

    Returns:
        (len(rows),) int32 positions. Where the pool holds no other row of the class: the nearest of any class.

    Raises:
        Misuse: if some row has no other row in the pool.

    Cost: ``len(rows) * len(class)`` inner products in float32, blocks of 1,024 by 8,192; the four nearest by these are
    compared anew in float64, so that an identical twin always wins. Memory: a few blocks, up to 300 MB at 28 x 28.
    """
    found = torch.full((len(rows),), -1, dtype=torch.int32)
    for places, near in _classes(records, rows, pool):
        for part in places.split(_ASKED):
            found[part] = _nearest(records, rows[part], near, metric).to(torch.int32)
    alone = (found < 0).nonzero().flatten()
    for part in alone.split(_ASKED):
        found[part] = _nearest(records, rows[part], pool, metric).to(torch.int32)
    if bool((found < 0).any()):
        raise Misuse("the pool holds no other row than the one that a neighbour is looked for; give a larger pool")
    return found


def _classes(records: Records, rows: Tensor, pool: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if records.classes is None:
        yield torch.arange(len(rows)), pool
        return
    labels = records.y.cpu()
    for label in labels[rows].unique().tolist():
        near = pool[labels[pool] == label]
        if len(near):
            yield (labels[rows] == label).nonzero().flatten(), near


def _nearest(records: Records, rows: Tensor, pool: Tensor, metric: Metric) -> Tensor:
    """(len(rows),) positions from the pool; -1 for a row that is all of it."""
    asked, least, close = _Rows(records, rows, metric), [], []
    for part in pool.split(_POOL):
        off = asked.squared_distances(_Rows(records, part, metric))
        off[rows[:, None] == part[None]] = float("inf")
        values, where = off.topk(min(_CLOSE, len(part)), largest=False)
        least.append(values)
        close.append(part[where])
    values, where = torch.cat(least, 1).topk(min(_CLOSE, sum(one.shape[1] for one in least)), largest=False)
    return _exactly(asked, torch.cat(close, 1).gather(1, where), values)


def _exactly(asked: _Rows, close: Tensor, values: Tensor) -> Tensor:
    """The nearest of a few by float64 differences; of rows in the same direction, the nearest; of equals, the first."""
    x, raw = asked.exact(asked.positions), asked.raw(asked.positions)
    angle, length = [], []
    for column in close.unbind(1):
        angle.append((asked.exact(column) - x).square().sum(1))
        length.append((asked.raw(column) - raw).square().sum(1))
    lost = values.isinf().numpy()
    keys = [torch.stack(one, 1).numpy() for one in (length, angle)]
    order = np.lexsort((close.numpy(), *(np.where(lost, np.inf, key) for key in keys)), axis=1)
    first = torch.from_numpy(order[:, :1].copy())
    best = close.gather(1, first).flatten()
    return torch.where(values.isinf().gather(1, first).flatten(), -1, best)


class _Rows:
    """Rows at some positions, flat, as the metric compares them."""

    def __init__(self, records: Records, positions: Tensor, metric: Metric) -> None:
        self.records, self.positions, self.metric = records, positions, metric
        self.x = self._scaled(self._read(positions, torch.float32))
        self.squares = self.x.square().sum(1)

    def squared_distances(self, other: _Rows) -> Tensor:
        """(n, m) float32, exact to about 1e-6 of the squares."""
        return torch.addmm(other.squares, self.x, other.x.T, alpha=-2).add_(self.squares[:, None]).clamp_(min=0)

    def exact(self, positions: Tensor) -> Tensor:
        """Rows at these positions as the metric compares them, in float64."""
        return self._scaled(self.raw(positions))

    def raw(self, positions: Tensor) -> Tensor:
        """The rows' own values in float64."""
        return self._read(positions, torch.float64)

    def _read(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        x, _ = next(iter(self.records.batches([positions])))
        return prepare(x, dtype).to("cpu", dtype).flatten(1)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.metric == "l2" else x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
