"""Giving the rows to forget to the class across the nearest boundary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Need
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.predict import evaluating
from expunge.unlearn.distil import without_classes
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps, check_pace


@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(Method):
    """Train on the forget rows with the label of the class across the nearest boundary.

    That label is the original model's most probable class, the row's own excepted, at the neighbour
    ``x + epsilon * sign(gradient of the row's loss by x)`` (Goodfellow, Shlens and Szegedy, 2015). Rows of pixels
    (uint8) are divided by 255 before, and the neighbour is clamped to 0 to 1; float rows have no known range and are
    not clamped, so `epsilon` is in their own units. Objective of a step: the mean cross-entropy of a batch of forget
    rows with these labels; no weight decay, no retained rows. The authors' code takes the row's own label where that
    is still the most probable, and rounds the neighbour to whole pixels.
    Where removed rows are like the others, a model retrained without them gives them their own label, not the next:
    with a tenth of 20,000 MNIST rows (MLP) removed at random, test accuracy falls from 0.96 to 0.94, and with lr 3e-3
    to 0.65. It is meant for whole classes and for wrong labels.
    Cost: `epochs` + 1 passes over the forget rows.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET})
    source: ClassVar[str] = "Chen et al., 2023"
    not_guaranteed: ClassVar[str] = "that the other classes keep their accuracy: no retained row is read"
    epochs: int = 1
    lr: float = 1e-3
    momentum: float = 0.9
    epsilon: float = 0.1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)
        if not 0 <= self.epsilon < math.inf:
            raise Misuse(f"epsilon must be >= 0, got {self.epsilon}")

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs at least two classes."""
        return without_classes(self.name, trained) or super().supports(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self, weight_decay=0.0)
        labels = self._labels(task.forget, steps, rng)

        def losses() -> Iterator[Tensor]:
            for x, y, positions in steps.batches(task.forget, rng, "forget", self.epochs):
                yield steps.loss(steps.module(x), labels[positions].to(y.device))

        steps.take(losses(), rng)
        return Done(trained=task.trained)

    def _labels(self, records: Records, steps: Steps, rng: Generator) -> Tensor:
        """(n,) the label that each row is to get, by the model as it is now."""
        pixels = records.select([0]).x.dtype is torch.uint8
        labels = torch.empty(len(records), dtype=torch.int64)
        with evaluating(steps.module):
            for x, y, positions in steps.batches(records, rng, "neighbours", 1):
                if not x.is_floating_point():
                    raise Unsupported(f"{self.name} steps in the rows, and these are {x.dtype}; use random-labels")
                labels[positions] = nearest_other(steps.module, x, y, self.epsilon, clamp=pixels).cpu()
        return labels


def nearest_other(
    module: nn.Module, x: Float[Tensor, "n *row"], y: Int[Tensor, " n"], epsilon: float, *, clamp: bool
) -> Int[Tensor, " n"]:
    """For each row the class, its own excepted, that the module finds most probable a step of `epsilon` uphill.

    Args:
        module: in evaluation mode, so that rows do not mix; its parameters get no gradient.
        x: rows as the module reads them.
        y: their own labels.
        epsilon: length of the step in each coordinate.
        clamp: whether the rows are pixels, which stay between 0 and 1.
    """
    x = x.detach().requires_grad_()
    loss = nn.functional.cross_entropy(module(x), y, reduction="sum")
    neighbour = x.detach() + epsilon * torch.autograd.grad(loss, x)[0].sign()
    with torch.no_grad():
        answers: Tensor = module(neighbour.clamp(0, 1) if clamp else neighbour)
        return answers.scatter(1, y[:, None], -math.inf).argmax(1)
