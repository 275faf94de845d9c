"""Plans of requests: the adjoint against autograd through all steps, and what a horizon of one comes to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge
from expunge import Recipe, Retrain, generator
from expunge.attack.aim import pick_targets
from expunge.attack.course import Course, Plan, assigned
from expunge.attack.reaction import Reaction
from expunge.attack.sequential import SequentialRequests
from expunge.attack.victim import Victim
from expunge.core.errors import Misuse
from expunge.core.protocols import Target
from expunge.testing.case import digits
from expunge.unlearn import GradientAscent

MLP = Recipe(model="mlp", model_args={"hidden": (3,)}, epochs=3, weight_decay=1e-2, dtype="float64")
SOFTMAX = Recipe(model="softmax", epochs=6, weight_decay=1e-2, dtype="float64")


@pytest.fixture(scope="module")
def softmax() -> Any:
    return expunge.train(SOFTMAX, digits().records)


@pytest.fixture(scope="module")
def target(softmax: Any) -> Target:
    return pick_targets(softmax, digits().test, 1, rng=generator(3))[0]


def course_of(recipe: Recipe, order: str, **about: Any) -> tuple[Course, Target]:
    """Twelve candidates, three steps, two scenarios of two benign rows."""
    records = digits().records.select(range(40))
    trained = expunge.train(recipe, records)
    reaction = Reaction(order="first", rate=0.05) if order == "first" else Reaction(damping=1.0)
    victim = Victim.of(trained, records, Retrain(), reaction=reaction)
    x, y = victim.rows
    benign = [[(x[a : a + 2], y[a : a + 2]) for a in range(14 + 10 * s, 20 + 10 * s, 2)] for s in range(2)]
    start = victim.objective.vector()
    target = pick_targets(trained, digits().test, 1, rng=generator(1))[0]
    return Course(victim=victim, x=x[:12], y=y[:12], benign=benign, starts=[start, start], **about), target


def reaction_of(victim: Victim) -> torch.Tensor:
    """B, written out."""
    return torch.stack([victim.answer(row) for row in torch.eye(victim.objective.size, dtype=torch.float64)])


def unrolled(
    course: Course, target: Target, weights: torch.Tensor, moved: torch.Tensor | None, matrix: torch.Tensor
) -> torch.Tensor:
    """The value once more, as one graph through all steps."""
    objective, victim, total = course.victim.objective, course.victim, 0.0
    for scenario, start in enumerate(course.starts):
        theta, way = start.clone().requires_grad_(), []
        for step in range(len(weights)):
            loss = weights[step] @ objective.losses(course.x, course.y, theta)
            loss = loss + objective.losses(*course.benign[scenario][step], theta).sum()
            if moved is not None:
                loss = loss - weights[step] @ objective.losses(moved[step], course.y, theta)
            theta = theta + matrix @ torch.autograd.grad(loss, theta, create_graph=True)[0]
            way.append(victim.loss(target, theta))
        total = total + way[-1] + course.along * sum(way[:-1])
    return total / len(course.starts)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("recipe", [SOFTMAX, MLP], ids=["softmax", "mlp"])
def test_the_adjoint_equals_autograd_through_all_steps(recipe: Recipe, order: str) -> None:
    course, target = course_of(recipe, order, along=0.3)
    weights = torch.rand(3, 12, generator=generator(0), dtype=torch.float64).requires_grad_()
    moved = course.x + 0.2 * torch.rand(3, *course.x.shape, generator=generator(1), dtype=torch.float64)
    matrix = reaction_of(course.victim)
    for given in (None, moved.requires_grad_()):
        value = unrolled(course, target, weights, given, matrix)
        wanted = torch.autograd.grad(value, [weights] if given is None else [weights, given])
        plan = Plan(weights=weights.detach(), moved=None if given is None else given.detach())
        assert course.value(target, plan) == pytest.approx(float(value.detach()), rel=1e-12)
        got = course.weight_gradient(target, plan)
        assert (got - wanted[0]).norm() <= 1e-10 * wanted[0].norm()
        if given is not None:
            got = course.moved_gradient(target, plan)
            assert (got - wanted[1]).norm() <= 1e-10 * wanted[1].norm()


def test_an_adjoint_that_forgets_the_curvature_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    course, target = course_of(SOFTMAX, "second")
    weights = torch.rand(3, 12, generator=generator(0), dtype=torch.float64).requires_grad_()
    wanted = torch.autograd.grad(unrolled(course, target, weights, None, reaction_of(course.victim)), weights)[0]
    monkeypatch.setattr(Course, "_hessian_product", lambda self, scenario, step, at, plan, v: torch.zeros_like(v))
    got = course.weight_gradient(target, Plan(weights=weights.detach()))
    assert (got - wanted).norm() > 1e-3 * wanted.norm()


def test_more_scenarios_are_averaged() -> None:
    course, target = course_of(SOFTMAX, "second")
    plan = Plan(weights=torch.full((3, 12), 0.2, dtype=torch.float64))
    alone = [replace(course, benign=[course.benign[s]], starts=[course.starts[s]]) for s in range(2)]
    assert course.value(target, plan) == pytest.approx(sum(one.value(target, plan) for one in alone) / 2, rel=1e-12)
    mean = (alone[0].weight_gradient(target, plan) + alone[1].weight_gradient(target, plan)) / 2
    torch.testing.assert_close(course.weight_gradient(target, plan), mean, rtol=1e-12, atol=0)
    assert not torch.allclose(alone[0].weight_gradient(target, plan), alone[1].weight_gradient(target, plan))


def test_one_step_without_others_is_the_one_shot_influence_attack(softmax: Any, target: Target) -> None:
    records = digits().records
    victim = Victim.of(softmax, records, Retrain())
    effects = victim.effects(target)
    x, y = victim.rows
    nobody = [[(x[:0], y[:0])]]
    course = Course(victim=victim, x=x, y=y, benign=nobody, starts=[victim.objective.vector()])
    got = course.weight_gradient(target, Plan(weights=torch.zeros(1, len(y), dtype=torch.float64)))[0]
    torch.testing.assert_close(got, effects, rtol=1e-10, atol=1e-14)
    attack = SequentialRequests(horizon=1, per_step=7, rounds=1, benign=0, scenarios=1)
    (request,) = attack.requests(softmax, records, target, through=Retrain(), rng=generator(0))
    strongest = {victim.records.ids[i] for i in effects.argsort()[:7].tolist()}
    assert set(request.ids) == strongest


@pytest.mark.parametrize(
    ("recipe", "through"), [(SOFTMAX, Retrain()), (MLP, GradientAscent(lr=0.1))], ids=["softmax-retrain", "mlp-ascent"]
)
def test_planned_removals_promise_at_least_half_of_what_the_strongest_rows_do(recipe: Recipe, through: Any) -> None:
    records = digits().records
    trained = expunge.train(recipe, records)
    target = pick_targets(trained, digits().test, 1, rng=generator(2))[0]
    attack = SequentialRequests(horizon=3, per_step=4, scenarios=2, rounds=2, benign=2, candidates=40)
    requests = attack.requests(trained, records, target, through=through, rng=generator(5))
    assert [len(one.ids) for one in requests] == [4, 4, 4]
    asked = [name for one in requests for name in one.ids]
    assert len(set(asked)) == 12
    victim = Victim.of(trained, records, through)
    effects = dict(zip(victim.records.ids, victim.effects(target).tolist(), strict=True))
    assert sum(effects[name] for name in asked) < 0.5 * sum(sorted(effects.values())[:12])
    again = attack.requests(trained, records, target, through=through, rng=generator(5))
    assert [one.ids for one in again] == [one.ids for one in requests]


def test_removals_hit_under_exact_retraining_where_random_ones_do_not(softmax: Any) -> None:
    records, picked = digits().records, pick_targets(softmax, digits().test, 4, rng=generator(7))
    attack = SequentialRequests(horizon=3, per_step=12, scenarios=1, rounds=1, benign=3, candidates=120)
    loss = {"attack": 0.0, "random": 0.0}
    for number, target in enumerate(picked):
        asked = attack.requests(softmax, records, target, through=Retrain(), rng=generator(number))
        victim = Victim.of(softmax, records, Retrain())
        weights = torch.ones(len(records), dtype=torch.float64)
        start = victim.refit(weights).loss(target)
        weights[records.positions([name for one in asked for name in one.ids])] = 0
        loss["attack"] += float(victim.refit(weights).loss(target) - start)
        other = torch.ones(len(records), dtype=torch.float64)
        other[torch.randperm(len(records), generator=generator(number))[:36]] = 0
        loss["random"] += float(victim.refit(other).loss(target) - start)
    assert loss["attack"] < 5 * -abs(loss["random"])


def test_replacements_stay_within_their_radius_and_lower_the_loss(softmax: Any, target: Target) -> None:
    records = digits().records
    attack = SequentialRequests(
        horizon=2, per_step=5, kind="replace", eps=0.3, rounds=3, scenarios=1, benign=2, candidates=60
    )
    requests = attack.requests(softmax, records, target, through=Retrain(), rng=generator(0))
    victim = Victim.of(softmax, records, Retrain())
    change = 0.0
    for request in requests:
        old = records.take(request.ids)
        assert float((request.x - old.x).abs().max()) <= 0.3 + 1e-6
        assert float(request.x.min()) >= 0
        assert float(request.x.max()) <= 1
        answer = victim.answer(victim.loss_gradient(target))
        before = victim.objective.scores(old.x.double(), old.y, answer).sum()
        change += float(before - victim.objective.scores(request.x.double(), request.y, answer).sum())
    assert change < 0


def test_pixels_are_replaced_by_pixels_within_the_radius(softmax: Any) -> None:
    whole = digits().records.select(range(120))
    pixels = expunge.Records((whole.x * 255).to(torch.uint8), whole.y, whole.ids, whole.owners, classes=10)
    trained = expunge.train(SOFTMAX, pixels)
    target = Target(x=pixels.x[:1], y=pixels.y[:1], wanted=(pixels.y[:1] + 1) % 10)
    attack = SequentialRequests(horizon=1, per_step=3, kind="replace", eps=0.1, rounds=2, benign=0, candidates=20)
    (request,) = attack.requests(trained, pixels, target, through=Retrain(), rng=generator(0))
    assert request.x.dtype is torch.uint8
    apart = (request.x.int() - pixels.take(request.ids).x.int()).abs()
    assert 0 < int(apart.max()) <= 25
    with pytest.raises(Misuse, match="1/255"):
        replace(attack, eps=0.001).requests(trained, pixels, target, through=Retrain(), rng=generator(0))


def test_the_next_request_looks_at_the_real_state(softmax: Any, target: Target) -> None:
    records = digits().records
    attack = SequentialRequests(horizon=3, per_step=4, scenarios=1, rounds=1, benign=2, candidates=40)
    first = attack.next_request(softmax, records, target, through=Retrain(), left=3, rng=generator(0))
    planned = attack.requests(softmax, records, target, through=Retrain(), rng=generator(0))
    assert first.ids == planned[0].ids
    now = Retrain()(softmax, records, first, rng=generator(0)).trained
    second = attack.next_request(now, records, target, through=Retrain(), left=2, rng=generator(1))
    assert not set(first.ids) & set(second.ids)
    with pytest.raises(Misuse, match="horizon"):
        attack.next_request(now, records, target, through=Retrain(), left=0, rng=generator(1))


def test_shards_are_planned_together() -> None:
    records = digits().records
    trained = expunge.train(replace(MLP, model="softmax", model_args={}), records, shards=2)
    target = pick_targets(trained, digits().test, 1, rng=generator(2))[0]
    attack = SequentialRequests(horizon=2, per_step=6, scenarios=1, rounds=1, benign=2, candidates=60)
    requests = attack.requests(trained, records, target, through=expunge.Sisa(), rng=generator(0))
    homes = {trained.recipe.sharding.shard_of(owner) for one in requests for owner in records.take(one.ids).owners}
    assert homes == {0, 1}


def test_assignment_takes_each_row_once() -> None:
    costs = torch.tensor([[-3.0, -2.0, 0.0], [-4.0, -1.0, -0.5]])
    chosen = assigned(costs, torch.ones(3, dtype=torch.bool), 1)
    assert chosen.tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(Misuse, match="need 4"):
        assigned(costs, torch.ones(3, dtype=torch.bool), 2)


def test_what_cannot_be_meant_is_refused(softmax: Any, target: Target) -> None:
    records = digits().records
    for wrong in ({"horizon": 0}, {"per_step": 0}, {"benign": -1}, {"kind": "add"}, {"candidates": 3}, {"along": -1.0}):
        with pytest.raises(Misuse):
            SequentialRequests(**wrong)
    with pytest.raises(Misuse, match="eps"):
        SequentialRequests(kind="replace", eps=0.0)
    attack = SequentialRequests(horizon=100, per_step=5)
    with pytest.raises(Misuse, match="lower horizon"):
        attack.requests(softmax, records, target, through=Retrain(), rng=generator(0))
    outside = Target(x=target.x, y=torch.tensor([10]))
    with pytest.raises(Misuse, match="classes run from 0 to 9"):
        SequentialRequests().requests(softmax, records, outside, through=Retrain(), rng=generator(0))
    assert SequentialRequests().contribute(records, target, rng=generator(0)) is None
