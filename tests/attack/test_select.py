"""Selected deletions come near the best there are, by exact retraining that knows nothing of the code under test."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from expunge import Recipe, Request, generator, train
from expunge.attack import Queries, SelectRequests, Surrogate, White, victims
from expunge.attack.aim import margin, pick_targets
from expunge.attack.knowledge import Wish
from expunge.attack.reaction import Reaction
from expunge.attack.select import How, capped_simplex
from expunge.attack.victim import Victim
from expunge.core.errors import Misuse
from expunge.core.protocols import Target
from expunge.core.recipe import Sharding
from expunge.learn.loop import prepare
from expunge.testing.case import digits
from expunge.unlearn import GradientAscent, Retrain
from tests.attack.oracles import adversary, problem, retrained, softmax_model, with_bias

PROBLEMS, ROWS, COUNT, DECAY = 12, 14, 3, 5e-2


@cache
def gains(seed: int) -> tuple[dict[frozenset[str], float], float]:
    """Of all 364 sets of 3 rows the share of the best one's gain that its deletion has, and the median of them."""
    records, target = problem(seed, classes=2 + seed % 2)
    sets = list(itertools.combinations(range(ROWS), COUNT))
    weights = np.ones((len(sets) + 1, ROWS))
    for row, chosen in enumerate(sets):
        weights[row, list(chosen)] = 0
    t = retrained(with_bias(records.x), records.y.numpy(), weights, classes=records.classes or 0, decay=DECAY)
    losses = adversary(t, target)
    share = (losses[-1] - losses[:-1]) / (losses[-1] - losses[:-1].min())
    named = {frozenset(records.ids[row] for row in chosen): float(one) for chosen, one in zip(sets, share, strict=True)}
    return named, float(np.median(share))


def asked(seed: int, **about: Any) -> frozenset[str]:
    records, target = problem(seed, classes=2 + seed % 2)
    attack = SelectRequests(count=COUNT, **about)
    (request,) = attack.requests(softmax_model(records), records, target, through=Retrain(), rng=generator(0))
    return frozenset(request.ids)


@pytest.mark.parametrize(("how", "least"), [("greedy", 0.95), ("relaxed", 0.95), ("one-shot", 0.6)])
def test_a_selection_comes_near_the_best_of_all_sets(how: How, least: float) -> None:
    reached = []
    for seed in range(PROBLEMS):
        named, median = gains(seed)
        reached.append(named[asked(seed, how=how, steps=3)])
        assert reached[-1] >= median
    assert np.mean(reached) >= least


def test_rows_of_the_wrong_sign_would_not_pass() -> None:
    reached = []
    for seed in range(PROBLEMS):
        records, target = problem(seed, classes=2 + seed % 2)
        (victim,) = victims(softmax_model(records), records, target, Retrain())
        worst = victim.settled.effects(target).argsort(descending=True)[:COUNT]
        reached.append(gains(seed)[0][frozenset(records.ids[row] for row in worst.tolist())])
    assert np.mean(reached) < 0


def test_a_relaxed_selection_is_never_worse_than_the_others_by_the_models_own_loss() -> None:
    for seed in (1, 4):
        named, _ = gains(seed)
        relaxed = named[asked(seed, how="relaxed", steps=3)]
        assert relaxed >= max(named[asked(seed, how="greedy")], named[asked(seed, how="one-shot")]) - 1e-9


@pytest.mark.parametrize("total", [0.0, 0.4, 3.0, 9.0, 10.0])
def test_the_projection_is_the_nearest_point_of_the_capped_simplex(total: float) -> None:
    v = torch.randn(10, generator=generator(1), dtype=torch.float64) * 2
    found = capped_simplex(v, total)
    mu = brentq(lambda mu: float((v - mu).clamp(0, 1).sum()) - total, -10, 10, xtol=1e-14) if 0 < total < 10 else None
    truth = torch.full_like(v, total / 10) if mu is None else (v - mu).clamp(0, 1)
    assert torch.allclose(found, truth, atol=1e-9)
    assert float(found.sum()) == pytest.approx(total, abs=1e-9)
    for seed in range(20):  # no other point of the set is nearer
        other = torch.rand(10, generator=generator(seed), dtype=torch.float64)
        other = capped_simplex(other * 3, total)
        assert float((other - v).norm()) >= float((found - v).norm()) - 1e-9


def test_clipping_and_scaling_is_no_projection() -> None:
    v = torch.tensor([2.0, 0.9, 0.6, -1.0], dtype=torch.float64)
    naive = v.clamp(0, 1) * 2 / v.clamp(0, 1).sum()
    assert float((capped_simplex(v, 2.0) - v).norm()) < float((naive - v).norm())


def test_a_total_that_no_point_has_is_refused() -> None:
    with pytest.raises(Misuse, match="cannot sum"):
        capped_simplex(torch.zeros(3), 4.0)


@pytest.mark.parametrize("how", ["one-shot", "greedy", "relaxed"])
def test_just_so_many_rows_of_its_own_are_asked_for_and_the_coins_decide(how: How) -> None:
    records, target = problem(5, n=20)
    owned = frozenset(records.ids[::2])
    attack = SelectRequests(count=7, how=how, rounds=3, steps=3, owned=owned, stealth=0.5)
    trained = softmax_model(records)
    filed = [attack.requests(trained, records, target, through=Retrain(), rng=generator(4)) for _ in range(2)]
    ((one,), (same,)) = filed
    assert one.ids == same.ids
    assert len(set(one.ids)) == 7
    assert set(one.ids) <= owned
    assert list(one.ids) == sorted(one.ids, key=records.ids.index)
    assert one.kind == "remove"
    assert attack.contribute(records, target, rng=generator(0)) is None


def test_a_share_is_of_the_rows_that_the_model_stands_on() -> None:
    records, target = problem(5, n=20)
    trained = softmax_model(records.select(range(10)))
    attack = SelectRequests(share=0.3, how="one-shot")
    (request,) = attack.requests(trained, records, target, through=Retrain(), rng=generator(0))
    assert len(request.ids) == 3
    assert set(request.ids) <= trained.ids


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"count": 0}, "asks for nothing"),
        ({"count": -1}, "asks for nothing"),
        ({"count": True}, "asks for nothing"),
        ({"share": 0.0}, "between 0 and 1"),
        ({"share": 1.0}, "between 0 and 1"),
        ({}, "one of them"),
        ({"count": 1, "share": 0.1}, "one of them"),
        ({"count": 1, "how": "lucky"}, "how must be"),
        ({"count": 1, "rounds": 0}, "rounds and steps"),
        ({"count": 1, "stealth": -1.0}, "stealth"),
        ({"count": 1, "knowledge": Queries()}, "queries do not give"),
    ],
)
def test_an_attack_that_cannot_be_meant_is_refused(about: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse, match=said):
        SelectRequests(**about)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"count": 14}, "all that the model stands on"),
        ({"count": 15}, "may ask about 14"),
        ({"count": 3, "owned": frozenset({"1", "2"})}, "may ask about 2"),
        ({"share": 0.01}, "is none"),
    ],
)
def test_a_budget_that_the_rows_cannot_meet_is_refused(about: dict[str, Any], said: str) -> None:
    records, target = problem(5)
    with pytest.raises(Misuse, match=said):
        SelectRequests(**about).requests(
            softmax_model(records), records, target, through=Retrain(), rng=generator(0)
        )  # fmt: skip


def test_a_target_of_another_shape_is_refused_and_one_that_is_reached_is_not() -> None:
    records, target = problem(5)
    trained = softmax_model(records)
    attack = SelectRequests(count=2, how="one-shot")
    with pytest.raises(Misuse, match="shape"):
        attack.requests(trained, records, Target(x=torch.zeros(1, 9), y=target.y), through=Retrain(), rng=generator(0))
    reached = Target(x=target.x, y=1 - target.y)
    assert float(margin(trained.module(target.x).detach(), reached)) > 0
    assert attack.requests(trained, records, reached, through=Retrain(), rng=generator(0))


def test_queries_give_the_inner_product_of_gradients_of_a_softmax_regression() -> None:
    records, target = problem(6, n=30, classes=3)
    trained = softmax_model(records)
    exact = Victim.of(trained, records, Retrain(), reaction=Reaction(order="first"))
    for one in (target, Target(x=target.x, y=target.y, wanted=(target.y + 1) % 3)):
        wish = Wish(target=one, beta=0.3, kept=(records.x[:4], records.y[:4]))
        found = Queries().effects(trained, records, wish)
        truth = exact.along(wish.gradient(exact))
        assert torch.allclose(found, truth, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(Queries(kernel="gaussian").effects(trained, records, wish), truth, rtol=0.1)
    assert Queries().cost(trained, target) == 31


@pytest.mark.parametrize("knowledge", [White(), Surrogate(share=0.5), Surrogate(recipe=Recipe(model="mlp")), Queries()])
def test_a_selection_harms_under_exact_retraining_more_than_chance_whatever_is_known(knowledge: Any) -> None:
    case = digits()
    trained = train(Recipe(model="softmax", epochs=20, weight_decay=1e-3), case.records)
    targets = pick_targets(trained, case.test, 3, rng=generator(1))
    attack = SelectRequests(count=40, how="one-shot", knowledge=knowledge)
    lead = []
    for number, target in enumerate(targets):
        (request,) = attack.requests(trained, case.records, target, through=Retrain(), rng=generator(0))
        drawn = torch.randperm(len(case.records), generator=generator(number))[:40].tolist()
        by_chance = Request.remove([case.records.ids[row] for row in drawn])
        after = [Retrain()(trained, case.records, one, rng=generator(0)).trained for one in (request, by_chance)]
        seen = prepare(target.x, torch.float32)
        planned, chance = (float(margin(one.module(seen).detach(), target)) for one in after)
        lead.append(planned - chance)
    assert min(lead) > 0


def test_shards_and_first_order_unlearners_are_planned_for() -> None:
    records, target = problem(8, n=40, classes=3)
    sharded = softmax_model(records, sharding=Sharding(shards=3, aggregate="mean"))
    for knowledge in (White(), Surrogate(share=0.8)):
        attack = SelectRequests(count=5, how="relaxed", steps=2, rounds=2, knowledge=knowledge)
        (request,) = attack.requests(sharded, records, target, through=Retrain(), rng=generator(0))
        assert len(request.ids) == 5
    trained = softmax_model(records)
    attack = SelectRequests(count=5, how="one-shot")
    through = GradientAscent(lr=0.1, epochs=1)
    (request,) = attack.requests(trained, records, target, through=through, rng=generator(0))
    (victim,) = victims(trained, records, target, through)
    lowest = victim.along(victim.loss_gradient(target)).argsort()[:5].tolist()
    assert set(request.ids) == {records.ids[row] for row in lowest}


def test_a_surrogate_of_no_rows_is_refused() -> None:
    with pytest.raises(Misuse, match="share"):
        Surrogate(share=0.0)
    with pytest.raises(Misuse, match="linear or gaussian"):
        Queries(kernel="square")  # type: ignore[arg-type]
