"""Rows by which harm is measured: which they are, and how clearly a model answers them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.screen.scene import Scene

Falls = Callable[[Tensor, Tensor], Tensor]

_POOL = 10
"""Of the rows drawn at random for the boundary, one in so many is kept: those with the smallest margins."""


def falls(loss: str) -> Falls:
    """What rises as a row is answered worse, of outputs and labels: its margin with a minus, or its squared error.

    The margin is the right class's output less the largest other one: above 0 the row is answered rightly.
    """
    if loss != "cross_entropy":
        return lambda out, y: (out - y.view_as(out)).square().sum(-1)

    def of_margin(out: Tensor, y: Tensor) -> Tensor:
        right = y[:, None] == torch.arange(out.shape[1], device=out.device)
        others = torch.where(right, torch.full_like(out, -torch.inf), out).amax(1)
        return others - torch.where(right, out, torch.zeros_like(out)).sum(1)

    return of_margin


def margins(scene: Scene, module: nn.Module, records: Records) -> Tensor:
    """(n,) how clearly the right class leads; of numbers, the squared error with a minus."""
    worse = falls(scene.trained.recipe.loss)
    with torch.no_grad():
        return torch.cat([-worse(module(x), y) for x, y in scene.batches(records)]).cpu()


def choose(scene: Scene, wanted: int | Records, rng: Generator) -> Records:
    """The probes: those given that are answered rightly, or so many trained rows.

    Of those drawn, half are random and half have the smallest margins of ten times as many random rows.

    Raises:
        Misuse: if no probe is answered rightly, so that none can be harmed.
    """
    if isinstance(wanted, Records):
        return _right(scene, wanted)
    order = torch.randperm(len(scene.rows), generator=child(rng, "probes"))
    near = wanted // 2
    pool = scene.rows.select(order[: _POOL * near].sort().values)
    close = _right(scene, pool) if near else pool
    ranked = margins(scene, scene.module, close).argsort(stable=True)[:near] if near else torch.tensor([])
    picked = [close.ids[place] for place in ranked.tolist()]
    held = set(picked)
    rest = scene.rows.select(order[: wanted * 2 + len(held)])
    for record in _right(scene, rest).ids:
        if len(picked) < wanted and record not in held:
            picked.append(record)
    return scene.rows.take(picked)


def _right(scene: Scene, records: Records) -> Records:
    if scene.trained.recipe.loss != "cross_entropy":
        return records
    good = (margins(scene, scene.module, records) > 0).nonzero().flatten()
    if not len(good):
        raise Misuse(f"none of the {len(records)} probes is answered rightly, so that none can be harmed; give others")
    return records.select(good)
