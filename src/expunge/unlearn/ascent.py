"""Climbing the loss of the rows to forget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from expunge.core.errors import Misuse
from expunge.core.protocols import Need
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps, check_pace


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Method):
    """Climb the loss of the forget rows for some epochs.

    Step: ``w <- w + lr * gradient of the mean loss of a batch of forget rows``; no weight decay of its own.
    Known to overshoot: nothing stops it at the loss that retraining would give, and the loss has no upper bound. The
    default step is timid on purpose: at lr 0.1 one pass over 600 mislabelled of 12,000 MNIST rows left 12 % test
    accuracy.
    Cost: `epochs` passes over the forget rows.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET})
    source: ClassVar[str] = "Thudi et al., 2022; Graves et al., 2021"
    not_guaranteed: ClassVar[str] = "that the result is nearer to retraining than before, or still useful"
    epochs: int = 1
    lr: float = 3e-3
    momentum: float = 0.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self, weight_decay=0.0)

        def losses() -> Iterator[Tensor]:
            for x, y, _ in steps.batches(task.forget, rng, "forget", self.epochs):
                yield -steps.loss(steps.module(x), y)

        steps.take(losses(), rng)
        return Done(trained=task.trained)


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Method):
    """Climb the loss of the forget rows while going down that of the retained ones.

    Objective of a step: ``weight * L(retain batch) - (1 - weight) * L(forget batch)``, means over batches; the forget
    rows are read again and again while the retained rows are read `epochs` times. With `weight` 0.95 or 0.98, removing
    a class of MNIST took the others with it (test accuracy 0.20 and 0.30 where retraining has 0.88, mean of two seeds);
    with 0.99 it is 0.86, of an MLP. LeNet is lost with 0.99 too (0.13, three seeds; docs/sparsity.md): tune it.
    Cost: `epochs` passes over the retained rows, and as many forget rows.
    """

    source: ClassVar[str] = "Kurmanji et al., 2023 (NegGrad+)"
    not_guaranteed: ClassVar[str] = "that it stops where retraining would be; tune `weight`"
    epochs: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    weight: float = 0.99
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)
        if not 0 <= self.weight <= 1:
            raise Misuse(f"weight must be between 0 and 1, got {self.weight}")

    @property
    def learns_new(self) -> bool:
        """Unless the retained rows weigh nothing."""
        return self.weight > 0

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self)

        def losses() -> Iterator[Tensor]:
            forget = steps.batches(task.forget, rng, "forget")
            for x, y, _ in steps.batches(task.retain, rng, "retain", self.epochs):
                other_x, other_y, _ = next(forget)
                kept = steps.loss(steps.module(x), y)
                yield self.weight * kept - (1 - self.weight) * steps.loss(steps.module(other_x), other_y)

        steps.take(losses(), rng)
        return Done(trained=task.trained)
