"""What dear requests cost, beside random ones of the same size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge
from expunge import Recipe, Request, Retrain, Sharding, Sisa, generator
from expunge.attack import solves as solves_room
from expunge.attack import victim as victim_room
from expunge.attack.slow_down import SlowDown, lengths, longest_sum, longest_sum_again, stage_costs
from expunge.attack.solves import Solves
from expunge.attack.victim import Victim
from expunge.certify.accountant import Budget
from expunge.certify.guo import GuoRemoval
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.testing.case import digits

SOFTMAX = Recipe(model="softmax", epochs=4, weight_decay=1e-2, dtype="float64")
SHARDED = replace(SOFTMAX, sharding=Sharding(shards=4, slices=3))


def solved(victim: Victim, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One row after the other: the oracle."""
    return torch.stack([victim.solve(gradient) for gradient in victim.objective.gradients(x, y)])


def by_hand(victim: Victim, attack: SlowDown) -> list[str]:
    """The rows that the attack must ask for, by loops over single rows."""
    x, y = victim.rows
    sizes = victim.objective.gradients(x, y).norm(dim=1)
    few = sizes.argsort(descending=True, stable=True)[: max(attack.candidates, attack.budget)].tolist()
    moves = solved(victim, x[few], y[few])
    total, chosen = torch.zeros_like(moves[0]), list[int]()
    for _ in range(attack.budget):
        gains = {i: float((total + moves[i]).norm()) for i in range(len(few)) if i not in chosen}
        chosen.append(max(gains, key=lambda i: gains[i]))
        total = total + moves[chosen[-1]]
    if not attack.together:
        chosen = moves.norm(dim=1).argsort(descending=True, stable=True)[: attack.budget].tolist()
    return [victim.records.ids[few[i]] for i in chosen]


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
    moves = solved(victim, *victim.rows)
    norms = moves.norm(dim=1)
    asked = SlowDown(budget=5, together=False, candidates=480).requests(
        trained, records, None, through=Retrain(), rng=generator(0)
    )
    assert [one.ids[0] for one in asked] == [victim.records.ids[i] for i in norms.argsort(descending=True)[:5].tolist()]
    (together,) = SlowDown(budget=5).requests(trained, records, None, through=Retrain(), rng=generator(0))

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


@pytest.fixture(scope="module")
def trained_network() -> Any:
    recipe = Recipe(model="mlp", model_args={"hidden": [6]}, epochs=4, dtype="float64")
    return expunge.train(recipe, digits().records.select(range(80)))


@pytest.fixture
def network(trained_network: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network whose curvature counts as too large to be factored, and of which a sketch knows a part only."""
    for module in (solves_room, victim_room):
        monkeypatch.setattr(module, "_DENSE", 10)
    monkeypatch.setattr(solves_room, "_RANK", 40)
    assert sum(one.numel() for one in trained_network.module.parameters()) > 200
    return trained_network


@pytest.mark.parametrize(
    ("which", "together", "kept"),
    [
        ("softmax", True, 1 << 26),
        ("softmax", False, 1 << 26),
        ("network", True, 1 << 26),
        ("network", True, 1),
        ("network", False, 1 << 26),
    ],
)
def test_what_is_asked_for_is_what_a_loop_over_single_rows_finds(
    which: str, together: bool, kept: int, network: Any
) -> None:
    records = digits().records
    trained = network if which == "network" else expunge.train(replace(SOFTMAX, epochs=2), records)
    attack = SlowDown(budget=4, candidates=10, together=together, kept=kept)
    asked = attack.requests(trained, records, None, through=Retrain(), rng=generator(0))
    victim = Victim.of(trained, records, Retrain())
    assert [one for request in asked for one in request.ids] == by_hand(victim, attack)


def test_systems_solved_together_are_solved_as_each_is_alone(network: Any) -> None:
    victim = Victim.of(network, digits().records, Retrain())
    x, y = (one[:12] for one in victim.rows)
    right = victim.objective.gradients(x, y)
    solves = Solves(victim=victim, tolerance=1e-8, block=5)
    found = torch.cat(list(solves.of_gradients(x, y)))
    assert [len(one) for one in solves.of_gradients(x, y)] == [5, 5, 2]
    left = torch.stack([victim.curvature(one) + victim._unit * one for one in found]) - right
    assert float((left.norm(dim=1) / right.norm(dim=1)).max()) < 1e-7
    alone = solved(victim, x, y)
    assert float(((found - alone).norm(dim=1) / alone.norm(dim=1)).max()) < 1e-2  # the loop's tolerance is 1e-3
    stopped = Solves(victim=victim, most=1)(right)
    assert float(((stopped - alone).norm(dim=1) / alone.norm(dim=1)).max()) > 1e-2


def test_a_block_of_systems_takes_fewer_products_than_they_do_one_by_one(network: Any) -> None:
    victim = Victim.of(network, digits().records, Retrain())
    right = victim.objective.gradients(*(one[:8] for one in victim.rows))
    counted = [0, 0]

    class Counting(Solves):
        def products(self, vectors: torch.Tensor) -> torch.Tensor:
            counted[0] += len(vectors)
            return super().products(vectors)

    solves = Counting(victim=victim)
    solves(right[:1])
    sketch, counted[0] = counted[0], 0
    solves(right)
    for one in right:
        product = expunge.calculus.conjugate_gradients(
            victim.curvature, one, damping=1.0, unit=victim._unit, tolerance=1e-3, most=300
        )
        counted[1] += product.iterations
    assert sketch < 60
    assert counted[0] < 0.7 * counted[1]


def test_lengths_of_gradients_are_those_of_single_rows(network: Any) -> None:
    victim = Victim.of(network, digits().records, Retrain())
    x, y = victim.rows
    assert torch.allclose(lengths(victim, x, y), victim.objective.gradients(x, y).norm(dim=1), rtol=1e-9)


def test_sums_made_again_are_those_kept(network: Any) -> None:
    victim = Victim.of(network, digits().records, Retrain())
    x, y = (one[:15] for one in victim.rows)
    solves = Solves(victim=victim, tolerance=1e-8)
    kept = longest_sum(torch.cat(list(solves.of_gradients(x, y))), 5)
    assert longest_sum_again(solves, x, y, 5) == kept
    assert kept != torch.cat(list(solves.of_gradients(x, y))).norm(dim=1).argsort(descending=True)[:5].tolist()


def test_how_much_is_kept_is_no_part_of_what_a_study_is_known_by() -> None:
    assert repr(SlowDown(budget=3, kept=7)) == repr(SlowDown(budget=3))
