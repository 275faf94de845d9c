"""Another library's function as a method, with nothing put between it and the suite."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Generator, Tensor, nn

from expunge.core.claim import Claim, Exactness
from expunge.core.coins import child
from expunge.core.errors import Unsupported
from expunge.core.events import AlreadyRemoved, Event, Removed
from expunge.core.protocols import Cost, Need, Unlearned
from expunge.core.records import Records
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.loop import prepare

Pair: TypeAlias = tuple[Tensor, Tensor]
Function: TypeAlias = Callable[[nn.Module, Pair, Pair, Generator], nn.Module]


@dataclass(frozen=True)
class Foreign:
    """Adapter for another library's unlearning function. Keeps the books, and protects nothing.

    The function gets the model itself, not a copy, the rows in the order of the records, and coins of its own, so
    that the suite sees its faults as its users would.

    Attributes:
        name: what to call it.
        function: ``(module, (x, y) to forget, (x, y) to retain, generator) -> module``.
        claim: what its documentation claims.
        exactness: for a claim of EXACT: in which sense.
        learns_new: whether it trains on the rows to retain, so that replacements among them are learnt; if not,
            requests to replace rows are refused.

    Example:
        >>> import copy
        >>> def fine_tune(module, forget, retain, rng):
        ...     student = copy.deepcopy(module)
        ...     optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
        ...     for _ in range(50):
        ...         optimiser.zero_grad()
        ...         nn.functional.cross_entropy(student(retain[0]), retain[1]).backward()
        ...         optimiser.step()
        ...     return student
        >>> from expunge.testing import conformance
        >>> conformance(Foreign("fine-tune", fine_tune)).passed
        True
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})
    name: str
    function: Function
    claim: Claim = Claim.NONE
    exactness: Exactness | None = None
    learns_new: bool = True

    def supports(self, trained: Trained) -> Unsupported | None:
        """Single models only."""
        if trained.parts:
            return Unsupported(f"{self.name} takes one module, and this model has {len(trained.parts)} shards")
        return None

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Call the function on the rows that the request leaves, and keep the books."""
        problem = self.supports(trained)
        if problem is not None:
            raise problem
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        if split.added and not self.learns_new:
            raise Unsupported(f"{self.name} does not train on the rows that would come; use a method that does")
        if not len(split.forget):
            return booked(trained, trained.module, split, Claim.NONE, name=self.name)
        dtype = getattr(torch, trained.recipe.dtype)
        forget, retain = ((prepare(rows.x, dtype), rows.y) for rows in (split.forget, split.retain))
        started = time.perf_counter()
        module = self.function(trained.module, forget, retain, child(rng, self.name))
        seconds = time.perf_counter() - started
        return booked(trained, module, split, self.claim, self.exactness, name=self.name, seconds=seconds)


def booked(
    before: Trained,
    module: nn.Module,
    split: Split,
    claim: Claim,
    exactness: Exactness | None = None,
    *,
    name: str,
    seconds: float = 0.0,
) -> Unlearned:
    """The result of a removal with its books kept: ids, gone, standing, events, and no log of rows that are gone."""
    forgotten = frozenset(split.forget.ids)
    events: tuple[Event, ...] = (AlreadyRemoved(rows=split.already),) if split.already else ()
    if forgotten:
        events += (Removed(method=name, claim=claim.value, rows=len(forgotten)),)
    after = replace(
        before,
        module=module,
        ids=(before.ids - forgotten) | split.added,
        gone=before.gone | forgotten,
        log=None if forgotten else before.log,
        standing=claim if claim is Claim.EXACT or not forgotten else Claim.weaker(claim, before.standing),
    )
    if not forgotten:
        after = before
    cost = Cost(seconds=seconds)
    return Unlearned(trained=after, claim=claim, exactness=exactness, guarantee=None, cost=cost, events=events)
