"""Backdoor cleansing: plant a trigger, train, unlearn the poisoned rows, and see who still obeys it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Generator

from expunge.audit.metrics import accuracy
from expunge.core.coins import child, generator, order
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, mean
from expunge.core.protocols import Method
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.training import train
from expunge.learn.triggers import Trigger, attack_floor, attack_success, poison

SPARSITIES = (0.0, 0.75, 0.9, 0.95, 0.99)
BEFORE, RETRAIN = "before", "retrain"


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """What is planted.

    Attributes:
        trigger: the patch.
        target: the class that stamped images shall be taken for.
        share: of the training rows of other classes, how many are stamped and mislabelled.
    """

    trigger: Trigger = field(default_factory=Trigger)
    target: int = 0
    share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one model does; intervals are over test images of this one model, not over seeds.

    Attributes:
        model: ``before``, ``retrain`` or a method's name.
        test: accuracy on clean test images.
        attack: share of stamped test images of other classes that it takes for the target class.
        floor: share of the same images, not stamped, that it takes for the target class.
        seconds: of wall time, to make it from the model before; for that and for ``retrain`` the training.
    """

    model: str
    test: Estimate
    attack: Estimate
    floor: Estimate
    seconds: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        """The reading whose `asdict` this is."""
        shares = {name: Estimate.from_json(data[name]) for name in ("test", "attack", "floor")}
        return cls(model=data["model"], seconds=data["seconds"], **shares)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One seed at one sparsity.

    Attributes:
        sparsity: share of the prunable weights that are zero; 0 is a dense model.
        seed: of training, of which rows are poisoned, and of the methods' coins.
        poisoned: rows that were poisoned, all of which are then removed.
        readings: of the model before, of exact retraining, and of each method's result.
    """

    sparsity: float
    seed: int
    poisoned: int
    readings: tuple[Reading, ...]

    def __getitem__(self, model: str) -> Reading:
        for reading in self.readings:
            if reading.model == model:
                return reading
        raise Misuse(f'the cell has no "{model}"; it has {", ".join(one.model for one in self.readings)}')

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that `to_json` wrote."""
        readings = tuple(Reading.from_json(one) for one in data["readings"])
        return cls(sparsity=data["sparsity"], seed=data["seed"], poisoned=data["poisoned"], readings=readings)


@dataclass(frozen=True, kw_only=True)
class Cleansing:
    """All cells of a study of one backdoor."""

    backdoor: Backdoor
    cells: tuple[Cell, ...]

    def summary(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One line for each sparsity and model: means over seeds with Student's t intervals.

        `attack_gap` and `test_gap` are differences to exact retraining of the same seed and sparsity, and
        `attack_against_dense` to the same model of the same seed at sparsity 0, where that was measured: below zero,
        sparsity helped. Paired by seed.
        """
        sparsities = list(dict.fromkeys(cell.sparsity for cell in self.cells))
        models = list(dict.fromkeys(one.model for cell in self.cells for one in cell.readings))
        return [self._line(sparsity, model, level) for sparsity in sparsities for model in models]

    def _line(self, sparsity: float, model: str, level: float) -> dict[str, Any]:
        cells = [cell for cell in self.cells if cell.sparsity == sparsity]
        dense = {cell.seed: cell[model] for cell in self.cells if not cell.sparsity}
        pairs = [(cell[model], cell[RETRAIN]) for cell in cells]
        values = {name: [getattr(one, name).value for one, _ in pairs] for name in ("test", "attack", "floor")}
        values |= {
            "seconds": [one.seconds for one, _ in pairs],
            "attack_gap": [one.attack.value - other.attack.value for one, other in pairs],
            "test_gap": [one.test.value - other.test.value for one, other in pairs],
        }
        if sparsity and all(cell.seed in dense for cell in cells):
            both = [(cell[model], dense[cell.seed]) for cell in cells]
            values["attack_against_dense"] = [one.attack.value - other.attack.value for one, other in both]
        figures = {name: mean(numbers, level) for name, numbers in values.items()}
        return {"sparsity": sparsity, "model": model, "seeds": len(cells), **figures}

    def to_json(self) -> dict[str, Any]:
        """Backdoor, cells and summary as plain JSON values."""
        summary = [
            {name: value.to_json() if isinstance(value, Estimate) else value for name, value in line.items()}
            for line in self.summary()
        ]
        cells = [cell.to_json() for cell in self.cells]
        return {"backdoor": asdict(self.backdoor), "cells": cells, "summary": summary}


@dataclass(frozen=True, kw_only=True, eq=False)
class Infected:
    """A model with a backdoor, and the rows that it learnt it from.

    Attributes:
        trained: the model.
        records: the rows that it was trained on, the poisoned ones among them.
        poisoned: their ids.
        backdoor: what was planted.
        seconds: of training.
    """

    trained: Trained
    records: Records
    poisoned: tuple[str, ...]
    backdoor: Backdoor
    seconds: float

    def unlearn(self, method: Method, *, rng: Generator, reads: int | None = None) -> tuple[Trained, float]:
        """The model after the method removed the poisoned rows, and the seconds that it took.

        Args:
            method: any.
            rng: names the coins, those of which rows may be read too.
            reads: of the retained rows, let the method see only so many, drawn at random, whatever the
                order of the rows: the budget of a quick method. None: all of them.
        """
        trained, records = self.trained, self.records
        if reads is not None:
            clean = records.without(self.poisoned)
            if not 0 < reads <= len(clean):
                raise Misuse(f"reads must be from 1 to {len(clean):,} retained rows, got {reads}")
            drawn = order(clean.keys, rng.initial_seed(), "reads")[:reads]
            records = records.take([*self.poisoned, *clean.select(torch.from_numpy(drawn)).ids])
            trained = replace(trained, ids=frozenset(records.ids), seal=None)
        started = time.perf_counter()
        after = method(trained, records, Request.remove(self.poisoned), rng=rng).trained
        return after, time.perf_counter() - started

    def retrain(self) -> tuple[Trained, float]:
        """Exact retraining without the poisoned rows; a pruned model's mask is found anew."""
        started = time.perf_counter()
        trained = train(self.trained.recipe, self.records.without(self.poisoned))
        return trained, time.perf_counter() - started


def infect(recipe: Recipe, records: Records, backdoor: Backdoor, *, seed: int) -> Infected:
    """Poison the rows and train on them, with this seed for both."""
    rows, poisoned = poison(
        records, backdoor.trigger, backdoor.target, backdoor.share, child(generator(seed), "backdoor")
    )
    started = time.perf_counter()
    trained = train(replace(recipe, seed=seed), rows)
    seconds = time.perf_counter() - started
    return Infected(trained=trained, records=rows, poisoned=poisoned, backdoor=backdoor, seconds=seconds)


def read(trained: Trained, test: Records, backdoor: Backdoor, *, model: str, seconds: float = 0.0) -> Reading:
    """What this model does on clean and on stamped test images. Cost: two forward passes of the test rows."""
    return Reading(
        model=model,
        test=accuracy(trained, test),
        attack=attack_success(trained, test, backdoor.trigger, backdoor.target),
        floor=attack_floor(trained, test, backdoor.target),
        seconds=seconds,
    )


def at_sparsity(recipe: Recipe, sparsity: float, by: Literal["magnitude", "synflow", "random"] = "synflow") -> Recipe:
    """The recipe, pruned to this sparsity; 0 is dense. A recipe that says how to prune keeps all but its sparsity."""
    if not sparsity:
        return replace(recipe, pruning=None)
    pruning = Pruning(sparsity=sparsity, by=by) if recipe.pruning is None else recipe.pruning
    return replace(recipe, pruning=replace(pruning, sparsity=sparsity))


def cleanse_once(
    infected: Infected,
    test: Records,
    methods: Mapping[str, Method],
    *,
    reads: int | None = None,
    reference: tuple[Trained, float] | None = None,
) -> Cell:
    """One cell: the infected model, exact retraining (`reference`, if it is there already), and each method's result.

    Methods at the same seed have coins of their own name, so that adding one changes no other.
    """
    recipe, backdoor = infected.trained.recipe, infected.backdoor
    results = {BEFORE: (infected.trained, infected.seconds), RETRAIN: reference or infected.retrain()}
    for name, method in methods.items():
        if name in results:
            raise Misuse(f'a method may not be called "{name}": that is another line of the table; rename it')
        results[name] = infected.unlearn(method, rng=child(generator(recipe.seed), "cleanse", name), reads=reads)
    return Cell(
        sparsity=0.0 if recipe.pruning is None else recipe.pruning.sparsity,
        seed=recipe.seed,
        poisoned=len(infected.poisoned),
        readings=tuple(
            read(model, test, backdoor, model=name, seconds=seconds) for name, (model, seconds) in results.items()
        ),
    )


def cleanse(
    recipe: Recipe,
    records: Records,
    test: Records,
    methods: Mapping[str, Method],
    *,
    backdoor: Backdoor | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Sequence[int] = (0, 1, 2),
    reads: int | None = None,
    report: Callable[[Cell], None] | None = None,
) -> Cleansing:
    """Plant a backdoor, and measure how well each method removes it at each sparsity, beside exact retraining.

    Args:
        recipe: of the model; its `pruning`, if any, says how it is made sparse, else SynFlow does.
        records: clean training images.
        test: clean test images with their true labels.
        methods: by the names that the table shall have.
        backdoor: what is planted; None: the default one.
        sparsities: of the models; with 0 among them, the others are compared with the dense model.
        seeds: at least two, as the spread over seeds is what the intervals are of.
        reads: see `Infected.unlearn`.
        report: told each cell when it is finished.

    Returns:
        Attack success and test accuracy before and after. That a method closes the backdoor says nothing of other
        traces that the poisoned rows left.

    Cost: two trainings a sparsity and seed (by magnitude: two times `rounds` + 1), and the methods.
    """
    if len(set(seeds)) != len(seeds) or len(seeds) < 2 or not sparsities:
        raise Misuse(f"give at least two different seeds and one sparsity, got {list(seeds)} and {list(sparsities)}")
    backdoor, cells = backdoor or Backdoor(), []
    for seed in seeds:
        for sparsity in sparsities:
            infected = infect(at_sparsity(recipe, sparsity), records, backdoor, seed=seed)
            cells.append(cleanse_once(infected, test, methods, reads=reads))
            if report is not None:
                report(cells[-1])
    return Cleansing(backdoor=backdoor, cells=tuple(cells))
