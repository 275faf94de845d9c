"""What dear requests cost, beside random ones of the same size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge
from expunge import Recipe, Request, Retrain, Sharding, Sisa, generator
from expunge.attack.slow_down import SlowDown, longest_sum, solved, stage_costs
from expunge.attack.victim import Victim
from expunge.certify.accountant import Budget
from expunge.certify.guo import GuoRemoval
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.testing.case import digits

SOFTMAX = Recipe(model="softmax", epochs=4, weight_decay=1e-2, dtype="float64")
SHARDED = replace(SOFTMAX, sharding=Sharding(shards=4, slices=3))


@pytest.fixture(scope="module")
def sharded() -> Any:
    return expunge.train(SHARDED, digits().records)


def gradients(trained: Any, request: Request) -> int:
    cost = Sisa()(trained, digits().records, request, rng=generator(0)).cost
    return cost.gradients


def random_rows(count: int, seed: int) -> Request:
    drawn = torch.randperm(len(digits().records), generator=child(generator(seed), "control"))[:count]
    return Request.remove([digits().records.ids[i] for i in drawn.tolist()])


def test_one_owner_of_each_shard_has_everything_trained_again_from_the_start(sharded: Any) -> None:
    (request,) = SlowDown(budget=4).requests(sharded, digits().records, None, through=Sisa(), rng=generator(0))
    done = Sisa()(sharded, digits().records, request, rng=generator(0))
    again = [event for event in done.events if isinstance(event, expunge.core.events.Retrained)]
    assert sorted(event.part for event in again) == [0, 1, 2, 3]
    assert {event.from_slice for event in again} == {0}
    controls = [gradients(sharded, random_rows(4, seed)) for seed in range(4)]
    assert done.cost.gradients > 1.3 * sum(controls) / len(controls)


def test_the_predicted_price_is_the_work_that_is_done(sharded: Any) -> None:
    records = digits().records
    costs = stage_costs(records, sharded)
    request = Request.remove([records.ids[0]])
    home = SHARDED.completed(records).sharding
    owner = records.owners[0]
    price = costs[home.shard_of(owner)][home.slice_of(owner)]
    stages = 3 - home.slice_of(owner)
    epochs = 2  # of each slice: 2 * 4 epochs / (3 slices + 1)
    assert gradients(sharded, request) == price - stages * epochs  # the row that left is read no more


def test_single_requests_go_to_the_dearest_shard(sharded: Any) -> None:
    asked = SlowDown(budget=3, together=False).requests(
        sharded, digits().records, None, through=Sisa(), rng=generator(0)
    )
    assert [len(one.ids) for one in asked] == [1, 1, 1]
    dearest = max(max(row) for row in stage_costs(digits().records, sharded))
    home = sharded.recipe.sharding
    for one in asked:
        (owner,) = digits().records.take(one.ids).owners
        assert stage_costs(digits().records, sharded)[home.shard_of(owner)][home.slice_of(owner)] == dearest


def test_without_the_salt_owners_are_random_and_distinct(sharded: Any) -> None:
    blind = SlowDown(budget=8, knows_salt=False)
    (one,) = blind.requests(sharded, digits().records, None, through=Sisa(), rng=generator(0))
    assert len(set(digits().records.take(one.ids).owners)) == 8
    (other,) = blind.requests(sharded, digits().records, None, through=Sisa(), rng=generator(1))
    (again,) = blind.requests(sharded, digits().records, None, through=Sisa(), rng=generator(0))
    assert one.ids == again.ids
    assert one.ids != other.ids
    many = SlowDown(budget=60, knows_salt=False)
    (most,) = many.requests(sharded, digits().records, None, through=Sisa(), rng=generator(0))
    assert len(set(digits().records.take(most.ids).owners)) == 40


def test_the_rows_that_move_the_parameters_furthest_are_asked_for() -> None:
    records = digits().records
    trained = expunge.train(replace(SOFTMAX, epochs=20), records)
    victim = Victim.of(trained, records, Retrain())
    norms = solved(victim, *victim.rows).norm(dim=1)
    asked = SlowDown(budget=5, together=False, candidates=480).requests(
        trained, records, None, through=Retrain(), rng=generator(0)
    )
    assert [one.ids[0] for one in asked] == [victim.records.ids[i] for i in norms.argsort(descending=True)[:5].tolist()]
    (together,) = SlowDown(budget=5).requests(trained, records, None, through=Retrain(), rng=generator(0))
    moves = solved(victim, *victim.rows)

    def length(ids: tuple[str, ...]) -> float:
        return float(moves[victim.records.positions(ids)].sum(0).norm())

    assert length(together.ids) >= length(tuple(one.ids[0] for one in asked))
    assert length(together.ids) > 3 * length(random_rows(5, 0).ids)


def test_a_certified_budget_is_used_up_sooner() -> None:
    records = digits().records
    longest = float((records.x.flatten(1).double().square().sum(1) + 1).sqrt().max())
    method = GuoRemoval(bound="paper", feature_radius=longest, sigma=5.0, budget=Budget(epsilon=1e3, delta=0.1))
    fitted = method.fit(replace(SOFTMAX, epochs=1), records)

    def left_over(request: Request) -> float:
        return float(method(fitted, records, request, rng=generator(0)).trained.secret[".residual"])

    (asked,) = SlowDown(budget=5).requests(fitted, records, None, through=method, rng=generator(0))
    assert left_over(asked) > 3 * max(left_over(random_rows(5, seed)) for seed in range(3))


def test_only_what_the_attacker_owns_is_asked_for(sharded: Any) -> None:
    owned = frozenset(["owner-07", "owner-09"])
    (one,) = SlowDown(budget=3, owned=owned).requests(sharded, digits().records, None, through=Sisa(), rng=generator(0))
    assert set(digits().records.take(one.ids).owners) <= owned


def test_the_longest_sum_is_found_greedily() -> None:
    moves = torch.tensor([[3.0, 0.0], [-2.9, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert longest_sum(moves, 2) == [0, 3]  # not the second longest, which would undo the first


def test_what_cannot_be_meant_is_refused(sharded: Any) -> None:
    with pytest.raises(Misuse, match="budget must be >= 1, got 0"):
        SlowDown(budget=0)
    with pytest.raises(Misuse, match="owns nothing"):
        SlowDown(owned=frozenset())
    with pytest.raises(Misuse, match="lower the budget"):
        SlowDown(budget=480).requests(sharded, digits().records, None, through=Sisa(), rng=generator(0))
    whole = expunge.train(replace(SOFTMAX, epochs=1), digits().records.select(range(60)))
    with pytest.raises(Misuse, match="without shards"):
        stage_costs(digits().records, whole)
    assert SlowDown().contribute(digits().records, None, rng=generator(0)) is None
