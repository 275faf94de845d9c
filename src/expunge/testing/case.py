"""The real data and the removal that methods are tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TypeAlias

import torch
from sklearn.datasets import load_digits

from expunge.core.coins import child, generator
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained

Train: TypeAlias = Callable[[Recipe, Records], Trained]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Rows, recipes and one removal whose forgetting can be seen. Models are trained once and remembered.

    Attributes:
        records: the training rows.
        test: rows that no model is trained on; one of them serves as the record that was never trained on.
        recipes: tried in order; a method is tried on the first that it supports.
        request: the removal. It should be of rows that retraining answers otherwise than the trained model does: of
            rows that are like all others nearly nothing is to be seen, and no method can be told from standing still.
    """

    records: Records
    test: Records
    recipes: tuple[Recipe, ...]
    request: Request
    _models: dict[tuple[Train, Recipe, bool], Trained] = field(default_factory=dict, repr=False)

    @cached_property
    def forget(self) -> Records:
        """The rows that the request names."""
        return self.records.take(self.request.named(self.records))

    @cached_property
    def retain(self) -> Records:
        """All others."""
        return self.records.without(self.forget.ids)

    def model(self, train: Train, recipe: Recipe, *, without_forgotten: bool = False) -> Trained:
        """A private copy of the model trained on all rows, or on the retained ones only."""
        key = (train, recipe, without_forgotten)
        if key not in self._models:
            self._models[key] = train(recipe, self.retain if without_forgotten else self.records)
        return private_copy(self._models[key])


def private_copy(trained: Trained, seen: dict[int, object] | None = None) -> Trained:
    """The same model in storage of its own; a sharded one still shares its parts' modules with the aggregate."""
    seen = {} if seen is None else seen
    module = copy.deepcopy(trained.module, seen)
    log = trained.log
    if log is not None:
        slices = tuple({name: t.clone() for name, t in state.items()} for state in log.slices)
        steps = {step: {name: t.clone() for name, t in state.items()} for step, state in log.checkpoints.items()}
        log = replace(log, slices=slices, checkpoints=steps)
    return replace(trained, module=module, log=log, parts=tuple(private_copy(part, seen) for part in trained.parts))


@cache
def digits(*, rows: int = 480, owners: int = 40, careless: int = 4) -> Case:
    """480 handwritten digits (8 x 8, of the 1,797 that scikit-learn carries) of 40 owners, four of whom mislabel.

    The request removes everything of those four: the trained model has learnt their wrong labels in part, and a model
    trained without them answers most of their rows rightly. Owners are dealt at random, as the source names no writers.
    """
    source = load_digits()
    order = torch.randperm(len(source.target), generator=child(generator(0), "case"))
    x = torch.as_tensor(source.data, dtype=torch.float32)[order] / 16
    y = torch.as_tensor(source.target, dtype=torch.int64)[order]
    owner = torch.randint(owners, (rows,), generator=child(generator(0), "owners"))
    wrong = owner < careless
    shift = torch.randint(1, 10, (rows,), generator=child(generator(0), "wrong labels"))
    labels = torch.where(wrong, (y[:rows] + shift) % 10, y[:rows])
    names = [f"owner-{number:02d}" for number in owner.tolist()]
    records = Records(x[:rows], labels, [f"row-{row:03d}" for row in range(rows)], names, classes=10)
    test = Records(x[rows:], y[rows:], [f"test-{row:03d}" for row in range(len(x) - rows)], classes=10)
    whole = Recipe(model="mlp", epochs=30, batch_size=32)
    return Case(
        records=records,
        test=test,
        recipes=(whole, replace(whole, sharding=Sharding(shards=4, slices=2, aggregate="mean"))),
        request=Request.remove([name for name, bad in zip(records.ids, wrong.tolist(), strict=True) if bad]),
    )
