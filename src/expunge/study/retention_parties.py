"""Who is judged where it is asked what a cheat retains, and the honest retraining of as many steps beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Generator, nn

from expunge.attack.providers_retraining import RetrainingAdversary
from expunge.attack.selectors import GreedyMatching, LastLayerNeighbour, RandomOfM, Selector
from expunge.attack.selectors_nearest import NearestNeighbour
from expunge.core.coins import child
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import Tally, fit
from expunge.learn.training import train
from expunge.verify.states import Stepper


@dataclass(frozen=True, kw_only=True, eq=False)
class Removal:
    """One seed's removal of one group of rows.

    Attributes:
        records: all rows.
        retain: those that stay.
        forgotten: those to forget.
        original: the model that was trained on all rows, with this seed's coins.
        rng: names the coins of whoever answers.
    """

    records: Records
    retain: Records
    forgotten: Records
    original: Trained
    rng: Generator

    @property
    def recipe(self) -> Recipe:
        """How the original was trained."""
        return self.original.recipe

    @property
    def steps(self) -> int:
        """That a training on all rows makes."""
        return steps_in_epoch(self.recipe, self.records) * self.recipe.epochs


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The model that somebody serves after a removal.

    Attributes:
        module: in evaluation mode.
        steps: of stochastic gradient descent that were made from the initial weights.
        match: steps of the honest retraining that it is compared with.
    """

    module: nn.Module
    steps: int
    match: int


Party = Callable[[Removal], Answer]


def honest_retrain(recipe: Recipe, retain: Records, steps: int, tally: Tally | None = None) -> Answer:
    """Honest retraining on the rows that stay, stopped after exactly so many steps, within an epoch if need be.

    With the steps of the recipe's own epochs it is `expunge.train` to the bit. The learning rate is constant.
    """
    recipe = recipe.completed(retain)
    module = build(recipe).to(retain.device)
    epochs = math.ceil(steps / steps_in_epoch(recipe, retain))
    log = fit(module, recipe, retain, epochs=epochs, steps=steps, tally=tally)
    return Answer(module=module.eval(), steps=log.steps, match=steps)


def steps_in_epoch(recipe: Recipe, records: Records) -> int:
    """Batches of one pass over these rows."""
    return math.ceil(len(records) / recipe.batch_size)


@dataclass(kw_only=True, eq=False)
class CountingAdversary(RetrainingAdversary):
    """The retraining adversary, which counts its steps.

    Attributes:
        steps: made so far.
    """

    steps: int = field(default=0, init=False)

    def _before_telling(self, step: int, stepper: Stepper, stays: Records) -> None:
        self.steps = step


def _original(removal: Removal) -> Answer:
    return Answer(module=removal.original.module, steps=removal.steps, match=removal.steps)


def _honest(removal: Removal) -> Answer:
    steps = steps_in_epoch(removal.recipe, removal.retain) * removal.recipe.epochs
    return Answer(module=train(removal.recipe, removal.retain).module, steps=steps, match=removal.steps)


def _other_coins(removal: Removal) -> Answer:
    seed = child(removal.rng, "other coins").initial_seed() >> 1
    return honest_retrain(replace(removal.recipe, seed=seed), removal.retain, removal.steps)


def retraining(selector: Selector, reuse: bool = True) -> Party:
    """The retraining adversary with this selector."""

    def answer(removal: Removal) -> Answer:
        adversary = CountingAdversary(trained=removal.original, records=removal.records, selector=selector, reuse=reuse)
        request = Request.remove(removal.forgotten.ids)
        served = adversary.unlearn(request, rng=child(removal.rng, "adversary"))
        return Answer(module=served.module, steps=adversary.steps, match=adversary.steps)

    return answer


YARDSTICKS: Mapping[str, Party] = MappingProxyType(
    {"original": _original, "honest retrain": _honest, "honest retrain, other coins": _other_coins}
)
"""Whose figures say how to read those of the others: all is retained; nothing is, in fewer steps; chance."""

PARTIES: Mapping[str, Party] = MappingProxyType(
    {
        **YARDSTICKS,
        "retraining, random of M": retraining(RandomOfM(candidates=10)),
        "retraining, nearest row": retraining(NearestNeighbour()),
        "retraining, last layer": retraining(LastLayerNeighbour()),
        "retraining, last layer, each once": retraining(LastLayerNeighbour(), reuse=False),
        "retraining, greedy": retraining(GreedyMatching()),
    }
)
