"""Going on with training on what remains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from expunge.core.protocols import Need
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps, check_pace


@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Go on training on the retained rows, and hope that the others fade.

    Objective: the recipe's, on the retained rows, from the trained parameters.
    Cost: `epochs` passes over the retained rows.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Warnecke et al., 2021; Golatkar et al., 2020"
    not_guaranteed: ClassVar[str] = "any forgetting: what the retained rows do not contradict stays"
    epochs: int = 2
    lr: float = 0.05
    momentum: float = 0.9
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self)

        def losses() -> Iterator[Tensor]:
            for x, y, _ in steps.batches(task.retain, rng, "retain", self.epochs):
                yield steps.loss(steps.module(x), y)

        steps.take(losses(), rng)
        return Done(trained=task.trained)
