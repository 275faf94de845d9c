"""Certified removal from linear models with a perturbed objective (Guo, Goldstein, Hannun and van der Maaten, 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from expunge.certify.accountant import Budget
from expunge.certify.constants import derived, setting, supplied
from expunge.certify.guarantee import guarantee_of
from expunge.certify.guo_bound import (
    DERIVATIONS,
    PAPER_CAP,
    PAPER_EPSILON,
    WORST_EPSILON,
    WORST_RESIDUAL,
    norm_epsilon,
    paper_epsilon,
)
from expunge.certify.guo_linear import Perturbed, features, removal
from expunge.certify.newton_bound import RADIUS
from expunge.certify.noise import secret_normal
from expunge.core.claim import Claim, Constant, Guarantee
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.protocols import Need
from expunge.core.recipe import Recipe
from expunge.core.records import Records, seal
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.models import head_of
from expunge.unlearn.method import Done, Method, Task

__all__ = ["DERIVATIONS", "GuoRemoval"]

Bound = Literal["worst-case", "paper"]
_NAMES = ("head.weight", "head.bias")
_SECRET = (".b", ".residual", ".removed")
_AGAIN = "train anew on what remains with GuoRemoval.fit, which draws new noise"


@dataclass(frozen=True, kw_only=True)
class GuoRemoval(Method):
    r"""A Newton step on a softmax model that was trained with a random linear term in its objective.

    Train with `fit`: the minimum W of
    :math:`\frac1n\sum_i\ell_i(W) + \frac{\lambda}{2}|W|^2 + \frac1n\langle b, W\rangle`, b ~ N(0, sigma^2) from the
    operating system's generator, :math:`\lambda` the recipe's weight decay, bias included. A removal adds
    :math:`H^{-1}\Delta`, H the retained rows' Hessian and :math:`\Delta` the removed rows' gradients with their share
    of the penalty (both as sums). No noise is added then: b hides what the step leaves over, a residual that grows
    with each removal. When the budget is spent, `BudgetExhausted` asks for a new `fit`. With two classes it is the
    paper's binary logistic regression in the difference of the two rows of W, with half the penalty.

    Two bounds, whose arguments `expunge.certify.guo_bound` works out:

    - ``worst-case`` (proved): what any rows of norm `feature_radius` could do, while at least `rows` remain and at most
      `removals` have gone since `fit`. Independent of the rows, so that no decision tells anything. It includes the
      determinant of the map of the noise, which the paper leaves out, and needs much weight decay and many rows.
    - ``paper`` (conditional): Guo's theorem 3 with the residual measured on the rows, accumulated and held below the
      budget's cap. It takes the residual as independent of the noise, which it is not; `independence` stands among the
      constants as supplied, and no more is proved than that.

    Only the model that is given out last is covered. Models before and after a removal carry the same noise: who holds
    both sees the removed rows' step bare. Requests must not be chosen by looking at the model. Systems are solved
    to a relative 1e-12, minima to 1e-10; that and rounding are in the measured residual, not in the worst case.

    Attributes:
        sigma: standard deviation of each entry of b, in units of the summed losses' gradient.
        feature_radius: norm that no row exceeds; rows are checked, never scaled.
        bound: see above.
        rows: of ``worst-case``: rows that will at least remain.
        removals: of ``worst-case``: rows that will at most be removed before `fit` is called again.
        budget: its epsilon and delta are of the current model; its number of requests plays no part.

    Cost: a gradient of each removed row, some tens of Hessian products with the retained rows, one Gram matrix.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})
    source: ClassVar[str] = "Guo, Goldstein, Hannun and van der Maaten, 2020"
    not_guaranteed: ClassVar[str] = "anything of two models held together, or of requests chosen after seeing the model"
    sigma: float = 100.0
    feature_radius: float = 1.0
    bound: Bound = "worst-case"
    rows: int = 10_000
    removals: int = 1
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        checks = [
            (0 < self.sigma < math.inf, f"sigma must be > 0, got {self.sigma}"),
            (0 < self.feature_radius < math.inf, f"feature_radius must be > 0, got {self.feature_radius}"),
            (self.bound in get_args(Bound), f'bound must be worst-case or paper, got "{self.bound}"'),
            (isinstance(self.rows, int) and self.rows >= 1, f"rows must be an integer >= 1, got {self.rows}"),
            (isinstance(self.removals, int) and self.removals >= 1, f"removals must be >= 1, got {self.removals}"),
        ]
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    def fit(self, recipe: Recipe, records: Records, *, gone: frozenset[str] = frozenset()) -> Trained:
        """Train a softmax model with a perturbed objective, in float64, to its minimum.

        Args:
            recipe: of model softmax with weight decay; its optimiser, epochs and seed play no part.
            records: the rows to train on.
            gone: ids that were removed before, to be booked on.

        Returns:
            The model, a draw from its distribution (exact in law, as no seed gives its noise), with the noise and what
            is spent of it in `secret`, which is never saved.

        Raises:
            Unsupported: for another model or loss, shards, pruning, a bound on the norm, or too few rows.
            Misuse: without weight decay, for a row longer than `feature_radius`, or if the settings promise nothing.
        """
        recipe = replace(recipe, dtype="float64").completed(records)
        problem = self._problem_of(recipe)
        if problem is not None:
            raise problem
        self._refuse_few(len(records))
        self.guarantee_for(recipe, build(recipe))
        x, classes = features(records, self.feature_radius), int(recipe.model_args["outputs"])
        b = self.sigma * secret_normal((classes, x.shape[1])).to(x.device)
        objective = Perturbed(x, records.y, classes, recipe.weight_decay, b)
        w = objective.minimum(torch.zeros_like(b))
        module = build(recipe).to(records.device).eval()
        _write(module, w)
        secret = _secret(b, float(objective.gradient(w).norm()), 0)
        return Trained(
            module=module,
            recipe=recipe,
            ids=frozenset(records.ids),
            gone=gone,
            seal=seal(records),
            exactness="in law",
            secret=secret,
        )

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs a model that `fit` trained, with its secret state."""
        problem = super().supports(trained) or self._problem_of(trained.recipe)
        if problem is None and not set(_SECRET) <= set(trained.secret):
            return Unsupported(
                f"{self.name} needs the noise that the model was trained with and what is spent of it, which are never "
                f"saved, and the model has none: {_AGAIN}"
            )
        return problem

    def _problem_of(self, recipe: Recipe) -> Unsupported | None:
        plain = recipe.sharding is None and recipe.pruning is None and recipe.max_norm is None
        if recipe.model != "softmax" or recipe.loss != "cross_entropy" or not plain:
            return Unsupported(
                f'{self.name} is for the model "softmax" with cross_entropy, without shards, pruning or max_norm; use '
                "newton-unlearning or retrain"
            )
        return None

    def _refuse_few(self, rows: int) -> None:
        if self.bound == "worst-case" and rows < self.rows:
            raise Unsupported(f"{self.name} was promised at least {self.rows} rows, got {rows}; lower rows")

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        trained, forget, retain = task.trained, task.forget, task.retain
        if not set(retain.ids) <= trained.ids:
            raise Unsupported(f"{self.name} removes rows and cannot take new ones in; use retrain")
        removed = int(trained.secret[".removed"]) + len(forget)
        self._refuse_few(len(retain))
        if self.bound == "worst-case" and removed > self.removals:
            raise BudgetExhausted(f"{self.removals} rows may be removed, and this would make {removed}; {_AGAIN}")
        guarantee = self.guarantee_for(trained.recipe, trained.module)
        b, decay = trained.secret[".b"], trained.recipe.weight_decay
        both = [Perturbed(features(rows, self.feature_radius), rows.y, len(b), decay, b) for rows in (retain, forget)]
        for rows in (retain, forget):
            task.tally.gradients += len(rows)
            task.tally.rows_read += len(rows)
        w, _, more = removal(both[0], both[1], _weights(trained.module))
        residual = float(trained.secret[".residual"]) + more
        if residual > guarantee.sensitivity:  # of worst-case only if rounding or the solver failed
            raise BudgetExhausted(f"this removal would leave more over than the noise hides; {_AGAIN}")
        _write(trained.module, w)
        return Done(trained=replace(trained, secret=_secret(b, residual, removed)), guarantee=guarantee)

    def guarantee_for(self, recipe: Recipe, module: nn.Module) -> Guarantee:
        """The guarantee of every removal within the budget, from settings alone.

        Raises:
            Misuse: if the settings promise nothing within the budget.
        """
        if not recipe.weight_decay > 0:
            raise Misuse("a minimum that removals can be bounded at needs weight_decay > 0; give some")
        size = float(sum(one.numel() for one in module.parameters()))
        constants = {
            "sigma": setting(self.sigma, "method.sigma"),
            "delta": setting(self.budget.delta, "method.budget.delta"),
        }
        if self.bound == "paper":
            constants |= {"budget": setting(self.budget.epsilon, "method.budget.epsilon"), "independence": supplied(1)}
            constants["sensitivity"] = derived(PAPER_CAP, constants)
            constants["epsilon"] = derived(PAPER_EPSILON, constants)
        else:
            constants |= self._worst(recipe, size, constants)
        return guarantee_of(
            module,
            parameters=_NAMES,
            constants=constants,
            delta=self.budget.delta,
            mechanism="a Gaussian linear term in the objective, once, at training (sensitivity: of its gradient)",
            reference="the minimum on the retained rows with a new linear term of equal size (Guo et al., 2020)",
            transcript=None,
            remarks=self._remarks(constants, size),
        )

    def _worst(self, recipe: Recipe, size: float, constants: dict[str, Constant]) -> dict[str, Constant]:
        known = constants | {
            "rows": setting(self.rows, "method.rows"),
            "removals": setting(self.removals, "method.removals"),
            "feature_radius": setting(self.feature_radius, "method.feature_radius"),
            "weight_decay": setting(recipe.weight_decay, "recipe.weight_decay"),
            "dimension": setting(size, "model.parameters"),
        }
        known["radius"] = derived(RADIUS, known)
        known["sensitivity"] = derived(WORST_RESIDUAL, known)
        known["epsilon"] = derived(WORST_EPSILON, known)
        epsilon = known["epsilon"].value
        if epsilon > self.budget.epsilon * (1 + 1e-9):
            raise Misuse(
                f"with these settings epsilon is {epsilon:.4g}, above the budget's {self.budget.epsilon:g}; raise "
                'sigma, weight_decay or rows, lower removals, or take bound="paper", which is not proved'
            )
        return known

    def _remarks(self, constants: dict[str, Constant], size: float) -> tuple[str, ...]:
        residual, delta = constants["sensitivity"].value, self.budget.delta
        always = (
            "Only the current model: models before and after share their noise, and together show the removed rows' "
            "step bare.",
            "Requests must not be chosen by looking at the model.",
        )
        if self.bound == "worst-case":
            figure = paper_epsilon(residual, self.sigma, delta)
            return (*always, f"The paper's formula would say epsilon {figure:.4g} for this residual.")
        figure = norm_epsilon(residual, self.sigma, delta, size)
        return (
            *always,
            "The formula takes the residual as independent of the noise, which it depends on; for the worst direction "
            f"the noise's density alone differs by epsilon {figure:.4g}, the determinant of its map not counted.",
        )


def _weights(module: nn.Module) -> Tensor:
    head = head_of(module)[1]
    return torch.cat([head.weight.detach(), head.bias.detach()[:, None]], 1)


@torch.no_grad()
def _write(module: nn.Module, w: Tensor) -> None:
    head = head_of(module)[1]
    head.weight.copy_(w[:, :-1])
    head.bias.copy_(w[:, -1])


def _secret(b: Tensor, residual: float, removed: int) -> dict[str, Tensor]:
    numbers = {".residual": residual, ".removed": removed}
    return {".b": b, **{name: torch.tensor(float(value), dtype=torch.float64) for name, value in numbers.items()}}
