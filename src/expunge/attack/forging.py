"""Providers that forge: a transcript made from the log of the original training, and steps bent within the tolerance.

Let `e` be the largest gradient mismatch of the stand-ins, `p` the largest perturbation, and L the smoothness of the
loss. Each forged state lies within ``d = max(lr e, p)`` of the logged one, and the replay of step t, on its own, ends
``v_t <= p_t [clean] + (1 + lr L) d`` away from what is told: with S the step on the told batch and w the logged states,
``S(w'_(t-1)) - w'_t = (S(w'_(t-1)) - S(w_(t-1))) + (S(w_(t-1)) - w'_t)``. The first part is at most ``(1 + lr L) d``;
the second is zero in a step with forgotten rows, and the perturbation in one without. Errors do not add up over steps,
and are of the order of a fixed share of a step: far above rounding, so that a calibrated tolerance finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from expunge.attack.providers import Holder
from expunge.attack.providers_retraining import Both, RetrainingAdversary, mismatch
from expunge.attack.selectors import Gap, Selector, gradient
from expunge.attack.selectors_nearest import NearestNeighbour
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Split
from expunge.core.trained import State, Trained, TrainingLog
from expunge.learn.build import build
from expunge.learn.loop import prepare, reading_order
from expunge.learn.predict import evaluating
from expunge.verify.recorder import WHOLE
from expunge.verify.states import Stepper
from expunge.verify.tolerance import Tolerance


@dataclass(kw_only=True, eq=False)
class ForgingAdversary(Holder):
    """Makes up a transcript from the original training's log, without training (Zhang et al., 2024, second attack).

    Of a step without forgotten rows: the logged state, moved a little along one retained row's gradient. Of a step with
    some: the state that the step with stand-ins leads to from the logged one. The model that it serves is almost the
    original. Needs the log's state after every step (``Keep(every=1)``) and plain SGD, whose states are the parameters.

    Attributes:
        selector: chooses the stand-ins; the same may stand in again and again.
        perturb: learning rate of the small move; 0 tells the logged states as they are.
        moves: L2 size of the move in each step; 0 in steps with stand-ins.
        errors: L2 gradient mismatch of each step's stand-ins; 0 in the others.

    Cost: one step for each logged one, none waiting for another.
    """

    selector: Selector = field(default_factory=NearestNeighbour)
    perturb: float = 1e-3
    moves: list[float] = field(default_factory=list, init=False)
    errors: list[float] = field(default_factory=list, init=False)

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        recipe, both = self._drawn(split, stays), Both.of(self.records, split)
        log = self._log(recipe)
        selector = self.selector.prepared(both.rows, both.forgotten, both.retained)
        with self._telling(recipe, stays) as recorder:
            stepper = Stepper(build(self.trained.recipe).to(stays.device), recipe)
            before: State = {name: value.clone() for name, value in stepper.module.state_dict().items()}
            if recorder is not None:
                recorder.begin(stepper.module, stepper.optimiser)
            for step, (batch, epoch) in enumerate(self._original_batches(both.rows), 1):
                coins = child(rng, "forge", step)
                if bool((both.place[batch] < 0).any()):
                    batch = self._stepped(both, stepper, selector, batch, before, epoch, coins)
                else:
                    stepper.module.load_state_dict(dict(log.checkpoints[step]))
                    self._moved(both, stepper, coins)
                if recorder is not None:
                    recorder.step(stays, both.place[batch], stepper.module, stepper.optimiser)
                before = log.checkpoints[step]
        return Trained(module=stepper.module.eval(), recipe=recipe, ids=frozenset(stays.ids))

    def _log(self, recipe: Recipe) -> TrainingLog:
        log, momentum = self.trained.log, recipe.optimiser_args.get("momentum", 0)
        if recipe.optimiser != "sgd" or momentum or recipe.max_norm is not None:
            raise Unsupported("forging from a log of parameters needs plain SGD, without momentum or a ball")
        if log is None or any(step not in log.checkpoints for step in range(1, log.steps + 1)):
            raise Misuse("forging needs the state after every step; train with keep=Keep(every=1)")
        return log

    def _original_batches(self, rows: Records) -> Iterator[tuple[Tensor, int]]:
        recipe = self.trained.recipe
        for epoch in range(recipe.epochs):
            for batch in reading_order(recipe, rows, WHOLE, epoch).split(recipe.batch_size):
                yield batch, epoch

    def _stepped(
        self,
        both: Both,
        stepper: Stepper,
        selector: Selector,
        batch: Tensor,
        before: State,
        epoch: int,
        rng: Generator,
    ) -> Tensor:
        """A true step with stand-ins from the logged state; the batch that it was made on."""
        stepper.module.load_state_dict(dict(before))
        gap = Gap(
            module=stepper.module,
            recipe=stepper.recipe,
            records=both.rows,
            batch=batch,
            spots=(both.place[batch] < 0).nonzero().flatten(),
            pool=both.retained,
            reuse=True,
        )
        told = gap.filled(selector(gap, rng=rng))
        self.errors.append(mismatch(stepper, both.rows, batch, told)[0])
        self.moves.append(0.0)
        x, y = next(iter(both.rows.batches([told])))
        stepper.step(x, y, epoch)
        return told

    def _moved(self, both: Both, stepper: Stepper, rng: Generator) -> None:
        """Move the parameters a little, so that they are not literally the old ones."""
        self.errors.append(0.0)
        self.moves.append(0.0)
        if not self.perturb:
            return
        row = both.retained[torch.randint(len(both.retained), (1,), generator=rng)]
        x, y = next(iter(both.rows.batches([row])))
        with evaluating(stepper.module):
            slope = gradient(stepper.module, stepper.recipe, prepare(x, stepper.dtype), y)
        self.moves[-1] = self.perturb * float(slope.double().norm())
        _add(stepper, slope, -self.perturb)


@dataclass(kw_only=True, eq=False)
class DriftingForger(RetrainingAdversary):
    """The tolerance-aware forger: retrains on chosen batches, and at each checkpoint moves toward the old model.

    By no more than a replay lets pass: `share` of the tolerance's limit, which is known to it. With a loose tolerance
    that is the old model; with a calibrated one it is a drift too small to matter, which no replay finds.

    Attributes:
        tolerance: the verifier's.
        share: of the limit that it dares to use; the rest is for rounding.
        drift: L2 length moved in all.
        apart: L2 distance of the end from the old model.
    """

    tolerance: Tolerance
    share: float = 0.9
    drift: float = field(default=0.0, init=False)
    apart: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reuse:
            raise Misuse("a drifting forger makes the agreed number of steps; leave reuse out")
        self._before: Tensor | None = None
        self._lengths: list[float] = []

    def _step(self, both: Both, stepper: Stepper, wanted: Tensor, batch: Tensor, epoch: int) -> None:
        before = _flat(stepper)
        super()._step(both, stepper, wanted, batch, epoch)
        self._lengths.append(float((_flat(stepper) - before).norm()))

    def _before_telling(self, step: int, stepper: Stepper, stays: Records) -> None:
        last = stepper.recipe.epochs * -(-len(stays) // stepper.recipe.batch_size)
        if step % self.every and step != last:
            return
        mean = sum(self._lengths) / len(self._lengths)
        limit = self.share * self.tolerance.limit("parameter", mean)
        held = [one for one in self.trained.module.parameters() if one.requires_grad]
        way = torch.cat([one.detach().flatten().double() for one in held]) - _flat(stepper)
        length = float(way.norm())
        step_taken = min(limit, length)
        if length > 0:
            _add(stepper, way, step_taken / length)
        self.drift, self.apart = self.drift + step_taken, length - step_taken
        self._lengths.clear()


def _flat(stepper: Stepper) -> Tensor:
    held = [one for one in stepper.module.parameters() if one.requires_grad]
    return torch.cat([one.detach().flatten().double() for one in held])


def _add(stepper: Stepper, way: Tensor, scale: float) -> None:
    held = [one for one in stepper.module.parameters() if one.requires_grad]
    with torch.no_grad():
        for one, part in zip(held, way.split([one.numel() for one in held]), strict=True):
            one.add_((scale * part).view(one.shape).to(one.dtype))
