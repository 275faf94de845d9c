"""How each certified method is set up to keep to a budget: the table that plans and sweeps go by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from torch import Generator

from expunge.certify.accountant import Budget
from expunge.certify.clipped_models import ClippedModelFineTune
from expunge.certify.descent import DescentToDelete
from expunge.certify.guo import GuoRemoval
from expunge.certify.head import NewtonHead
from expunge.certify.newton import NewtonUnlearning
from expunge.certify.noisy_fine_tune import ClippedFineTune
from expunge.certify.private import covered, train_private
from expunge.certify.rewind import RewindToDelete
from expunge.core.claim import Guarantee
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Unlearned
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import NOTHING, Keep, Report
from expunge.learn.training import train
from expunge.unlearn.method import Method

_DECAY = 1e-3
_FULL_BATCH_STEPS = 500
_LARGEST_SIGMA = 2.0**40


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked of a method, before any request arrives.

    Attributes:
        recipe: the user's, complete.
        held: rows that are trained on.
        rows: rows that one request removes at most.
        budget: of all requests.
        radius: bound on the norm of any row with a 1 appended, chosen without looking at rows; None: features lie
            within [-1, 1], as pixels do.
        sigma: of a method that leaves it free; None: its default.
    """

    recipe: Recipe
    held: int
    rows: int
    budget: Budget
    radius: float | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        checks = [
            (self.rows >= 1, f"rows of a request must be >= 1, got {self.rows}"),
            (self.radius is None or 1 < self.radius < math.inf, f"radius must be > 1, got {self.radius}"),
            (self.recipe.sharding is None, "certified methods change one model; leave shards out of the recipe"),
            (
                self.all_rows < self.held,
                f"{self.budget.requests:,} requests of {self.rows:,} rows leave nothing of {self.held:,} rows; ask for "
                "fewer",
            ),
        ]
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    @property
    def all_rows(self) -> int:
        """Rows that all requests together remove at most."""
        return self.budget.requests * self.rows

    @property
    def length(self) -> float:
        """Bound on the norm of any row with a 1 appended."""
        features = math.prod(self.recipe.model_args["shape"])
        return math.sqrt(features + 1) if self.radius is None else self.radius

    @property
    def feature_length(self) -> float:
        """The same without the 1; a little larger than rounding."""
        return math.sqrt(self.length**2 - 1) * (1 + 1e-9)

    @property
    def convex(self) -> Recipe:
        """The recipe with weight decay."""
        return self.recipe if self.recipe.weight_decay > 0 else replace(self.recipe, weight_decay=_DECAY)

    def demand(self, more: str = "") -> str:
        """What a recipe that has no weight decay must have from the start, and what else it must be."""
        decay = "" if self.recipe.weight_decay > 0 else f"weight_decay > 0, here {_DECAY:g}"
        return "; ".join(one for one in (decay, more) if one)


@dataclass(frozen=True, kw_only=True)
class Started:
    """A model to remove rows from, and the guarantee that it was trained with, if training gives one."""

    trained: Trained
    guarantee: Guarantee | None = None


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method as it would be used.

    Attributes:
        recipe: how the model must be trained.
        method: what removes; None where training alone does all.
        keep: what training must leave behind.
        demand: what the recipe must be from the start, in words; empty if it is the user's as it is.
        noise: ``once``: one addition to what `Trained.secret` holds; ``steps``: in each removal; ``training``: in
            training.
    """

    recipe: Recipe
    method: Method | None = None
    keep: Keep = NOTHING
    demand: str = ""
    noise: Literal["once", "steps", "training"] = "once"

    def train(self, records: Records, report: Report | None = None) -> Started:
        """The model that requests will be about."""
        return Started(trained=train(self.recipe, records, keep=self.keep, report=report))

    def remove(self, start: Started, records: Records, request: Request, rng: Generator) -> Unlearned:
        """Carry out a request."""
        if self.method is None:
            raise Unsupported("this way has no method; training is all there is to it")
        return self.method(start.trained, records, request, rng=rng)


@dataclass(frozen=True, kw_only=True)
class _Fitted(Way):
    """Its own training, which adds the noise."""

    guo: GuoRemoval

    def train(self, records: Records, report: Report | None = None) -> Started:
        return Started(trained=self.guo.fit(self.recipe, records))


@dataclass(frozen=True, kw_only=True)
class _Private(Way):
    """Private training for as many rows as all requests will remove; requests then change nothing."""

    budget: Budget
    group: int

    def train(self, records: Records, report: Report | None = None) -> Started:
        epsilon, delta = self.budget.epsilon, self.budget.delta
        trained, guarantee = train_private(self.recipe, records, epsilon=epsilon, delta=delta, group=self.group)
        return Started(trained=trained, guarantee=guarantee)

    def remove(self, start: Started, records: Records, request: Request, rng: Generator) -> Unlearned:
        if start.guarantee is None:
            raise Unsupported("a private training comes with its guarantee, and this one has none")
        return covered(start.trained, start.guarantee, records, request)


def _head(wish: Wish) -> Way:
    method = NewtonHead(budget=wish.budget, sigma=NewtonHead.sigma if wish.sigma is None else wish.sigma)
    return Way(recipe=wish.convex, method=method, demand=wish.demand())


def _descent(wish: Wish) -> Way:
    _softmax_only(wish, "its steps must lead to the only optimum there is")
    share = wish.rows / (wish.held - wish.all_rows)  # of what is left in the end: never less than a request's share
    method = DescentToDelete(budget=wish.budget, share=min(1.0, share), radius=wish.radius)
    return Way(recipe=wish.convex, method=method, demand=wish.demand())


def _rewind(wish: Wish) -> Way:
    _softmax_only(wish, "nobody can prove how smooth a network's loss is, which its bound needs")
    decay = wish.convex.weight_decay
    recipe = replace(
        wish.convex,
        batch_size=wish.held,
        optimiser="sgd",
        optimiser_args={"lr": 2 / (wish.length**2 / 2 + 2 * decay)},  # the longest step that no softmax model stretches
        schedule={"kind": "constant"},
        epochs=_FULL_BATCH_STEPS,
        dtype="float64",
    )
    steps = _FULL_BATCH_STEPS * 99 // 100
    return Way(
        recipe=recipe,
        method=RewindToDelete(budget=wish.budget, steps=steps, share=wish.all_rows / wish.held, radius=wish.radius),
        keep=Keep(every=_FULL_BATCH_STEPS - steps),
        demand=wish.demand(
            f"full batch: sgd without momentum, {_FULL_BATCH_STEPS} steps on all rows, float64, with a checkpoint"
        ),
    )


def _fine_tune(wish: Wish) -> Way:
    polish = max(1, min(ClippedFineTune.polish, wish.recipe.epochs))
    return Way(recipe=wish.recipe, method=ClippedFineTune(budget=wish.budget, polish=polish), noise="steps")


def _clipped_models(wish: Wish) -> Way:
    polish = max(1, min(ClippedModelFineTune.polish, wish.recipe.epochs))
    return Way(recipe=wish.recipe, method=ClippedModelFineTune(budget=wish.budget, polish=polish), noise="steps")


def _softmax_only(wish: Wish, why: str) -> None:
    if wish.recipe.model != "softmax" or wish.recipe.loss != "cross_entropy":
        raise Unsupported(f"never possible for such a model: {why}; it is for softmax models")


def _newton(wish: Wish) -> Way:
    _softmax_only(wish, "nobody can prove how smooth a network's loss is, which its bound needs")
    classes = int(wish.recipe.model_args["outputs"])
    # No minimum is longer than this, so that it lies inside, which the bound needs.
    inside = 1.01 * math.sqrt(2 * math.log(max(classes, 2)) / wish.convex.weight_decay)
    radius = wish.recipe.max_norm or float(f"{inside:.3g}")
    return Way(
        recipe=replace(wish.convex, max_norm=radius),
        method=NewtonUnlearning(budget=wish.budget, feature_radius=wish.feature_length),
        demand=wish.demand(
            f"weights kept in a ball by training: max_norm {radius:g}" if wish.recipe.max_norm is None else ""
        ),
    )


def _guo(wish: Wish) -> Way:
    """With the smallest sigma, of powers of two, that the worst case allows."""
    _softmax_only(wish, _CONVEX)
    recipe = replace(wish.convex, dtype="float64")
    left, sigma = wish.held - wish.all_rows, 1.0
    while sigma < _LARGEST_SIGMA:
        method = GuoRemoval(
            sigma=sigma, feature_radius=wish.feature_length, rows=left, removals=wish.all_rows, budget=wish.budget
        )
        if _promises(method, recipe):
            return _fitted(wish, recipe, method)
        sigma *= 2
    raise Unsupported(
        f"no sigma keeps the worst case of {wish.all_rows:,} removals of {wish.held:,} rows within the budget at "
        f"weight_decay {recipe.weight_decay:g}; more weight_decay or rows would, or fewer removals"
    )


def _promises(method: GuoRemoval, recipe: Recipe) -> bool:
    try:
        method.guarantee_for(recipe, build(recipe))
    except Misuse:
        return False
    return True


def _guo_paper(wish: Wish) -> Way:
    _softmax_only(wish, _CONVEX)
    method = GuoRemoval(bound="paper", feature_radius=wish.feature_length, budget=wish.budget)
    recipe = replace(wish.convex, dtype="float64")
    return _fitted(wish, recipe, method)


def _fitted(wish: Wish, recipe: Recipe, method: GuoRemoval) -> Way:
    own = "training by GuoRemoval.fit, whose objective has a random linear term"
    return _Fitted(recipe=recipe, method=method, guo=method, demand=wish.demand(own), noise="training")


def _private(wish: Wish) -> Way:
    return _Private(
        recipe=wish.recipe,
        budget=wish.budget,
        group=wish.all_rows,
        demand=f"private training (DP-SGD) for a group of {wish.all_rows:,} rows",
        noise="training",
    )


_CONVEX = "its perturbed objective must have one minimum"

WAYS: Mapping[str, Callable[[Wish], Way]] = MappingProxyType(
    {
        "newton-head": _head,
        "descent-to-delete": _descent,
        "rewind-to-delete": _rewind,
        "clipped-fine-tune": _fine_tune,
        "clipped-model-fine-tune": _clipped_models,
        "newton-unlearning": _newton,
        "guo-removal": _guo,
        "guo-removal-paper": _guo_paper,
        "private-training": _private,
    }
)
"""From a wish to the way that would be gone; one that cannot be gone raises with the reason, here or when tried."""

FREE_SIGMA = frozenset({"newton-head"})
"""Ways for which any sigma keeps to the budget, as the cap is fitted to it."""
