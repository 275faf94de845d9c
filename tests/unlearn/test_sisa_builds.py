"""Sisa keeps the bytes of a training: under the thread count of that training, and never across builds."""

from dataclasses import replace

import pytest

from expunge import Recipe, Request, Sisa, Unsupported, datasets, generator, train
from expunge.core.trained import Trained
from expunge.learn.loop import threads


def _digest(recipe: Recipe, records: object, count: int) -> str:
    with threads(count):
        return train(recipe, records, shards=2).digest()  # type: ignore[arg-type]


def test_retrains_with_the_threads_of_the_first_training() -> None:
    records = datasets.mnist(owners=20).train.select(range(1500))
    recipe = Recipe(model="mlp", epochs=2)
    who = records.owners[0]
    rest = records.without(records.of_owner(who).ids)
    scratch = {count: _digest(recipe, rest, count) for count in (1, 2)}
    assert scratch[1] != scratch[2], "the test needs a training whose bytes depend on the thread count"
    for first, now in ((1, 2), (2, 1)):
        with threads(first):
            trained = train(recipe, records, shards=2)
        with threads(now):
            answer = Sisa()(trained, records, Request.remove_owner(who), rng=generator(0))
        assert answer.trained.digest() == scratch[first]


def test_refuses_shards_of_another_build() -> None:
    records = datasets.optdigits(owners=20).train.select(range(300))
    trained = train(Recipe(model="softmax", epochs=1), records, shards=2)
    foreign = tuple(_built_elsewhere(part) for part in trained.parts)
    with pytest.raises(Unsupported, match=r"torch 1.0 abacus, and this is torch .*; use retrain"):
        Sisa()(replace(trained, parts=foreign), records, Request.remove_owner(records.owners[0]), rng=generator(0))


def _built_elsewhere(part: Trained) -> Trained:
    assert part.log is not None
    return replace(part, log=replace(part.log, build="torch 1.0 abacus"))
