"""Engines: order, purity and errors; and that no engine can change what is trained."""

import pickle
import random

import pytest
import torch

from expunge.core.coins import generator
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.learn.engine import LOCAL, LocalEngine
from expunge.learn.loop import Tally
from expunge.learn.shards import retrain_shards
from expunge.learn.training import train

pytestmark = pytest.mark.filterwarnings("ignore::expunge.learn.shards.ShardWarning")


def test_local_gives_every_item_once_in_order():
    assert list(LOCAL.map(lambda item, shared: item * shared, [3, 1, 2], 10)) == [(0, 30), (1, 10), (2, 20)]
    assert list(LocalEngine().map(lambda item, shared: item, iter(()), None)) == []


def test_local_works_when_asked_and_not_before():
    done = []
    running = LOCAL.map(lambda item, shared: done.append(item), iter("ab"), None)
    assert done == []
    next(running)
    assert done == ["a"]


def test_local_hands_over_the_very_objects_and_changes_none():
    item, shared = [1], {"a": 1}
    ((_, result),) = LOCAL.map(lambda i, s: (i, s), [item], shared)
    assert result[0] is item
    assert result[1] is shared
    assert (item, shared) == ([1], {"a": 1})


def test_errors_pass_through_and_nothing_is_tried_again():
    tries = []

    def work(item, shared):
        tries.append(item)
        if item == 2:
            raise KeyError("lost")
        return item

    running = LOCAL.map(work, [1, 2, 3], None)
    assert next(running) == (0, 1)
    with pytest.raises(KeyError, match=r"lost"):
        next(running)
    assert tries == [1, 2]


class Faraway:
    """An engine that sends items and results through bytes, loses answers, works twice, and answers in any order."""

    def map(self, function, items, shared):
        sent = [pickle.dumps((function, item, shared)) for item in items]
        answers = []
        for index, message in enumerate(sent):
            for _ in range(2):
                work, item, everywhere = pickle.loads(message)  # noqa: S301 -- its own bytes
                answer = pickle.dumps(work(item, everywhere))
            answers.append((index, pickle.loads(answer)))  # noqa: S301 -- its own bytes
        random.Random(0).shuffle(answers)
        yield from answers


def test_no_engine_changes_the_bytes():
    records = Records(
        torch.randn(60, 3, generator=generator(0)), [i % 2 for i in range(60)], owners=[f"o{i % 9}" for i in range(60)]
    )
    recipe = Recipe(model="softmax", epochs=2, sharding=Sharding(shards=4, slices=2, salt="s"))
    near, far = train(recipe, records), train(recipe, records, engine=Faraway())
    assert near.digest() == far.digest()
    assert [part.ids for part in near.parts] == [part.ids for part in far.parts]
    retain, tally = records.without(["0"]), Tally()
    touched = {recipe.sharding.shard_of("o0"): 0}
    again = [retrain_shards(t, retain, touched, engine=e, tally=tally) for t, e in ((near, LOCAL), (far, Faraway()))]
    assert again[0].digest() == again[1].digest() == train(recipe, retain).digest()
    assert tally.rows_read > 0
