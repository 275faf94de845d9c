"""Rows that an attacker may file, what each is predicted to do, and the requests that can be made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.attack.remembered import victims
from expunge.core.errors import Misuse
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import prepare


@dataclass(frozen=True, kw_only=True, eq=False)
class Wares:
    """What can be filed.

    Attributes:
        records: the data set.
        ranked: harmful rows, the first to be filed first.
        effects: of each row, the predicted change of the adversary's loss if it is filed; below 0 helps the attacker.
        moved: what harmful rows are to be replaced by, as stored; None: rows are removed.
    """

    records: Records
    ranked: tuple[str, ...]
    effects: Mapping[str, float]
    moved: Mapping[str, Tensor] | None = None

    @property
    def quiet(self) -> list[str]:
        """All other rows, those that do least first."""
        harmful = set(self.ranked)
        return sorted((name for name in self.effects if name not in harmful), key=lambda name: abs(self.effects[name]))

    def request(self, rows: Sequence[str]) -> Request:
        """One request for these rows, in the records' order, which tells nothing."""
        wanted = set(rows)
        ids = [name for name in self.records.ids if name in wanted]
        if self.moved is None:
            return Request.remove(ids)
        old = self.records.take(ids)
        new = [self.moved[name] if name in self.moved else _nudged(row) for name, row in zip(ids, old.x, strict=True)]
        return Request.replace_rows(ids, torch.stack(new), old.y)


def offered(
    trained: Trained, records: Records, target: Target, through: Method, requests: Sequence[Request] | None
) -> Wares:
    """What these requests are made of; without any, all rows by their influence, for removal.

    Raises:
        Misuse: for requests that are neither removals by id nor replacements, or a mixture of both.
    """
    effects = predicted_effects(trained, records, target, through)
    if requests is None:
        harmful = sorted((name for name in effects if effects[name] < 0), key=lambda name: effects[name])
        return Wares(records=records, ranked=tuple(harmful), effects=effects)
    kinds = {request.kind for request in requests}
    if len(kinds) != 1 or not kinds <= {"remove", "replace"} or not all(one.by_id for one in requests):
        got = " and ".join(sorted(kinds)) or "nothing"
        raise Misuse(f"evading needs an inner attack that files removals by id, or replacements, got {got}")
    ranked = tuple(name for request in requests for name in request.ids)
    if kinds == {"remove"}:
        return Wares(records=records, ranked=ranked, effects=effects)
    moved: dict[str, Tensor] = {}
    for request in requests:
        if request.x is not None:
            moved.update(zip(request.ids, request.x, strict=True))
    return replaced(trained, records, target, through, moved)


def replaced(trained: Trained, records: Records, target: Target, through: Method, moved: Mapping[str, Tensor]) -> Wares:
    """These replacements, with the labels that the rows have; whatever else is filed with them is hardly changed."""
    effects = dict.fromkeys((name for name in records.ids if name in trained.ids), 0.0)
    for victim in victims(trained, records, target, through):
        mine = [name for name in moved if name in victim.records]
        if not mine:
            continue
        answer, old = victim.answer(victim.loss_gradient(target)), records.take(mine)
        new = prepare(torch.stack([moved[name] for name in mine]), victim.dtype)
        before = victim.objective.scores(prepare(old.x, victim.dtype), old.y, answer)
        change = victim.share * (before - victim.objective.scores(new, old.y, answer))
        effects.update(zip(mine, change.tolist(), strict=True))
    ranked = tuple(sorted(moved, key=lambda name: effects[name]))
    return Wares(records=records, ranked=ranked, effects=effects, moved=moved)


def halved(wares: Wares, trained: Trained, target: Target, through: Method) -> Wares:
    """The same replacements, half as far from the rows that they replace."""
    if wares.moved is None:
        raise Misuse("only replacements can be halved; these rows are removed")
    old = wares.records.take(wares.moved)
    near: dict[str, Tensor] = {}
    for name, row in zip(old.ids, old.x, strict=True):
        way = (wares.moved[name].to(torch.float64) - row.to(torch.float64)) / 2
        half = (row.to(torch.float64) + (way if row.is_floating_point() else way.trunc())).to(row.dtype)
        if not torch.equal(half, row):
            near[name] = half
    return replaced(trained, wares.records, target, through, near)


def alike(wares: Wares, count: int) -> tuple[str, ...]:
    """Harmful rows by their distance from the most harmful one: groups, of which none stands alone."""
    some = list(wares.ranked[: 5 * count])
    if not some:
        return ()
    rows: Tensor = prepare(wares.records.take(some).x, torch.float32).flatten(1).float()
    near = torch.cdist(rows[:1], rows)[0].argsort(stable=True)
    return tuple(some[i] for i in near.tolist())[:count]


def predicted_effects(trained: Trained, records: Records, target: Target, through: Method) -> dict[str, float]:
    """By how much each row's leaving changes the adversary's loss, to first order; below 0 helps the attacker.

    Cost: that of `Victim.effects`, for each shard.
    """
    found: dict[str, float] = {}
    for victim in victims(trained, records, target, through):
        found.update(zip(victim.records.ids, victim.effects(target).tolist(), strict=True))
    return found


def _nudged(row: Tensor) -> Tensor:
    """The row with its first entry changed by next to nothing: a replacement by the row itself is refused."""
    new = row.clone()
    flat = new.view(-1)
    flat[0] = flat[0] + 1e-3 if row.is_floating_point() else (flat[0] + 1 if int(flat[0]) < 255 else flat[0] - 1)
    return new
