"""What an attacker knows: the model itself, one like it that it trained, or only what the served model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.attack.aim import adversarial_loss, check_target
from expunge.attack.remembered import victims
from expunge.attack.victim import Victim
from expunge.core.coins import child, generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Method, Target
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import prepare
from expunge.learn.predict import evaluating
from expunge.learn.training import train

_BATCH = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Wish:
    """What an attacker brings down: the adversary's loss, plus `beta` times the mean loss of rows to be spared.

    Attributes:
        target: what it is after.
        beta: weight of the other rows; 0: it does not care who notices.
        kept: (rows as the model reads them, labels).
    """

    target: Target
    beta: float = 0.0
    kept: tuple[Tensor, Tensor] | None = None

    def loss(self, victim: Victim) -> Tensor:
        """Of the victim as it is."""
        loss = victim.loss(self.target)
        return loss if self.kept is None else loss + self.beta * victim.objective.losses(*self.kept).mean()

    def gradient(self, victim: Victim) -> Float[Tensor, " p"]:
        """By the parameters."""
        gradient = victim.loss_gradient(self.target)
        if self.kept is None:
            return gradient
        return gradient + self.beta / len(self.kept[1]) * victim.objective.gradient(*self.kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Victims seen as one: the rows of all of them, one after the other, and the mean of their losses.

    Attributes:
        victims: one, or one a shard.
    """

    victims: tuple[Victim, ...]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The rows, in the order of all that is said of them here."""
        return tuple(name for one in self.victims for name in one.records.ids)

    @cached_property
    def labels(self) -> Tensor:
        """Of the rows."""
        return torch.cat([one.records.y for one in self.victims])

    @property
    def retrains(self) -> bool:
        """Whether refits are what exact retraining gives; see `Victim.retrains`."""
        return all(one.retrains for one in self.victims)

    def loss(self, wish: Wish) -> float:
        """The attacker's loss, a mean over shards."""
        return float(sum(one.share * wish.loss(one) for one in self.victims))

    def effects(self, wish: Wish) -> Float[Tensor, " n"]:
        """By how much each row's leaving changes that loss, to first order. Cost: a solve and a pass a victim."""
        return torch.cat([one.share * one.along(one.answer(wish.gradient(one))) for one in self.victims])

    @cached_property
    def settled(self) -> Plan:
        """The plan at the minimum of every victim's training objective, where it is convex; else the plan itself."""
        return Plan(victims=tuple(one.settled for one in self.victims))

    def refit(self, weights: Float[Tensor, " n"]) -> Plan:
        """The plan after retraining with these weights of the rows; shards whose weights stay are left as they are."""
        pieces = weights.split([len(one.records) for one in self.victims])
        return Plan(victims=tuple(_refit(one, some) for one, some in zip(self.victims, pieces, strict=True)))


def _refit(victim: Victim, weights: Tensor) -> Victim:
    before = torch.ones_like(weights) if victim.weights is None else victim.weights.to(weights)
    # In float32 a plan need not be better than what training by steps leaves undone, and takes half the passes.
    tolerance = 1e-4 if victim.dtype == torch.float32 else None
    return victim if torch.equal(before, weights) else victim.refit(weights, tolerance=tolerance)


@dataclass(frozen=True, kw_only=True)
class White:
    """The attacker holds the model and the rows.

    Attributes:
        curvature_rows: rows that the curvature is a mean over; None: all.
    """

    refits: ClassVar[bool] = True
    curvature_rows: int | None = 4096

    def plan(self, trained: Trained, records: Records, target: Target, through: Method) -> Plan:
        """What it plans on. Cost: nothing yet; see `victims` for what is remembered."""
        return Plan(victims=victims(trained, records, target, through, curvature_rows=self.curvature_rows))


_SURROGATES: WeakKeyDictionary[Records, dict[tuple[Surrogate, Recipe, frozenset[str]], Trained]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The attacker holds rows and no model: it trains one of its own on a share of them, and plans on that.

    It weighs all rows by its own model, also those that it did not train on, and expects all shards of a sharded model
    to be one. Of a softmax regression `relaxed` and `greedy` selection refit it on all rows: then what it does not know
    of the model is only where training stopped.

    Attributes:
        recipe: what it believes that the model is; None: the true recipe, with coins of its own and no shards.
        share: of the rows, that it trains on.
        seed: its coins.
        curvature_rows: see `White`.
    """

    refits: ClassVar[bool] = True
    recipe: Recipe | None = None
    share: float = 0.5
    seed: int = 0
    curvature_rows: int | None = 4096

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise Misuse(f"a surrogate's share of the rows must be above 0 and at most 1, got {self.share}")

    def model(self, recipe: Recipe, records: Records) -> Trained:
        """Its own model; remembered while the records live. Cost: a training on `share` of the rows.

        Raises:
            Misuse: if the share is no row.
        """
        recipe = self.recipe or recipe
        recipe = replace(recipe, sharding=None, seed=child(generator(self.seed), "surrogate").initial_seed() >> 1)
        known = _SURROGATES.setdefault(records, {})
        key = (self, recipe, frozenset(records.ids))
        if key not in known:
            some = records
            if self.share < 1:
                some = records.split(self.share, child(generator(self.seed), "surrogate", "rows"))[0]
            if not len(some):
                raise Misuse(f"a share of {self.share} of {len(records)} rows is none; give more")
            known[key] = train(recipe, some)
        return known[key]

    def plan(self, trained: Trained, records: Records, target: Target, through: Method) -> Plan:
        """What it plans on."""
        check_target(target, records)
        known = _PLANNED.setdefault(trained, WeakKeyDictionary()).setdefault(records, {})
        if self not in known:
            mine = records.where(lambda record_id, _: record_id in trained.ids)
            known[self] = replace(self.model(trained.recipe, mine), ids=trained.ids)
        return Plan(victims=victims(known[self], records, target, through, curvature_rows=self.curvature_rows))


_PLANNED: WeakKeyDictionary[Trained, WeakKeyDictionary[Records, dict[Surrogate, Trained]]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Queries:
    r"""The attacker holds rows and may ask the served model for its outputs; it knows neither its kind nor parameters.

    It takes :math:`\langle p_i - e_{y_i}, \partial L/\partial z_t\rangle k(x_i, x_t)` for the effect of row i on
    target t, where p are the answered probabilities and z the outputs. With the linear kernel :math:`x\cdot x' + 1`
    that is, for a softmax regression, exactly the inner product of the two gradients: what first-order unlearning does
    per unit of rate. It knows no curvature, so of retraining it is a guess.

    Attributes:
        kernel: ``linear``, or ``gaussian`` of the distance in units of the median distance to the target.
    """

    refits: ClassVar[bool] = False
    kernel: Literal["linear", "gaussian"] = "linear"

    def __post_init__(self) -> None:
        if self.kernel not in ("linear", "gaussian"):
            raise Misuse(f'a kernel is linear or gaussian, got "{self.kernel}"')

    def cost(self, trained: Trained, target: Target) -> int:
        """Rows that it asks the model about: each that the model stands on, and the target's."""
        return len(trained.ids) + len(target.x)

    def effects(self, trained: Trained, records: Records, wish: Wish) -> Float[Tensor, " n"]:
        """Of all rows that the model stands on, in the records' order, in no unit. Cost: see `cost`."""
        check_target(wish.target, records)
        effect = self.effect_of(trained, wish)
        return torch.cat([effect(x, y) for x, y in _rows(trained, records, next(trained.module.parameters()).dtype)])

    def effect_of(self, trained: Trained, wish: Wish) -> Callable[[Tensor, Tensor], Float[Tensor, " n"]]:
        """The effect of any rows, as the model reads them, with their labels; each costs a query."""
        module, dtype = trained.module, next(trained.module.parameters()).dtype
        seen, sloped = (torch.cat(some) for some in zip(*_aims(module, wish, dtype), strict=True))

        def effect(x: Tensor, y: Tensor) -> Tensor:
            slopes = torch.softmax(_asked(module, x), 1)
            slopes[torch.arange(len(y)), y] -= 1
            return ((slopes @ sloped.T) * self._kernel(x.flatten(1), seen)).sum(1)

        return effect

    def _kernel(self, x: Tensor, aims: Tensor) -> Tensor:
        if self.kernel == "linear":
            return x @ aims.T + 1
        away = torch.cdist(x, aims).square()
        return torch.exp(-away / (2 * away.median().clamp_min(1e-12)))


def _asked(module: nn.Module, x: Tensor) -> Tensor:
    with evaluating(module), torch.no_grad():
        answer: Tensor = module(x)
    return answer


def _aims(module: nn.Module, wish: Wish, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows whose loss is to change, flat, and the derivative of the wish by their outputs."""
    x = prepare(wish.target.x, dtype)
    out = _asked(module, x).requires_grad_()
    yield x.flatten(1), torch.autograd.grad(adversarial_loss(out, wish.target), out)[0]
    if wish.kept is not None:
        x, y = wish.kept
        slopes = torch.softmax(_asked(module, x), 1)
        slopes[torch.arange(len(y)), y] -= 1
        yield x.flatten(1), wish.beta / len(y) * slopes


def _rows(trained: Trained, records: Records, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    held = torch.tensor([place for place, name in enumerate(records.ids) if name in trained.ids])
    for x, y in records.batches(held.split(_BATCH)):
        yield prepare(x, dtype), y


Knowledge = White | Surrogate | Queries
