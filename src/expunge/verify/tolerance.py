"""How far a replay may lie from what a transcript says: the security parameter of verification by replay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import State, device_of
from expunge.learn.build import build, seeded
from expunge.learn.loop import exact_kernels, reading_order, threads
from expunge.verify.recorder import WHOLE
from expunge.verify.states import GROUPS, Stepper, as_double, distance, restore, snapshot

FORGEABLE = 1e-2


class ForgeableWarning(UserWarning):
    """A tolerance so wide, against the size of a step, that steps can be forged within it."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The L2 distance at the end of a replayed segment up to which it passes, apart for each kind of state.

    The bound is ``min(absolute, ceiling * step)``, where `step` is the mean L2 length of the replayed segment's own
    steps in that kind of state. A forger may move by as much in every segment: it is drift that no replay sees.

    Attributes:
        parameter: absolute bound on parameters.
        buffer: on buffers of floating point.
        optimiser: on the optimiser's state.
        ceiling: of the length of a step.
        honest: the largest honest error that was measured, by what was compared; empty if none was.
    """

    parameter: float
    buffer: float
    optimiser: float
    ceiling: float = 1e-3
    honest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bounds = (self.parameter, self.buffer, self.optimiser, self.ceiling)
        if not all(bound >= 0 for bound in bounds):
            raise Misuse(f"tolerances must be >= 0, got {bounds}")

    def limit(self, group: str, step: float) -> float:
        """The bound for one kind of state, in a segment whose steps have this mean length."""
        return min(float(getattr(self, group)), self.ceiling * step)

    def forgeable(self, step: float) -> bool:
        """True if a forger may move the parameters by more than 1 % of a step of this length in each segment."""
        return self.limit("parameter", step) > FORGEABLE * step


EXACT = Tolerance(parameter=0.0, buffer=0.0, optimiser=0.0)


@dataclass(frozen=True)
class Ran:
    """Where some steps led, and the mean L2 length of a step, by kind of state."""

    end: State
    length: dict[str, float]


def run(
    stepper: Stepper,
    start: State,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    *,
    lengths: bool = True,
    watch: Callable[[State], None] | None = None,
) -> Ran:
    """Make steps on (rows, labels, epoch) from a state. Cost: with lengths, a copy of the state each step.

    `watch` is shown the state after each step, if there are lengths.
    """
    restore(start, stepper.module, stepper.optimiser)
    stepper.ball.project()
    before = snapshot(stepper.module, stepper.optimiser)
    total, count = dict.fromkeys(GROUPS, 0.0), 0
    for x, y, epoch in batches:
        stepper.step(x, y, epoch)
        count += 1
        if lengths:
            now = snapshot(stepper.module, stepper.optimiser)
            for group in GROUPS:
                total[group] += moved(before, now, group)
            before = now
            if watch is not None:
                watch(now)
    end = before if lengths else snapshot(stepper.module, stepper.optimiser)
    return Ran(end, {group: total[group] / max(count, 1) for group in GROUPS})


def moved(before: State, after: State, group: str) -> float:
    """L2 length of what changed of the floating tensors of a group; what was not there before counts as zeros."""
    total = 0.0
    for name, now in after.items():
        if name.startswith(f"{group}/") and now.is_floating_point() and not name.endswith("/step"):
            then = before.get(name)
            change = now.double() if then is None else now.double() - then.double()
            total += float(change.square().sum())
    return float(total**0.5)


def calibrate_tolerance(
    recipe: Recipe,
    records: Records,
    *,
    every: int = 100,
    segments: int = 2,
    counts: Sequence[int] = (1, 2),
    double: bool = True,
    factor: float = 10.0,
    ceiling: float = 1e-3,
    stage: str = WHOLE,
) -> Tolerance:
    """Measure the error of honest replays on this machine: the recipe's own first steps, each segment made again.

    Each segment is made as it is, then from the same start with other numbers of threads, and in float64, which stands
    for machines that this one cannot try. What is allowed is `factor` times the largest error, never more than
    `ceiling` of a step. Float64 is left out of models with dropout, which draws other masks there.

    Args:
        recipe: completed.
        records: the rows that stay.
        every: steps of a segment: the longest of the transcripts to be checked.
        segments: how many.
        counts: numbers of CPU threads to compare.
        double: compare with float64 too.
        factor: allowed over measured.
        ceiling: of the mean length of a step.
        stage: name of the training.

    Warns:
        ForgeableWarning: if a single measured error passes the ceiling: honest replays could fail, and a wider bound
            would be forgeable. Checkpoint more often.

    Cost: ``segments * every * (len(counts) + 2)`` steps. Says nothing of other processors, and of late segments only
    as far as errors there are like those of the first. Of a recipe in float64, thread counts alone are compared.
    """
    if min(every, segments, *counts) < 1 or factor < 1:
        raise Misuse(f"every, segments, counts and factor must be >= 1, got {every}, {segments}, {counts}, {factor}")
    worst = dict.fromkeys(GROUPS, 0.0)
    honest: dict[str, float] = {}
    batches = _first_batches(recipe, records, stage, every * segments)
    read = partial(_read, records)
    with seeded(recipe.seed, "dropout", stage), exact_kernels(records.device):
        stepper = Stepper(build(recipe).to(records.device), recipe)
        state: State = snapshot(stepper.module, stepper.optimiser)
        for first in range(0, len(batches), every):
            chunk, start = batches[first : first + every], state
            true = run(stepper, start, read(chunk))
            for what, other in _others(recipe, stepper.module, start, partial(read, chunk), counts, double):
                errors = {group: distance(_like(true.end, other), other, group) for group in GROUPS}
                worst = {group: max(worst[group], errors[group]) for group in GROUPS}
                honest[what] = max(honest.get(what, 0.0), errors["parameter"])
                if errors["parameter"] > ceiling * true.length["parameter"]:
                    _warn_long(what, errors["parameter"], true.length["parameter"])
            state = true.end
    bounds = {group: factor * worst[group] for group in GROUPS}
    return Tolerance(**bounds, ceiling=ceiling, honest=honest)


def _others(
    recipe: Recipe,
    module: nn.Module,
    start: State,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor, int]]],
    counts: Sequence[int],
    double: bool,
) -> Iterable[tuple[str, State]]:
    device = device_of(module)
    for count in counts:
        with threads(count):
            again = Stepper(build(recipe).to(device), recipe)
            yield f"{count} threads", run(again, start, batches(), lengths=False).end
    drops = any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in module.modules())
    if double and not drops and recipe.dtype == "float32":
        wide = replace(recipe, dtype="float64")
        again = Stepper(build(wide).to(device), wide)
        yield "float64", run(again, as_double(start), batches(), lengths=False).end


def _like(state: State, other: State) -> State:
    return (
        as_double(state)
        if any(tensor.dtype.itemsize == 8 and tensor.is_floating_point() for tensor in other.values())
        else state
    )


def _first_batches(recipe: Recipe, records: Records, stage: str, steps: int) -> list[tuple[Tensor, int]]:
    """Positions and epoch of the first steps."""
    found: list[tuple[Tensor, int]] = []
    for epoch in range(recipe.epochs):
        order = reading_order(recipe, records, stage, epoch)
        found += [(positions, epoch) for positions in order.split(recipe.batch_size)[: steps - len(found)]]
        if len(found) == steps:
            break
    return found


def _read(records: Records, chunk: Sequence[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor, int]]:
    batches = records.batches([positions for positions, _ in chunk])
    for (x, y), (_, epoch) in zip(batches, chunk, strict=True):
        yield x, y, epoch


def _warn_long(what: str, error: float, step: float) -> None:
    warnings.warn(
        f"an honest replay ({what}) is off by {error:.1e}, {error / max(step, 1e-300):.1e} of a step, more than "
        "is ever allowed; ask for checkpoints more often",
        ForgeableWarning,
        stacklevel=3,
    )
