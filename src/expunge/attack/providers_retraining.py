"""Providers that retrain, but not as agreed: on chosen batches, or from where the forgotten rows had a part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Generator, Tensor

from expunge.attack.providers import Holder, epoch_on
from expunge.attack.selectors import Gap, LastLayerNeighbour, Selector, gradient, undisturbed
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Split
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import prepare, reading_order
from expunge.verify.recorder import WHOLE, Recorder
from expunge.verify.states import Stepper


@dataclass(frozen=True, eq=False)
class Both:
    """The rows before a removal, and how they split.

    Attributes:
        rows: all that the model was trained on, in the records' order.
        stays: those that stay.
        place: (n,) place of each row in `stays`; -1 for those to forget.
    """

    rows: Records
    stays: Records
    place: Tensor

    @classmethod
    def of(cls, records: Records, split: Split) -> Both:
        """The rows of a split."""
        at = {record_id: place for place, record_id in enumerate(split.retain.ids)}
        gone = set(split.forget.ids)
        rows = records.select([i for i, record_id in enumerate(records.ids) if record_id in at or record_id in gone])
        return cls(rows, split.retain, torch.tensor([at.get(record_id, -1) for record_id in rows.ids]))

    @cached_property
    def forgotten(self) -> Tensor:
        """Positions in `rows` of those to forget."""
        return (self.place < 0).nonzero().flatten()

    @cached_property
    def retained(self) -> Tensor:
        """Positions in `rows` of those that stay."""
        return (self.place >= 0).nonzero().flatten()


@dataclass(kw_only=True, eq=False)
class RetrainingAdversary(Holder):
    """Retrains on retained rows only, in batches chosen to imitate the original ones (Algorithm 1 of Zhang et al.).

    Batches are those of a training on all rows; the forgotten rows of each are replaced, and a true step is made. So
    every step can be replayed and holds no forgotten row.

    Attributes:
        selector: chooses the stand-ins.
        reuse: True: the original batches, step for step, in which stand-ins are used again in their own places, so that
            an epoch has as many steps as one on all rows. False: whatever was used once is left out for the rest of the
            epoch, so that each epoch is a permutation of the retained rows, which only its order gives away.
        measure: note `errors` and `lengths`; two gradients more for each step with forgotten rows.
        errors: L2 distance of each such step's gradient from that of the original batch at the same parameters.
        lengths: L2 norms of the latter.

    Cost: a training, and what the selector takes in each step with forgotten rows.
    """

    selector: Selector = field(default_factory=LastLayerNeighbour)
    reuse: bool = False
    measure: bool = False
    errors: list[float] = field(default_factory=list, init=False)
    lengths: list[float] = field(default_factory=list, init=False)

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        recipe, both = self._drawn(split, stays), Both.of(self.records, split)
        selector = self.selector.prepared(both.rows, both.forgotten, both.retained) if self.reuse else self.selector
        step = 0
        with self._telling(recipe, stays) as recorder:
            stepper = Stepper(build(recipe).to(stays.device), recipe)
            if recorder is not None:
                recorder.begin(stepper.module, stepper.optimiser)
            for epoch in range(recipe.epochs):
                order = reading_order(recipe, both.rows, WHOLE, epoch)
                for wanted, batch in self._batches(both, order, stepper, selector, child(rng, "select", epoch)):
                    step += 1
                    self._step(both, stepper, wanted, batch, epoch)
                    self._before_telling(step, stepper, stays)
                    if recorder is not None:
                        recorder.step(stays, both.place[batch], stepper.module, stepper.optimiser)
        return Trained(module=stepper.module.eval(), recipe=recipe, ids=frozenset(stays.ids))

    def _step(self, both: Both, stepper: Stepper, wanted: Tensor, batch: Tensor, epoch: int) -> None:
        if self.measure and not torch.equal(wanted, batch):
            error, length = mismatch(stepper, both.rows, wanted, batch)
            self.errors.append(error)
            self.lengths.append(length)
        x, y = next(iter(both.rows.batches([batch])))
        stepper.step(x, y, epoch)

    def _before_telling(self, step: int, stepper: Stepper, stays: Records) -> None:
        """What else is done to the model before a step is told; nothing, here."""

    def _batches(
        self, both: Both, order: Tensor, stepper: Stepper, selector: Selector, rng: Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The original batches of an epoch, and the ones without forgotten rows; chosen when the step is due."""
        taken = torch.zeros(len(order), dtype=torch.bool)
        at = number = 0
        while at < len(order):
            wanted, at = _next_batch(order, at, stepper.recipe.batch_size, taken)
            pool = both.retained if self.reuse else both.retained[~taken[both.retained]]
            if not self.reuse:
                pool = pool[~torch.isin(pool, wanted)]
            kept = self._chosen(both, wanted, pool, stepper, selector, child(rng, number))
            if not self.reuse:
                taken[torch.cat([wanted, kept])] = True
            number += 1
            if len(kept):
                yield wanted, kept

    def _chosen(
        self, both: Both, wanted: Tensor, pool: Tensor, stepper: Stepper, selector: Selector, rng: Generator
    ) -> Tensor:
        """The batch with stand-ins; without the forgotten rows for which none are left."""
        gone = (both.place[wanted] < 0).nonzero().flatten()
        left = len(gone) if self.reuse and len(pool) else min(len(gone), len(pool))
        keep = torch.ones(len(wanted), dtype=torch.bool)
        keep[gone[left:]] = False
        batch = wanted[keep]
        spots = (both.place[batch] < 0).nonzero().flatten()
        if not len(spots):
            return batch
        gap = Gap(
            module=stepper.module,
            recipe=stepper.recipe,
            records=both.rows,
            batch=batch,
            spots=spots,
            pool=pool,
            reuse=self.reuse,
        )
        return gap.filled(selector(gap, rng=rng))


@dataclass(kw_only=True, eq=False)
class Rewinder(Holder):
    """Goes back to a checkpoint of the original training and trains on retained rows from there, honestly.

    Attributes:
        step: of the checkpoint, which the model's log must hold.
        splice: False: the transcript begins at the checkpoint. True: it begins as it should, and the checkpoint is
            told as the end of its first segment, so that this one alone is false.
    """

    step: int
    splice: bool = False

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        log, recipe = self.trained.log, self._drawn(split, stays)
        if log is None or self.step not in log.checkpoints:
            raise Misuse(f"the log holds no checkpoint of step {self.step}; train with keep=Keep(every=...)")
        state = dict(log.checkpoints[self.step])
        with self._telling(recipe, stays) as recorder:
            stepper = Stepper(build(recipe).to(stays.device), recipe)
            if not self.splice:
                stepper.module.load_state_dict(state)
            if recorder is not None:
                recorder.begin(stepper.module, stepper.optimiser)
            for epoch in range(recipe.epochs):
                if self.splice and not epoch:
                    self._spliced(stepper, recipe, stays, state, recorder)
                else:
                    epoch_on(stepper, recipe, stays, epoch, recorder)
        return Trained(module=stepper.module.eval(), recipe=recipe, ids=frozenset(stays.ids))

    def _spliced(
        self, stepper: Stepper, recipe: Recipe, stays: Records, state: dict[str, Tensor], recorder: Recorder | None
    ) -> None:
        """The first epoch: nothing is done but told, then the old checkpoint is put in, then steps are made."""
        for number, batch in enumerate(reading_order(recipe, stays, WHOLE, 0).split(recipe.batch_size), 1):
            if number == self.every:
                stepper.module.load_state_dict(state)
            elif number > self.every:
                x, y = next(iter(stays.batches([batch])))
                stepper.step(x, y, 0)
            if recorder is not None:
                recorder.step(stays, batch, stepper.module, stepper.optimiser)
        if number < self.every:
            raise Misuse(f"an epoch has {number} steps, and the first checkpoint is due after {self.every}; lower that")


def mismatch(stepper: Stepper, rows: Records, wanted: Tensor, batch: Tensor) -> tuple[float, float]:
    """L2 distance between two batches' gradients where the model stands, and the norm of the first one's."""
    grads = []
    for x, y in rows.batches([wanted, batch]):
        with undisturbed(stepper.module):
            grads.append(gradient(stepper.module, stepper.recipe, prepare(x, stepper.dtype), y).double())
    return float((grads[1] - grads[0]).norm()), float(grads[0].norm())


def _next_batch(order: Tensor, at: int, size: int, taken: Tensor) -> tuple[Tensor, int]:
    """The next rows of the order that are not taken, and where the one after them stands."""
    rest = order[at:]
    free = (~taken[rest]).nonzero().flatten()[:size]
    if not len(free):
        return rest[:0], len(order)
    return rest[free], at + int(free[-1]) + 1
