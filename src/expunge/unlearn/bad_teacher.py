"""A student of two teachers: one that knows nothing of the rows to forget, and one that knows the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from expunge.core import coins
from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records
from expunge.core.trained import Trained, device_of
from expunge.learn.build import EXTERNAL, build
from expunge.unlearn.distil import Teacher, check_temperature, divergence, without_classes
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps, check_pace


@dataclass(frozen=True, kw_only=True)
class BadTeacher(Method):
    """Answer on the forget rows as an untrained model does, and on some retained rows as before.

    Objective of a step: ``D(original, retain batch) + weight * D(untrained, forget batch)`` with
    ``D = T^2 * mean over rows of KL(teacher || student)``, answers softened by the temperature T, teacher first. The
    retain batches are of a share of the retained rows, drawn once; no labels are read. The forget rows are read again
    and again. The authors shuffle both kinds into one batch instead, so that `weight` is the ratio of their numbers,
    and their code divides D by the number of classes too, has no factor T^2 and steps with Adam. An untrained model's
    answers are nearly uniform, which is not what retraining answers: a heavy `weight` leads away from it. With class 3
    of 20,000 MNIST rows (MLP) removed, `weight` 0.02 takes the distance to retraining (mean total variation) from 0.89
    to 0.39 on it and leaves 0.02 on other test rows; with 1 these are 0.68 and 0.19. Of mislabelled rows, which
    retraining answers rightly and with confidence, none of 44 settings came nearer than the untouched model.

    The untrained model is the recipe's, with initial weights of other coins than the trained model's. A model trained
    elsewhere has none; for those ``teacher="uniform"`` gives every class the same probability instead.
    Cost: `epochs` passes over the share of the retained rows, and as many forget rows, each with an additional forward
    pass of a teacher; copies of the model for both teachers.
    """

    source: ClassVar[str] = "Chundawat et al., 2023"
    not_guaranteed: ClassVar[str] = (
        "that the result resembles retraining, which answers otherwise than an untrained model"
    )
    epochs: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    weight: float = 0.02
    share: float = 0.3
    temperature: float = 1.0
    teacher: Literal["untrained", "uniform"] = "untrained"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)
        check_temperature(self.temperature)
        if not self.weight > 0:
            raise Misuse(f"weight must be > 0, got {self.weight}")
        if not 0 < self.share <= 1:
            raise Misuse(f"share must be > 0 and <= 1, got {self.share}")
        if self.teacher not in ("untrained", "uniform"):
            raise Misuse(f'teacher must be "untrained" or "uniform", got "{self.teacher}"')

    @property
    def learns_new(self) -> bool:
        """Never: no labels are read, and its teacher of the retained rows does not know the new ones."""
        return False

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs at least two classes, and for an untrained teacher a model that can be made anew."""
        if trained.recipe.model == EXTERNAL and self.teacher == "untrained":
            return Unsupported(
                f"{self.name} needs an untrained model, and one trained elsewhere cannot be made anew; "
                'use teacher="uniform", or scrub'
            )
        return without_classes(self.name, trained) or super().supports(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self)
        good, bad = Teacher(task.trained.module), self._bad(task.trained, rng)
        some = share_of(task.retain, self.share, rng)

        def losses() -> Iterator[Tensor]:
            forget = steps.batches(task.forget, rng, "forget")
            for x, _, _ in steps.batches(some, rng, "retain", self.epochs):
                other_x, _, _ = next(forget)
                kept = divergence(good(x), steps.module(x), self.temperature)
                yield kept + self.weight * divergence(bad(other_x), steps.module(other_x), self.temperature)

        steps.take(losses(), rng)
        return Done(trained=task.trained)

    def _bad(self, trained: Trained, rng: Generator) -> Callable[[Tensor], Tensor]:
        if self.teacher == "uniform":
            outputs = int(trained.recipe.model_args["outputs"])
            dtype = getattr(torch, trained.recipe.dtype)
            return lambda x: torch.zeros(len(x), outputs, dtype=dtype, device=x.device)
        # Named by the recipe's seed too, lest the coins of the call be those that the model began from.
        seed = coins.seed_of(rng.initial_seed(), "bad teacher", trained.recipe.seed)
        return Teacher(build(replace(trained.recipe, seed=seed)).to(device_of(trained.module)))


def share_of(records: Records, share: float, rng: Generator) -> Records:
    """A share of the rows, at least one, drawn by a number of each row's own; a view."""
    order = coins.order(records.keys, rng.initial_seed(), "share")
    return records.select(order[: max(1, round(share * len(records)))])
