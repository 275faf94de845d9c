"""Retraining only the shards that held the removed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from expunge.core.claim import Claim, Exactness
from expunge.core.errors import Unsupported
from expunge.core.events import Event, Retrained
from expunge.core.protocols import Need
from expunge.core.trained import Trained, device_of
from expunge.learn.build import build_name
from expunge.learn.shards import first_unclean_slices, retrain_shards
from expunge.unlearn.method import Done, Method, Task


@dataclass(frozen=True, kw_only=True)
class Sisa(Method):
    """Train the touched shards again, each from the last slice that the removed rows had no part in.

    Exact, pathwise: the bytes are those of a training from scratch on what remains, because shard, slice, order, seed
    and vote of a row know nothing of any other row. Untouched shards are shared between the models before and after.

    Cost: about 1/shards of a full training for one owner, less with slices.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})
    source: ClassVar[str] = "Bourtoule et al., 2021 (Machine Unlearning), section IV"
    not_guaranteed: ClassVar[str] = "the accuracy of a single model; cheapness if a request touches every shard"

    @property
    def exactness(self) -> Exactness:
        """Always pathwise."""
        return "pathwise"

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs shards, none of them changed by a method that proves nothing."""
        if not trained.parts:
            return Unsupported("sisa needs a model trained in shards, and this one is whole; use retrain")
        if trained.standing is not Claim.EXACT:
            return Unsupported("sisa keeps untouched shards, and these are no longer the trained ones; use retrain")
        return self._other_build(trained)

    def _other_build(self, trained: Trained) -> Unsupported | None:
        """Shards of two builds together are the bytes of neither."""
        here = build_name(device_of(trained.module))
        for part in trained.parts:
            if part.log is not None and part.log.build != here:
                return Unsupported(f"these shards were trained by {part.log.build}, and this is {here}; use retrain")
        return None

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        touched = first_unclean_slices(task.trained, task.forget)
        trained = retrain_shards(task.trained, task.retain, touched, tally=task.tally)
        events: tuple[Event, ...] = tuple(
            Retrained(part=part, rows=len(trained.parts[part].ids), from_slice=start)
            for part, start in sorted(touched.items())
        )
        return Done(trained=trained, events=events)
