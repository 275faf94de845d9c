"""Teaching the rows to forget a wrong label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from expunge.core import coins
from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps, check_pace


@dataclass(frozen=True, kw_only=True)
class RandomLabels(Method):
    """Train on the forget rows with wrong labels drawn uniformly, and on the retained rows with their own.

    Objective of a step: ``L(retain batch) + weight * L(forget batch, wrong labels)``, means over batches. The wrong
    label of a row is never its own, and a function of the row and the coins, not of its position. With `weight` 0.2 it
    moved away from retraining when mislabelled MNIST rows were removed: wrong labels are learnt with conviction.
    Cost: `epochs` passes over the retained rows, and as many forget rows.
    """

    source: ClassVar[str] = "Golatkar et al., 2020; Graves et al., 2021"
    not_guaranteed: ClassVar[str] = "that the result resembles retraining, which is not wrong about rows it never saw"
    epochs: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    weight: float = 0.02
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)
        if not self.weight >= 0:
            raise Misuse(f"weight must be >= 0, got {self.weight}")

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs at least two classes."""
        if trained.recipe.loss != "cross_entropy" or int(trained.recipe.model_args["outputs"]) < 2:
            return Unsupported("random-labels needs classes to choose from, and this model has none; use fine-tune")
        return super().supports(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self)
        wrong = wrong_labels(task.forget, int(task.trained.recipe.model_args["outputs"]), rng)

        def losses() -> Iterator[Tensor]:
            forget = steps.batches(task.forget, rng, "forget")
            for x, y, _ in steps.batches(task.retain, rng, "retain", self.epochs):
                other_x, _, positions = next(forget)
                kept = steps.loss(steps.module(x), y)
                yield kept + self.weight * steps.loss(steps.module(other_x), wrong[positions].to(y.device))

        steps.take(losses(), rng)
        return Done(trained=task.trained)


def wrong_labels(records: Records, classes: int, rng: Generator) -> Tensor:
    """(n,) int64: for each row a class that is not its own, uniform among the others."""
    shift = coins.draw(records.keys, rng.initial_seed(), "wrong labels") % np.uint64(classes - 1)
    return (records.y.cpu() + 1 + torch.from_numpy(shift.astype(np.int64))) % classes
