"""What the methods that take gradient steps share: an order of batches without positions, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from expunge.core import coins
from expunge.core.errors import Misuse
from expunge.core.mask import Held, Mask
from expunge.core.records import Records
from expunge.learn.build import seeded
from expunge.learn.loop import mean_loss, optimiser_of, prepare
from expunge.unlearn.method import Task

Batch = tuple[Tensor, Tensor, Tensor]


class Pace(Protocol):
    """How a method steps."""

    @property
    def epochs(self) -> int:
        """Passes over its rows."""

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def momentum(self) -> float:
        """Momentum of SGD."""

    @property
    def batch_size(self) -> int | None:
        """Rows a step; None: the recipe's."""


def check_pace(pace: Pace) -> None:
    """Misuse, before any work, for settings with which no step can be made."""
    checks = [
        (isinstance(pace.epochs, int) and pace.epochs >= 1, f"epochs must be an integer >= 1, got {pace.epochs}"),
        (0 < pace.lr < math.inf, f"the method's lr must be > 0, got {pace.lr}"),
        (0 <= pace.momentum < 1, f"momentum must be >= 0 and < 1, got {pace.momentum}"),
        (pace.batch_size is None or pace.batch_size >= 1, f"batch_size must be >= 1, got {pace.batch_size}"),
    ]
    for fine, message in checks:
        if not fine:
            raise Misuse(message)


class Steps:
    """Gradient steps on a task's model: the recipe's loss and weight decay, SGD at the method's own pace.

    Batch norms stay in evaluation mode, so that their running statistics do not drift towards the rows that happen to
    be read: in the methods' usual code that drift is a hidden part of what is called forgetting.
    """

    def __init__(self, task: Task, pace: Pace, *, weight_decay: float | None = None, moves: Mask | None = None) -> None:
        """Steps on the task's model.

        Args:
            task: the model, and which of its weights may move if it is pruned.
            pace: how to step.
            weight_decay: in place of the recipe's.
            moves: a method's own choice of entries that may move; the others keep their value bit for bit.
        """
        recipe = task.trained.recipe
        self.module, self.tally = task.trained.module, task.tally
        masks = [mask for mask in (task.moves, moves) if mask is not None]
        self.held = [Held(mask, self.module) for mask in masks]
        self.batch_size = pace.batch_size or recipe.batch_size
        self.dtype = getattr(torch, recipe.dtype)
        self.loss: Callable[[Tensor, Tensor], Tensor] = mean_loss(recipe)
        self.optimiser = optimiser_of(
            replace(
                recipe,
                optimiser="sgd",
                optimiser_args={"lr": pace.lr, "momentum": pace.momentum},
                weight_decay=recipe.weight_decay if weight_decay is None else weight_decay,
            ),
            self.module,
        )

    def batches(self, records: Records, rng: Generator, name: str, epochs: int | None = None) -> Iterator[Batch]:
        """Batches (rows, labels, positions) of so many passes (None: for ever), each in an order of its own."""
        for epoch in count() if epochs is None else range(epochs):
            order = torch.from_numpy(coins.order(records.keys, rng.initial_seed(), name, epoch))
            split = order.split(self.batch_size)
            for positions, (x, y) in zip(split, records.batches(split), strict=True):
                self.tally.saw(records, positions, x, y)
                yield prepare(x, self.dtype), y, positions

    def take(self, losses: Iterable[Tensor], rng: Generator, after: Callable[[], None] | None = None) -> None:
        """A step down each loss, which is computed when it is asked for, after the step before.

        Args:
            losses: one a step.
            rng: names the coins of dropout.
            after: called after each step of the optimiser, before held entries are put back.
        """
        self.module.train()
        for layer in self.module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        with seeded(rng.initial_seed(), "dropout"):
            for loss in losses:
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()
                if after is not None:
                    after()
                for held in self.held:
                    held.put_back()
        self.module.eval()
