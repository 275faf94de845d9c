r"""A model as a white-box attacker knows it: its rows' losses, and how its unlearner moves the parameters.

With w_i the weight of row i, training minimises
:math:`J = \frac{1}{n}\sum_i w_i \ell_i + \frac{\alpha}{2}\|\theta\|^2`. When rows S leave and rows A come in their
stead, an unlearner moves the parameters by about
:math:`\Delta\theta = B\,(\sum_S \nabla\ell - \sum_A \nabla\ell)`, with :math:`B = \tau I` (first order: a step of
gradient ascent) or :math:`B = (H + dI)^{-1} / n` (second order: what influence, Newton steps and, to first order in the
weights, exact retraining do). So the adversary's loss L changes by :math:`\langle \nabla\ell_i, B\nabla L\rangle` when
row i leaves, whatever the unlearner: one solve a target, one pass over the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.attack.aim import adversarial_loss
from expunge.attack.curvature import input_gradient, softmax_curvature
from expunge.attack.reaction import Reaction, softmax_layer
from expunge.attack.refit import minimum, summed_gradient
from expunge.calculus import Objective, conjugate_gradients, dense, mean_eigenvalue
from expunge.core.coins import child, generator, order
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import prepare, row_losses

_BATCH = 2048
_DENSE = 8192
"""Parameters up to which the curvature is factored once, for all targets."""
_FEW = 512
"""Parameters up to which it is factored anew at every point."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Victim:
    """One model under attack. Make one with `Victim.of`; of a sharded model `remembered.victims` gives one a shard.

    Attributes:
        module: in evaluation mode; its own copy.
        records: the rows that it stands on.
        objective: the losses of rows.
        weight_decay: alpha.
        reaction: how its unlearner moves it.
        curvature_rows: rows that H is a mean over, drawn by fixed coins; None: all.
        share: the weight of this model's answer among those of all shards.
        weights: of the rows in J; None: all 1. A factored curvature of more than 512 parameters takes those below one
            half for 0 and the others for 1.
    """

    module: nn.Module
    records: Records
    objective: Objective
    weight_decay: float
    reaction: Reaction
    curvature_rows: int | None = 4096
    share: float = 1.0
    weights: Float[Tensor, " n"] | None = None

    @classmethod
    def of(
        cls,
        trained: Trained,
        records: Records,
        through: Method,
        *,
        reaction: Reaction | None = None,
        curvature_rows: int | None = 4096,
    ) -> Victim:
        """The attacker's view of one model.

        Args:
            trained: the model.
            records: the data set that holds its rows.
            through: the unlearner that will carry the requests out; only its kind and settings are looked at.
            reaction: what the attacker expects of it; None: `Reaction.of`.
            curvature_rows: see the class.

        Raises:
            Unsupported: for a model of shards; see `victims`.
        """
        chosen = Reaction.of(through, trained) if reaction is None else reaction
        return cls.view(trained, records, chosen, curvature_rows=curvature_rows)

    @classmethod
    def view(
        cls, trained: Trained, records: Records, reaction: Reaction, *, curvature_rows: int | None = 4096
    ) -> Victim:
        """`of`, where what the attacker expects of the unlearner is known and the unlearner is not at hand."""
        if trained.parts:
            raise Unsupported("a model of shards is several victims; use victims(...)")
        module = copy.deepcopy(trained.module).eval()
        mine = records.where(lambda record_id, _: record_id in trained.ids)
        return cls(
            module=module,
            records=mine,
            objective=Objective(module, row_losses(trained.recipe)),
            weight_decay=trained.recipe.weight_decay,
            reaction=reaction,
            curvature_rows=curvature_rows,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.module.parameters()).dtype

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All rows as the model reads them, and their labels."""
        return prepare(self.records.x, self.dtype), self.records.y

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows, some at a time."""
        x, y = self.rows
        yield from zip(x.split(_BATCH), y.split(_BATCH), strict=True)

    def loss(self, target: Target, at: Tensor | None = None) -> Tensor:
        """The adversary's loss at these parameters, the model's own if None."""
        here = self.objective.vector() if at is None else at
        return adversarial_loss(self.objective.outputs(here, prepare(target.x, self.dtype)), target)

    def loss_gradient(self, target: Target, at: Tensor | None = None) -> Float[Tensor, " p"]:
        """Its gradient by the parameters."""
        here = self.objective.vector() if at is None else at
        gradient: Tensor = torch.func.grad(lambda vector: self.loss(target, vector))(here)
        return gradient

    def answer(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``B v``: how the parameters move when rows whose gradients sum to v leave. B is symmetric."""
        if self.reaction.order == "first":
            return self.reaction.rate * v
        return self.solve(v) / len(self.records)

    def effects(self, target: Target, at: Tensor | None = None) -> Float[Tensor, " n"]:
        """By how much each row's leaving changes the adversary's loss, to first order; below 0 helps the attacker.

        Cost: a gradient of the target, a solve, and one forward-mode pass over the rows.
        """
        return self.share * self.along(self.answer(self.loss_gradient(target, at)))

    def along(self, v: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """``<gradient of row i, v>`` of all rows."""
        return torch.cat([self.objective.scores(x, y, v) for x, y in self.batches()])

    def input_gradient(self, x: Tensor, y: Tensor, v: Float[Tensor, " p"]) -> Tensor:
        """By the inputs, as the model reads them: the gradient of ``sum_i <gradient of row i, v>``."""
        return input_gradient(self.objective, x, y, v)

    @property
    def gradient(self) -> Float[Tensor, " p"]:
        """Of J."""
        total, start = torch.zeros_like(self.objective.vector()), 0
        for x, y in self.batches():
            some = None if self.weights is None else self.weights[start : start + len(x)].to(total)
            total += self.objective.gradient(x, y, weights=some)
            start += len(x)
        return total / len(self.records) + self.weight_decay * self.objective.vector()

    def curvature(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``H v``: Gauss-Newton, which is the Hessian of a linear model; the weight decay's part included."""
        x, y, weights = self._sampled
        total = torch.zeros_like(v)
        for some, labels, each in zip(x.split(_BATCH), y.split(_BATCH), weights.split(_BATCH), strict=True):
            total += self.objective.gauss_newton_product(some, labels, v, weights=each)
        return total / len(x) + self.weight_decay * v

    def solve(self, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """``(H + d I)^-1 v``."""
        if self.objective.size <= _DENSE:
            return torch.cholesky_solve(v.double()[:, None], self._factor)[:, 0].to(v.dtype)
        found = conjugate_gradients(
            self.curvature, v, damping=self.reaction.damping, unit=self._unit, tolerance=1e-3, most=300
        )
        return found.x

    @cached_property
    def _sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that H is a mean over, their labels and weights."""
        x, y = self.rows
        weights = torch.ones(len(x), dtype=self.dtype) if self.weights is None else self.weights.to(self.dtype)
        if self.curvature_rows is None or self.curvature_rows >= len(x):
            return x, y, weights
        chosen = torch.from_numpy(order(self.records.keys, 0, "curvature")[: self.curvature_rows].copy())
        return x[chosen], y[chosen], weights[chosen]

    @cached_property
    def _unit(self) -> float:
        return mean_eigenvalue(self.curvature, self.objective.vector(), child(generator(0), "unit"))

    @cached_property
    def _factor(self) -> Tensor:
        matrix = self._matrix().double()
        damped = self.reaction.damping * matrix.trace() / len(matrix)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix + damped * torch.eye(len(matrix), dtype=torch.float64))
        if bool(failed):
            raise Misuse(
                "the curvature is singular: without weight decay or damping a model of more parameters than rows has "
                "no one minimum; train with weight_decay > 0"
            )
        return factor

    def _matrix(self) -> Tensor:
        layer = softmax_layer(self.module)
        if layer is None:
            return dense(self.curvature, self.objective.size, self.objective.vector())
        return softmax_curvature(layer, self.objective, self._sampled, weight_decay=self.weight_decay, exact=self.few)

    @property
    def few(self) -> bool:
        """Whether the parameters are so few that the curvature is factored anew at every point."""
        return self.objective.size <= _FEW

    @property
    def retrains(self) -> bool:
        """Whether a refit is exact retraining: of a softmax regression, whose unlearner is not of first order."""
        return softmax_layer(self.module) is not None and self.reaction.order == "second"

    @cached_property
    def settled(self) -> Victim:
        """The victim at the minimum of J, all rows weighing 1: where refits are compared from. Computed once."""
        return self.refit(torch.ones(len(self.records), dtype=self.dtype))

    def refit(self, weights: Float[Tensor, " n"], *, tolerance: float | None = None, most: int = 100) -> Victim:
        """The victim at the minimum of J with these weights: what exact retraining to convergence gives.

        Up to 512 parameters by Newton's steps; above by quasi-Newton steps (L-BFGS) that start from the factored
        curvature of all rows. Of a network, whose J is not convex, and where the unlearner is of first order, it is one
        step of the answer to the weights' change, right to first order in it; without a change the victim itself.

        Args:
            weights: of the rows.
            tolerance: on the norm of J's gradient; None: 1e-10 in float64, 1e-5 in float32.
            most: steps at most; Misuse if they do not suffice.
        """
        goal = (1e-10 if self.dtype == torch.float64 else 1e-5) if tolerance is None else tolerance
        weights = weights.to(self.dtype)
        if self.retrains:
            return minimum(self._moved(self.objective.vector(), weights, fresh=self.few), goal=goal, most=most)
        change = (torch.ones_like(weights) if self.weights is None else self.weights.to(weights)) - weights
        if not bool(change.any()):
            return self
        leaving = summed_gradient(self.objective, self.batches(), change)
        return self._moved(self.objective.vector() + self.answer(leaving), weights, fresh=self.few)

    def stepped(self, step: Float[Tensor, " p"]) -> Victim:
        """The victim this far from here, at the same weights; of few parameters its curvature is that of there."""
        return self._moved(self.objective.vector() + step, self.weights, fresh=self.few)

    def at(self, vector: Float[Tensor, " p"]) -> Victim:
        """The victim at these parameters, its curvature as it is here."""
        return self._moved(vector, self.weights, fresh=False)

    def with_rows(self, positions: Tensor, x: Tensor) -> Victim:
        """The same model over rows of which those at these positions read `x` instead, as the model reads them."""
        other = self._moved(self.objective.vector(), self.weights, fresh=False)
        rows, labels = self.rows
        rows = rows.clone()
        rows[positions] = x
        other.__dict__["rows"] = (rows, labels)
        return other

    def _moved(self, vector: Tensor, weights: Tensor | None, *, fresh: bool) -> Victim:
        module = copy.deepcopy(self.module)
        other = replace(self, module=module, objective=Objective(module, self.objective.row_losses), weights=weights)
        other.objective.put(vector)
        shared = ("rows",) if fresh else ("rows", "_factor", "_unit")
        other.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        return other
