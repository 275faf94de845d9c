"""What an attack is measured against: requests of the same size that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import prepare

Requests = tuple[Request, ...]


def size_of(request: Request, records: Records) -> int:
    """How many rows the request asks for; of rows named by content, how many it gives."""
    if request.kind == "remove_rows":
        return 0 if request.x is None else len(request.x)
    return len(request.named(records)) if not request.by_id else len(request.ids)


def controls(
    requests: Sequence[Request], pool: Records, records: Records, target: Target, *, rng: torch.Generator
) -> Mapping[str, Requests]:
    """The control arms of an attack: requests of the same number, order, kinds and sizes.

    ``random``: rows of the pool at random. ``neighbours``: those of the target's class that are nearest to it in input
    space, whatever the attack picked. Of a replacement they replace their rows by copies with random noise of the same
    l-infinity size; ``noise`` does so with the attack's own rows.

    Args:
        requests: the attack's.
        pool: rows that a control may ask for: those that the model stands on and the attacker did not bring.
        records: all rows.
        target: what the attack is after.
        rng: names the coins; nothing is drawn from it.

    Raises:
        Misuse: if the pool has fewer rows than the attack asks for.
    """
    sizes = [size_of(one, records) for one in requests]
    if sum(sizes) > len(pool):
        raise Misuse(f"a control needs {sum(sizes):,} rows, and there are {len(pool):,}; lower the budget")
    drawn = torch.randperm(len(pool), generator=child(rng, "random")).tolist()
    arms = {"random": [pool.ids[i] for i in drawn], "neighbours": [pool.ids[i] for i in nearest(pool, target)]}
    found = {
        arm: tuple(
            _like(one, ids, records, child(rng, arm, place))
            for place, (one, ids) in enumerate(zip(requests, _dealt(names, sizes), strict=True))
        )
        for arm, names in arms.items()
    }
    if any(one.kind == "replace" for one in requests):
        found["noise"] = tuple(_noised(one, records, child(rng, "noise", place)) for place, one in enumerate(requests))
    return found


def nearest(pool: Records, target: Target) -> list[int]:
    """Positions of the pool's rows: those of the target's classes first, each group by distance to its nearest row."""
    rows = prepare(pool.x, torch.float32).reshape(len(pool), -1)
    wanted = prepare(target.x, torch.float32).reshape(len(target.x), -1)
    distance = torch.cdist(rows, wanted).amin(1)
    other = ~torch.isin(pool.y, target.y.to(pool.y))
    order = sorted(range(len(pool)), key=lambda i: (bool(other[i]), float(distance[i])))
    return order


def noise_like(old: Tensor, size: float, low: Tensor, high: Tensor, rng: torch.Generator) -> Tensor:
    """Rows with noise of this l-infinity size: every entry goes up or down by it, turned round at the box's walls."""
    wide = old.double()
    sign = torch.randint(0, 2, old.shape, generator=rng) * 2.0 - 1.0
    step = sign.double() * size
    outside = (wide + step < low.double()) | (wide + step > high.double())
    moved = torch.minimum(torch.maximum(wide + torch.where(outside, -step, step), low.double()), high.double())
    return moved.to(old.dtype)


def _dealt(names: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    start, dealt = 0, []
    for size in sizes:
        dealt.append(tuple(names[start : start + size]))
        start += size
    return dealt


def _like(request: Request, ids: tuple[str, ...], records: Records, rng: torch.Generator) -> Request:
    """A request of this kind and size for these rows instead."""
    return _moved(ids, _size(request, records), records, rng) if request.kind == "replace" else Request.remove(ids)


def _noised(request: Request, records: Records, rng: torch.Generator) -> Request:
    known = request.kind == "replace" and all(one in records for one in request.ids)
    return _moved(request.ids, _size(request, records), records, rng) if known else request


def _size(request: Request, records: Records) -> float:
    known = [place for place, one in enumerate(request.ids) if one in records]
    if not known or request.x is None:
        return 1.0
    new = request.x[torch.tensor(known)].double()
    size = float((new - records.take(request.ids[place] for place in known).x.double()).abs().max())
    least = 1.0 if not records.x.is_floating_point() else 1e-3  # a new label alone: the smallest change of the row
    return max(size, least)


def _moved(ids: tuple[str, ...], size: float, records: Records, rng: torch.Generator) -> Request:
    old, every = records.take(ids), records.x
    low, high = every.amin(0), every.amax(0)
    return Request.replace_rows(ids, noise_like(old.x, size, low, high, rng), old.y)
