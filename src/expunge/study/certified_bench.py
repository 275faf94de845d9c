"""The models that certified methods are tried on: each trained once, and the rows that its requests name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from expunge.audit import accuracy
from expunge.certify.accountant import Budget
from expunge.core.coins import generator, seed_of
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import NOTHING, warm_up
from expunge.learn.training import train
from expunge.study.certified_ways import WAYS, Started, Way, Wish
from expunge.unlearn.retrain import RetrainBriefly

LATER = 5
"""Requests after the first that are tried at most."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What plans and sweeps are of.

    Attributes:
        recipe: the user's, of a single model.
        rows: rows that a request removes at most.
        radius: see `Wish`.
        methods: words of `WAYS`.
        draws: of the noise, or whole runs of a method that adds noise on its way, for each accuracy.
        seed: of the choice of rows, and of all else but the noise.
        trained: a model by the recipe on the records, to be used where the recipe is the user's as it is; None: train.
    """

    recipe: Recipe
    rows: int = 1
    radius: float | None = None
    methods: Sequence[str] = tuple(WAYS)
    draws: int = 10
    seed: int = 0
    trained: Trained | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 2:
            raise Misuse(f"draws must be an integer >= 2, got {self.draws}; a mean of one draw has no interval")
        unknown = [name for name in self.methods if name not in WAYS]
        if unknown or not self.methods:
            got = f'"{unknown[0]}"' if unknown else "none"
            raise Misuse(f"methods are {', '.join(WAYS)}, got {got}")


class Bench:
    """Real removals of random rows, for one setting and its seed; every model is trained once, when it is needed."""

    def __init__(self, setting: Setting, records: Records, test: Records) -> None:
        self.setting, self.records, self.test = setting, records, test
        records.digests()
        self.recipe = setting.recipe.completed(records)
        if setting.trained is not None and setting.trained.ids != frozenset(records.ids):
            raise Misuse("the model is not of exactly these records; leave it out, and one is trained")
        self._originals: dict[str, Trained] = {}
        self._references: dict[Recipe, tuple[Trained, float]] = {}

    def wish(self, budget: Budget, sigma: float | None = None) -> Wish:
        """What is asked of every way."""
        held, one = len(self.records), self.setting
        return Wish(recipe=self.recipe, held=held, rows=one.rows, budget=budget, radius=one.radius, sigma=sigma)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The rows of each request that is tried, drawn by a hash of seed and id."""
        drawn = sorted(self.records.ids, key=lambda one: (seed_of("certified", self.setting.seed, one), one))
        rows = self.setting.rows
        return tuple(tuple(drawn[k * rows : (k + 1) * rows]) for k in range(1 + LATER))

    def start(self, way: Way) -> Started:
        """The model that the way's requests are about; only plain trainings are shared between ways."""
        if type(way) is not Way or way.keep != NOTHING:
            return way.train(self.records)
        key = way.recipe.digest()
        if key not in self._originals:
            given = self.setting.trained
            same = given is not None and given.recipe == way.recipe
            self._originals[key] = given if same and given is not None else way.train(self.records).trained
        return Started(trained=self._originals[key])

    def reference(self, recipe: Recipe) -> tuple[Trained, float]:
        """Exact retraining without the first request's rows, and its seconds."""
        if recipe not in self._references:
            rest = self.records.without(self.groups[0])
            warm_up()
            started = time.perf_counter()
            trained = train(recipe, rest)
            self._references[recipe] = (trained, time.perf_counter() - started)
        return self._references[recipe]

    def accuracy(self, trained: Trained) -> float:
        """On the test rows."""
        return accuracy(trained, self.test).value

    def early(self, seconds: float | None) -> float | None:
        """Accuracy of retraining by the user's recipe that stops after so long."""
        full, whole = self.reference(self.recipe)
        if seconds is None or full.log is None:
            return None
        steps = max(1, round(full.log.steps * seconds / whole))
        if steps >= full.log.steps:
            return self.accuracy(full)
        brief = RetrainBriefly(steps=steps)
        request = Request.remove(self.groups[0])
        start = self.start(Way(recipe=self.recipe)).trained
        return self.accuracy(brief(start, self.records, request, rng=generator(self.setting.seed)).trained)
