"""Models of real digits that are trained once, and requests that were picked in bad faith."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from expunge import Recipe, Records, Sharding, Trained, train
from expunge.calculus import FisherDual, row_gradients
from expunge.core.coins import child, generator
from expunge.screen import Asked, Scene
from expunge.testing.case import digits

RECIPES = {
    "mlp": Recipe(model="mlp", epochs=20, batch_size=32),
    "softmax": Recipe(model="softmax", epochs=30, batch_size=32, weight_decay=1e-3),
    "shards": replace(Recipe(model="softmax", epochs=5, batch_size=32), sharding=Sharding(shards=3)),
}


@cache
def records() -> Records:
    """480 digits of 40 owners, all labelled rightly."""
    return digits(careless=0).records


@cache
def unseen() -> Records:
    """Digits that no model was trained on."""
    return digits(careless=0).test


@cache
def trained(kind: str = "mlp") -> Trained:
    """A model of all records."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(RECIPES[kind], records())


@cache
def scene(kind: str = "mlp") -> Scene:
    """The model as screens see it."""
    return Scene(trained(kind), records())


@cache
def picked(kind: str = "mlp", size: int = 20, targets: int = 20) -> tuple[Asked, ...]:
    """For each random target the rows whose removal is predicted to raise its loss most: one-shot influence."""
    here = scene(kind)
    x, y = next(here.batches(here.rows, 1000))
    fisher = FisherDual(row_gradients(here.objective, x, y), 0.1)
    order = torch.randperm(len(unseen()), generator=child(generator(7), "targets"))
    wanted = unseen().select(order[: 2 * targets])
    xt, yt = next(here.batches(wanted, 1000))
    with torch.no_grad():
        right = (here.module(xt).argmax(1) == yt).nonzero().flatten()[:targets]

    def rows_for(target: int) -> Tensor:
        gradient = here.objective.gradient(xt[target : target + 1], yt[target : target + 1])
        return here.objective.scores(x, y, fisher.solve(gradient)).topk(size).indices

    return tuple(Asked.of(records(), here.members[rows_for(target)]) for target in right.tolist())
