"""The steps of DP-SGD: secret batches, each row's gradient clipped, secret noise on their sum."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from expunge.calculus.factored import maker
from expunge.calculus.objective import Objective
from expunge.calculus.pieces import Matrix, Outer, Piece, Pieces
from expunge.certify import noise
from expunge.core.events import PrivateSteps
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.learn.loop import Tally, optimiser_of, prepare, row_losses
from expunge.learn.models import MODELS

COINS = 2**32
"""Chances of rows are multiples of one in so many."""
_NUMBERS = 1 << 25


def clipped_sum(make: Callable[[Tensor, Tensor], Pieces], x: Tensor, y: Tensor, clip: float) -> Tensor | float:
    """Sum of the rows' gradients, each scaled down to this L2 norm if it is longer; one that is not finite is 0."""
    rows = make(x, y)
    lengths = _lengths(rows)
    fine = lengths.isfinite()
    if not bool(fine.all()):
        return clipped_sum(make, x[fine], y[fine], clip) if bool(fine.any()) else 0.0
    scale = clip / lengths.clamp(min=clip)
    dtypes = {tensor.dtype for piece in rows.pieces for tensor in _tensors(piece)}
    return rows.transposed(scale.to(max(dtypes, key=lambda dtype: dtype.itemsize))).double()


def _lengths(rows: Pieces) -> Tensor:
    """L2 norm of each row's gradient, in float64."""
    squares = [
        torch.stack([tensor.double().square().sum(1) for tensor in _tensors(piece)]).prod(0) for piece in rows.pieces
    ]
    return torch.stack(squares).sum(0).sqrt()


def _tensors(piece: Piece) -> tuple[Tensor, ...]:
    """What a piece keeps; the norms of its rows are the products of theirs."""
    if isinstance(piece, Outer):
        return piece.a, piece.b
    if isinstance(piece, Matrix):
        return (piece.matrix,)
    raise TypeError(type(piece).__name__)


def secret_batch(rows: int, rate: float) -> Tensor:
    """Positions of the rows drawn: each with chance `rate`, a multiple of 2**-32, by the operating system's coins."""
    drawn = np.frombuffer(os.urandom(4 * rows), dtype=np.uint32).astype(np.uint64)
    return torch.from_numpy(np.flatnonzero(drawn < np.uint64(round(rate * COINS))))


@dataclass(frozen=True)
class PrivateDescent:
    """One private training: what it knows."""

    module: nn.Module
    recipe: Recipe
    records: Records
    release: PrivateSteps
    clip: float
    tally: Tally

    def go(self) -> None:
        """Make all steps."""
        objective = Objective(self.module, row_losses(self.recipe))
        optimiser = optimiser_of(self.recipe, self.module)
        in_epoch = self.release.steps // self.recipe.epochs
        parameters = dict(self.module.named_parameters())
        for step in range(self.release.steps):
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.optimiser_args["lr"] * self.recipe.lr_factor(step // in_epoch)
            total = self._sum(objective)
            total += self.release.noise * self.clip * noise.secret_normal(total.shape).to(total.device)
            for name, piece in objective.split(total / self.recipe.batch_size).items():
                parameters[name].grad = piece.to(parameters[name].dtype)
            optimiser.step()
        optimiser.zero_grad()

    def _sum(self, objective: Objective) -> Tensor:
        """Sum of the clipped gradients of a batch that is drawn anew; zero if nobody is drawn."""
        total = torch.zeros(objective.size, dtype=torch.float64, device=self.records.device)
        drawn = secret_batch(len(self.records), self.release.rate)
        blocks = drawn.split(max(1, _NUMBERS // objective.size)) if len(drawn) else ()
        dtype = getattr(torch, self.recipe.dtype)
        for positions, (x, y) in zip(blocks, self.records.batches(blocks), strict=True):
            self.tally.saw(self.records, positions, x, y)
            total += clipped_sum(partial(self._gradients, objective), prepare(x, dtype), y, self.clip)
        return total

    def _gradients(self, objective: Objective, x: Tensor, y: Tensor) -> Pieces:
        """By layers of the networks that are known to mix no rows; of others one row at a time, which cannot."""
        if type(self.module) in MODELS.values():
            return maker(objective, x, y)[0](x, y)
        return Pieces([Matrix(objective.gradients(x, y))], len(x))
