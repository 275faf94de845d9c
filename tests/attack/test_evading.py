"""An attacker that knows the screen: what it gets through, what it cannot, and how often it asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import expunge
from expunge import Recipe, Request, Retrain, Sisa, generator
from expunge.attack.aim import pick_targets
from expunge.attack.camouflage import Camouflage
from expunge.attack.evading import Evading
from expunge.attack.sequential import SequentialRequests
from expunge.attack.strangers import Strangers
from expunge.attack.victim import Victim
from expunge.attack.wares import halved, offered, predicted_effects
from expunge.core.errors import Misuse
from expunge.core.protocols import Judgement, Target
from expunge.testing.case import digits

SOFTMAX = Recipe(model="softmax", epochs=10, weight_decay=1e-2, dtype="float64")


@dataclass(frozen=True, kw_only=True)
class Decision:
    action: str
    hold: bool
    judgements: Mapping[str, tuple[Judgement, ...]]
    p_values: Mapping[str, float]


@dataclass
class Norms:
    """Stops requests whose mean gradient norm, or whose size, is out of the ordinary."""

    largest: float
    most: int = 10**9
    calls: int = 0
    seeds: Any = None

    def __call__(self, trained: Any, records: Any, request: Request, *, rng: torch.Generator) -> Decision:
        self.calls += 1
        if self.seeds is not None:
            self.seeds.append(rng.initial_seed())
        victim = Victim.of(trained, records, Retrain())
        asked = records.take(request.ids)
        norms = victim.objective.gradients(asked.x.double(), asked.y).norm(dim=1).tolist()
        stopped = sum(norms) / len(norms) > self.largest or len(norms) > self.most
        judged = tuple(
            Judgement(record=i, score=s, flagged=False, reason="") for i, s in zip(asked.ids, norms, strict=True)
        )
        value = 0.01 if stopped else 0.5
        return Decision(
            action="exact" if stopped else "carry out",
            hold=stopped,
            judgements={"norm": judged},
            p_values={"norm": value},
        )


@pytest.fixture(scope="module")
def trained() -> Any:
    return expunge.train(SOFTMAX, digits().records)


@pytest.fixture(scope="module")
def target(trained: Any) -> Target:
    return pick_targets(trained, digits().test, 1, rng=generator(4))[0]


def search(attack: Evading, trained: Any, target: Target, seed: int = 0) -> Any:
    return attack.search(trained, digits().records, target, through=Retrain(), rng=generator(seed))


def test_a_screen_that_flags_nothing_lets_the_strongest_rows_through(trained: Any, target: Target) -> None:
    found = search(Evading(screening=Norms(1e9), budget=12, queries=40), trained, target)
    effects = predicted_effects(trained, digits().records, target, Retrain())
    assert found.promised <= sum(sorted(effects.values())[:12]) + 1e-12
    assert found.unscreened == pytest.approx(sum(sorted(effects.values())[:12]))


def test_a_screen_that_stops_everything_gets_nothing(trained: Any, target: Target) -> None:
    screen = Norms(-1.0)
    attack = Evading(screening=screen, budget=8, queries=50)
    found = search(attack, trained, target)
    assert found.requests == ()
    assert found.promised == 0.0
    assert found.trick == "nothing passed"
    assert 0 < found.queries == screen.calls <= 50
    assert attack.requests(trained, digits().records, target, through=Retrain(), rng=generator(0)) == ()


def test_cover_and_small_requests_get_through_what_the_plain_attack_does_not(trained: Any, target: Target) -> None:
    screen = Norms(2.6, most=10)
    effects = predicted_effects(trained, digits().records, target, Retrain())
    plain = Request.remove(sorted(effects, key=lambda name: effects[name])[:16])
    assert screen(trained, digits().records, plain, rng=generator(0)).action == "exact"
    found = search(Evading(screening=screen, budget=16, queries=150), trained, target)
    assert found.promised < 0.1 * found.unscreened < 0
    for request in found.requests:
        assert screen(trained, digits().records, request, rng=generator(9)).action == "carry out"
        assert len(request.ids) <= 10
    asked = [name for request in found.requests for name in request.ids]
    assert len(set(asked)) == len(asked)
    assert found.promised == pytest.approx(sum(effects[name] for name in asked))


def test_more_questions_never_promise_less(trained: Any, target: Target) -> None:
    screens = {"screening": Norms(2.6, most=10), "budget": 16}
    promised = [search(Evading(**screens, queries=q), trained, target).promised for q in (5, 40, 120)]
    assert promised[0] >= promised[1] >= promised[2]


def test_p_values_can_be_kept_above_a_line_and_each_question_has_its_own_coins(trained: Any, target: Target) -> None:
    seeds: list[int] = []
    screen = Norms(1e9, seeds=seeds)
    strict = Evading(screening=screen, budget=4, least=0.6, queries=20)
    assert search(strict, trained, target).requests == ()
    assert len(set(seeds)) == len(seeds) > 3
    twice = Evading(screening=screen, budget=4, confirm=2, queries=20)
    assert search(twice, trained, target).queries % 2 == 0
    again = search(twice, trained, target)
    assert [one.ids for one in again.requests] == [one.ids for one in search(twice, trained, target).requests]


def test_an_inner_attack_gives_the_rows(trained: Any, target: Target) -> None:
    inner = SequentialRequests(horizon=2, per_step=4, scenarios=1, rounds=1, benign=0, candidates=40)
    found = search(Evading(screening=Norms(1e9), budget=8, covers=(0.0,), inner=inner, queries=10), trained, target)
    asked = {name for request in found.requests for name in request.ids}
    assert len(asked) == 8
    records = digits().records
    with pytest.raises(Misuse, match="removals by id"):
        search(Evading(screening=Norms(1e9), inner=Strangers(count=3)), trained, target)
    assert Evading(screening=Norms(1e9)).contribute(records, target, rng=generator(0)) is None
    small = Camouflage(surrogate=SOFTMAX, poison=2, camouflage=2, steps=1, restarts=1)
    brought = Evading(screening=Norms(1e9), inner=small).contribute(records, target, rng=generator(0))
    assert len(brought) == 4


def test_replacements_are_spread_and_weakened_until_they_pass(trained: Any, target: Target) -> None:
    records = digits().records
    inner = SequentialRequests(horizon=1, per_step=8, kind="replace", eps=0.5, scenarios=1, rounds=2, benign=0)
    found = search(Evading(screening=Norms(1e9, most=9), budget=8, inner=inner, queries=12), trained, target)
    assert found.promised < 0
    for request in found.requests:
        assert request.kind == "replace"
        assert len(request.split(records, ids=trained.ids).added) == len(request.ids) <= 9
    filed = inner.requests(trained, records, target, through=Retrain(), rng=generator(0))
    plain = offered(trained, records, target, Retrain(), filed)
    victim, (request,) = Victim.of(trained, records, Retrain()), filed
    answer = victim.answer(victim.loss_gradient(target))
    whole = victim.objective.scores(records.take(request.ids).x.double(), request.y, answer)
    whole = whole - victim.objective.scores(request.x.double(), request.y, answer)
    assert [plain.effects[name] for name in request.ids] == pytest.approx(whole.tolist())
    half = halved(plain, trained, target, Retrain())
    for name, row in half.moved.items():
        middle = (plain.moved[name] + records.take([name]).x[0]) / 2
        torch.testing.assert_close(row, middle)


def test_shards_are_all_looked_at() -> None:
    records = digits().records
    sharded = expunge.train(SOFTMAX, records, shards=2)
    target = pick_targets(sharded, digits().test, 1, rng=generator(4))[0]
    effects = predicted_effects(sharded, records, target, Sisa())
    assert set(effects) == set(records.ids)


def test_what_cannot_be_meant_is_refused(trained: Any, target: Target) -> None:
    for wrong in ({"budget": 0}, {"queries": 0}, {"covers": ()}, {"covers": (-1.0,)}, {"least": 2.0}, {"confirm": 0}):
        with pytest.raises(Misuse):
            Evading(screening=Norms(1.0), **wrong)
    with pytest.raises(Misuse, match="leave some"):
        search(Evading(screening=Norms(1.0), budget=480), trained, target)
    with pytest.raises(Misuse, match="shape"):
        search(Evading(screening=Norms(1.0)), trained, Target(x=target.x[:, :3], y=target.y))
