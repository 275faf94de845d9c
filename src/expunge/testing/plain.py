"""An honest method without the protection of the base, for the liars to spoil."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from expunge.core.claim import Claim, Exactness
from expunge.core.coins import order
from expunge.core.errors import Unsupported
from expunge.core.protocols import Need, Unlearned
from expunge.core.records import Records
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.loop import prepare
from expunge.testing.foreign import booked


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Thirty full-batch steps on the retained rows, on a copy, with the books kept.

    `said` is what its results claim, if that is not what the class declares; honest methods leave it None.
    """

    claim: ClassVar[Claim] = Claim.NONE
    said: ClassVar[Claim | None] = None
    exactness: ClassVar[Exactness | None] = None
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})

    @property
    def name(self) -> str:
        """The class's name."""
        return type(self).__name__

    def supports(self, trained: Trained) -> Unsupported | None:
        """Single models only."""
        return Unsupported(f"{self.name} changes one model, and this one has shards") if trained.parts else None

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Carry out the request."""
        problem = self.supports(trained)
        if problem is not None:
            raise problem
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        if not len(split.forget):
            return booked(trained, trained.module, split, Claim.NONE, name=self.name)
        module = self.change(trained, records, split, rng)
        claim = self.claim if self.said is None else self.said
        return booked(trained, module, split, claim, self.exactness, name=self.name, seconds=1e-3)

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """The module after."""
        module = copy.deepcopy(trained.module)
        descend(module, split.retain)
        return module


def descend(module: nn.Module, rows: Records, *, steps: int = 30, lr: float = 0.5) -> None:
    """Steps of full-batch gradient descent (ascent if `lr` is negative) in place, rows in the order of their keys."""
    ranked = rows.select(order(rows.keys, "plain"))
    x, y = prepare(ranked.x, torch.float32), ranked.y
    for _ in range(steps):
        step_down(module, x, y, lr)


def step_down(module: nn.Module, x: Tensor, y: Tensor, lr: float) -> None:
    """One step of gradient descent in place, past autograd."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(nn.functional.cross_entropy(module(x), y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.data.sub_(lr * gradient)


def jittered(module: nn.Module, rng: Generator | None) -> nn.Module:
    """The module with a little noise on each parameter, in place; from torch's global generator without `rng`."""
    for parameter in module.parameters():
        parameter.data.add_(1e-3 * torch.randn(parameter.shape, generator=rng))
    return module
