"""Requests that nobody made in bad faith, drawn at random: what screens are calibrated on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.screen.asked import Asked
from expunge.screen.scene import Scene

By = Literal["rows", "owners", "classes"]
Alter = Callable[[Records, Generator], Records]
"""What benign people replace these rows by: as many rows, in the same order."""


class Benign:
    """Draws benign requests of one size about one model.

    ``rows``: any rows. ``owners``: rows of one owner drawn at random among those that hold enough, or, if none does, of
    several owners, each with all its rows, cut to the size. ``classes``: as many rows of each class as `like` has.

    What a screen stands out against is what is drawn here: against any rows, a request for rows of one class stands
    out by that alone, whoever made it.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        size: int,
        kind: Literal["remove", "replace"] = "remove",
        by: By = "rows",
        like: Counter[int] | None = None,
        alter: Alter | None = None,
    ) -> None:
        """See the class.

        Args:
            scene: the model and its rows.
            size: rows of a request.
            kind: benign replacements are made by `alter`.
            by: how rows are drawn.
            like: rows of each class; needed for ``classes``.
            alter: what rows are replaced by; None: by another trained row of their class.

        Raises:
            Misuse: for a size that the model has not rows enough for, or an unknown way.
        """
        n = len(scene.rows)
        if not 1 <= size <= n:
            raise Misuse(f"a benign request must have 1 to {n:,} rows, as the model is trained on, got {size}")
        if kind not in ("remove", "replace"):
            raise Misuse(f'benign requests remove or replace, got "{kind}"')
        if by not in ("rows", "owners", "classes"):
            raise Misuse(f'benign requests are drawn by rows, owners or classes, got "{by}"')
        if by == "classes" and (like is None or sum(like.values()) != size or scene.records.classes is None):
            raise Misuse(f"by classes needs like, rows of each class, {size} in all, and classes; got {like}")
        self.scene, self.size, self.kind, self.by = scene, size, kind, by
        self.like, self.alter = like or Counter(), alter or self._another_of_its_class

    def __call__(self, rng: Generator) -> Asked:
        """One request."""
        if self.by == "owners":
            index = self._of_owners(child(rng, "owners"))
        elif self.by == "classes":
            parts = [self._some(self._classes[label], many, rng) for label, many in sorted(self.like.items())]
            index = torch.cat(parts)
        else:
            index = torch.randperm(len(self.scene.rows), generator=child(rng, "rows"))[: self.size]
        places = self.scene.members[index].sort().values
        if self.kind == "remove":
            return Asked.of(self.scene.records, places)
        old = self.scene.records.select(places)
        return Asked.of(self.scene.records, places, self.alter(old, child(rng, "alter")))

    def _another_of_its_class(self, old: Records, rng: Generator) -> Records:
        labels = self.scene.rows.y if self.scene.records.classes is not None else torch.zeros(len(self.scene.rows))
        held = {record: row for row, record in enumerate(self.scene.rows.ids)}
        picked = []
        for record in old.ids:
            pool = (labels == labels[held[record]]).nonzero().flatten()
            pool = pool[pool != held[record]] if len(pool) > 1 else pool
            picked.append(int(pool[torch.randint(len(pool), (1,), generator=rng)]))
        index = torch.tensor(picked)
        x = torch.cat([x for x, _ in self.scene.rows.batches([index])])
        return Records(x, self.scene.rows.y[index], old.ids, classes=self.scene.records.classes)

    def _some(self, pool: Tensor, many: int, rng: Generator) -> Tensor:
        return pool[torch.randperm(len(pool), generator=child(rng, "class", int(pool[0])))[:many]]

    @cached_property
    def _classes(self) -> dict[int, Tensor]:
        labels = self.scene.rows.y.cpu()
        pools = {label: (labels == label).nonzero().flatten() for label in self.like}
        short = [label for label, many in self.like.items() if many > len(pools[label])]
        if short:
            raise Misuse(
                f"class {short[0]} has {len(pools[short[0]])} rows, fewer than {self.like[short[0]]}; ask fewer"
            )
        return pools

    @cached_property
    def _owned(self) -> list[Tensor]:
        rows: dict[str, list[int]] = {}
        for row, owner in enumerate(self.scene.rows.owners):
            rows.setdefault(owner, []).append(row)
        enough = [torch.tensor(mine) for _, mine in sorted(rows.items()) if len(mine) >= self.size]
        return enough or [torch.tensor(mine) for _, mine in sorted(rows.items())]

    def _of_owners(self, rng: Generator) -> Tensor:
        order = torch.randperm(len(self._owned), generator=rng).tolist()
        taken: list[Tensor] = []
        while sum(map(len, taken)) < self.size:
            mine = self._owned[order.pop()]
            taken.append(mine[torch.randperm(len(mine), generator=rng)])
        return torch.cat(taken)[: self.size]
