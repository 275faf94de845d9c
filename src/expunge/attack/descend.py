"""Moving rows down an attacker's loss: which direction of parameters the rows' gradients should take, and the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from expunge.attack.knowledge import Wish
from expunge.attack.victim import Victim
from expunge.core.coins import child
from expunge.core.errors import Misuse


class Aim(Protocol):
    """What moved rows should do."""

    def __call__(self, x: Tensor) -> tuple[float, Victim, Float[Tensor, " p"]]:
        """Of rows as the model reads them: the loss; and u, the loss's gradient by the sum of the rows' gradients.

        So the gradient of the loss by the rows is that of ``sum_i <gradient of row i, u>`` at the victim given.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Adjoint:
    """The attacker's loss after an unlearner that moves by B times (gradients that leave - gradients that come).

    Attributes:
        victim: before.
        wish: the loss.
        y: labels of the rows.
        leaving: sum of the gradients of the rows that leave; None: none.
    """

    victim: Victim
    wish: Wish
    y: Tensor
    leaving: Tensor | None = None

    def __call__(self, x: Tensor) -> tuple[float, Victim, Tensor]:
        """See `Aim`. Cost: two solves."""
        victim = self.victim
        coming = victim.objective.gradient(x, self.y)
        change = -coming if self.leaving is None else self.leaving - coming
        there = victim.at(victim.objective.vector() + victim.answer(change))
        return float(self.wish.loss(there)), victim, -victim.answer(self.wish.gradient(there))


@dataclass(kw_only=True, eq=False)
class Retraining:
    """The attacker's loss at the minimum over all rows, those at `places` moved. Starts from where it was last.

    Attributes:
        victim: at the minimum.
        wish: the loss.
        places: of the moved rows.
        y: their labels.
    """

    victim: Victim
    wish: Wish
    places: Tensor
    y: Tensor

    def __call__(self, x: Tensor) -> tuple[float, Victim, Tensor]:
        """See `Aim`. Cost: a refit and a solve."""
        moved = self.victim.with_rows(self.places, x)
        self.victim = moved.refit(torch.ones(len(moved.records)))
        u = -self.victim.answer(self.wish.gradient(self.victim))
        return float(self.wish.loss(self.victim)), self.victim, u


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """1 - cosine between what the rows bring and what brings the attacker's loss down; from 0 (aligned) to 2.

    Attributes:
        victim: the model.
        wish: the loss.
        y: labels of the rows.
        leaving: sum of the gradients of rows that leave as they come; None: none.
        towards: 1: rows that come should step down the loss, their gradients being along its own. -1: rows whose
            removal should, against it.
    """

    victim: Victim
    wish: Wish
    y: Tensor
    leaving: Tensor | None = None
    towards: float = 1.0

    def __call__(self, x: Tensor) -> tuple[float, Victim, Tensor]:
        """See `Aim`. Cost: two gradients."""
        aim = self.towards * self.wish.gradient(self.victim)
        brought = self.victim.objective.gradient(x, self.y)
        brought = brought if self.leaving is None else brought - self.leaving
        size = (brought.norm() * aim.norm()).clamp_min(1e-30)
        cosine = torch.dot(brought, aim) / size
        along = cosine * brought / brought.square().sum().clamp_min(1e-30)
        return float(1 - cosine), self.victim, along - aim / size


def descend(
    aim: Aim,
    x: Tensor,
    y: Tensor,
    *,
    limits: tuple[Tensor, Tensor],
    settle: Callable[[Tensor], Tensor],
    eps: float,
    steps: int,
    restarts: int,
    renew: int,
    rng: Generator,
) -> Tensor:
    """The best rows found within the limits, by signed steps that shrink to nothing.

    Args:
        aim: the loss and its direction.
        x: the rows to move, as the model reads them.
        y: their labels.
        limits: least and greatest values.
        settle: rounds rows to how they are stored; what is returned is the best of rounded rows.
        eps: the steps' scale.
        steps: of each start.
        restarts: starts.
        renew: how many times a start the aim is computed anew.
        rng: names the coins.
    """
    every = max(1, steps // renew)
    best, least = x, float("inf")
    for start in range(restarts):
        coins = child(rng, "start", start)
        noise = (2 * torch.rand(x.shape, generator=coins, dtype=torch.float64) - 1).to(x)
        now = (x + (0.1 if start == 0 else 1.0) * eps * noise).clamp(*limits)
        for step in range(steps):
            if step % every == 0:
                loss, victim, u = aim(now)
            slope = victim.input_gradient(now, y, u)
            now = (now - 4 * eps / steps * (1 - step / steps) * slope.sign()).clamp(*limits)
        rounded = settle(now)
        loss = aim(rounded)[0]
        if loss < least:
            best, least = rounded, loss
    return best


def guess(
    loss: Callable[[Tensor], Float[Tensor, " n"]],
    x: Tensor,
    *,
    limits: tuple[Tensor, Tensor],
    eps: float,
    steps: int,
    samples: int,
    rng: Generator,
) -> Tensor:
    """Each row moved down its own loss by two-sided differences along random signs; the best of its moves.

    Cost: ``(2 samples + 1) steps`` evaluations of all rows.
    """
    now, best, least = x, x, loss(x)
    for step in range(steps):
        slope = torch.zeros_like(x)
        for _ in range(samples):
            signs = (torch.randint(0, 2, x.shape, generator=rng) * 2 - 1).to(x)
            there, back = ((now + way * 0.1 * eps * signs).clamp(*limits) for way in (1, -1))
            slope += (loss(there) - loss(back)).reshape(-1, *[1] * (x.dim() - 1)) * signs
        now = (now - 4 * eps / steps * (1 - step / steps) * slope.sign()).clamp(*limits)
        after = loss(now)
        better = after < least
        best = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), now, best)
        least = torch.where(better, after, least)
    return best


def check_steps(eps: float, steps: int, restarts: int) -> None:
    """Misuse for numbers that no descent can be made with."""
    if not eps > 0:
        raise Misuse(f"eps must be above 0, got {eps}; rows that may not move are asked about by SelectRequests")
    if steps < 1 or restarts < 1:
        raise Misuse(f"steps and restarts must be >= 1, got {steps} and {restarts}")
