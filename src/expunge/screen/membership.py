"""Rows that the asker does not hold, that were never trained on, or that nearly copy somebody else's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from expunge.core.errors import Misuse
from expunge.screen.asked import Asked
from expunge.screen.nearest import Near, flat, nearest, others_within, spread
from expunge.screen.scene import Scene
from expunge.screen.sieve import Measure, Reader, Sieve


@dataclass(frozen=True, kw_only=True)
class Membership(Sieve):
    """Who holds the requested rows, by owner and content digest; and near-duplicates, which no digest sees.

    A row is flagged if the model was never trained on it, if the named owner does not hold it, or if whoever asked is
    an owner of other rows only. A row near a trained row of another owner, or near another row of the request, is
    reported with that neighbour. Of a replacement the new rows are looked at.

    The request's score is the number of rows never trained on or another's, plus the mean closeness of the
    near-duplicates (1 for a copy, 0 at `near`), which is less than one row.

    Attributes:
        near: near-duplicates are at most so far apart, as a share of the root mean squared distance of two random
            rows, all columns as the model reads them.

    Cost: seconds for 60,000 rows of 784, and about 600 MB (rows as float32, and blocks).
    Not guaranteed: distances are those of the input space; a shifted picture is far from itself.
    """

    near: float = 0.1

    def __post_init__(self) -> None:
        if not self.near > 0:
            raise Misuse(f"near must be > 0, got {self.near}")

    def prepare(self, scene: Scene, *, rng: Generator) -> Reader:
        """Find the near-duplicates of other owners among the rows."""
        return _Reader(self.near, scene, rng)


class _Reader:
    """The screen, once it has looked at the rows."""

    def __init__(self, near: float, scene: Scene, rng: Generator) -> None:
        self.scene, self.rows = scene, flat(scene.rows)
        self.unit = spread(self.rows)
        self.reach = near * self.unit
        numbers = {owner: number for number, owner in enumerate(sorted(set(scene.rows.owners)))}
        self.owners = torch.tensor([numbers[owner] for owner in scene.rows.owners])
        self.numbers = numbers
        self.others = others_within(self.rows, self.owners, self.reach, rng)

    def __call__(self, asked: Asked) -> Measure:
        """Measure a request."""
        index = self.scene.index(asked)
        mine, held, given = self._rows(asked, index)
        within = self._within(mine)
        close = torch.maximum(self._closeness(held.distance), self._closeness(within.distance))
        wrong = [self._wrong(asked, row) for row in range(len(asked.ids))] + list(asked.why)
        bad = torch.tensor([bool(one) for one in wrong])
        score = bad.double() + close.double() / 2

        def reason(row: int) -> str:
            return "; ".join(one for one in (wrong[row], *self._said(asked, row, held, within)) if one) or given

        whole = float(bad.sum()) + min(float(close.mean()), 1.0) * 0.999
        return Measure(rows=score, whole=whole, flagged=bad | (close > 0), reason=reason)

    def _rows(self, asked: Asked, index: Tensor) -> tuple[Tensor, Near, str]:
        """The rows themselves, and their nearest rows of other owners."""
        mine, held = self.rows[index], Near(row=self.others.row[index], distance=self.others.distance[index])
        if asked.new is not None:
            mine = flat(asked.new)
            held = nearest(mine, self.rows, self.owners[index][:, None] == self.owners[None])
        if asked.strangers is not None:
            given = flat(asked.strangers)
            owner = torch.tensor([self.numbers.get(asked.asked_by, -1)])
            far = nearest(given, self.rows, (owner == self.owners)[None].expand(len(given), -1))
            mine = torch.cat([mine, given])
            held = Near(row=torch.cat([held.row, far.row]), distance=torch.cat([held.distance, far.distance]))
        return mine, held, "held by its owner and trained on; no near-duplicate of another owner's"

    def _within(self, mine: Tensor) -> Near:
        """The nearest other row of the request."""
        if len(mine) < 2:
            return Near(row=torch.full((len(mine),), -1), distance=torch.full((len(mine),), torch.inf))
        return nearest(mine, mine, torch.eye(len(mine), dtype=torch.bool))

    def _closeness(self, distance: Tensor) -> Tensor:
        return (1 - distance / (self.reach * 1.0001)).clamp_min(0)

    def _wrong(self, asked: Asked, row: int) -> str:
        by, place = asked.asked_by, int(asked.places[row])
        owner = self.scene.records.owners[place]
        if by and by != owner and by in self.numbers:
            return f'asked by owner "{by}", held by another'
        return ""

    def _said(self, asked: Asked, row: int, held: Near, within: Near) -> list[str]:
        said = []
        for near, names, what in (
            (held, self.scene.rows.ids, "of another owner"),
            (within, asked.names, "of this request"),
        ):
            if float(near.distance[row]) <= self.reach:
                name = names[int(near.row[row])]
                said.append(f'within {float(near.distance[row]) / self.unit:.3g} of "{name}" {what}')
        return said
