"""Moved rows follow the gradient of what unlearning or retraining does with them, and stay within their bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge import Recipe, Request, generator, train
from expunge.attack import PerturbRequests, Queries, ReplaceRequests, Surrogate
from expunge.attack.aim import margin, pick_targets
from expunge.attack.bounds import Bounds
from expunge.attack.descend import Adjoint, Aim, Matching, Retraining
from expunge.attack.knowledge import Wish
from expunge.attack.reaction import Order, Reaction
from expunge.attack.victim import Victim
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Target
from expunge.core.recipe import Sharding
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import prepare
from expunge.learn.training import adopt
from expunge.testing.case import digits
from expunge.unlearn import GradientAscent, InfluenceUnlearning, Retrain
from tests.attack.oracles import Array, adversary, problem, retrained, slope, softmax_model, with_bias

DECAY = 5e-2


def tanh_model(n: int = 10) -> tuple[Trained, Records, Target]:
    g = generator(2)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    records = Records(x, torch.arange(n) % 3, classes=3)
    trained = adopt(module, Recipe(model="softmax", weight_decay=1e-2), records)
    return trained, records, Target(x=torch.randn(2, 3, generator=g, dtype=torch.float64), y=torch.tensor([0, 2]))


def given(kind: str) -> tuple[Trained, Records, Target]:
    if kind == "tanh":
        return tanh_model()
    records, target = problem(4, n=12, classes=3)
    return softmax_model(records), records, target


def differences(loss: Any, x: Tensor, h: float = 1e-3) -> Tensor:
    """The gradient of a function of rows, entry by entry."""
    found = torch.zeros_like(x)
    for place in np.ndindex(*x.shape):

        def along(step: float, place: tuple[int, ...] = place) -> float:
            moved = x.clone()
            moved[place] += step
            return float(loss(moved))

        found[place] = slope(along, h)
    return found


def gradient_of(aim: Aim, x: Tensor, y: Tensor) -> Tensor:
    _, victim, u = aim(x)
    return victim.input_gradient(x, y, u)


@pytest.mark.parametrize("kind", ["softmax", "tanh"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_the_gradient_of_moved_rows_is_that_of_the_unlearners_answer(kind: str, order: Order) -> None:
    trained, records, target = given(kind)
    damping = 0.5 if kind == "tanh" else 0.0
    victim = Victim.of(trained, records, Retrain(), reaction=Reaction(order=order, rate=0.3, damping=damping))
    x, y = records.x[:3] + 0.1, records.y[:3]
    leaving = victim.objective.gradient(records.x[:3], y)
    here, size = victim.objective.vector(), victim.objective.size
    b = torch.stack([victim.answer(column) for column in torch.eye(size, dtype=torch.float64)], 1)

    def loss(rows: Tensor) -> Tensor:
        after = here + b @ (leaving - victim.objective.gradient(rows, y))
        out = victim.objective.outputs(after, target.x)
        return torch.log_softmax(out, 1).gather(1, target.y[:, None]).mean()

    aim = Adjoint(victim=victim, wish=Wish(target=target), y=y, leaving=leaving)
    found, truth = gradient_of(aim, x, y), differences(loss, x)
    assert float((found - truth).abs().max()) < 1e-6 * float(truth.abs().max())
    assert aim(x)[0] == pytest.approx(float(loss(x)), rel=1e-9)


def test_the_gradient_of_moved_rows_is_that_of_exact_retraining() -> None:
    trained, records, target = given("softmax")
    victim = Victim.of(trained, records, Retrain()).settled
    places = torch.tensor([1, 4, 7])
    x, y = records.x[places] + 0.2, records.y[places]

    def loss(rows: Tensor) -> float:
        whole = records.x.clone()
        whole[places] = rows
        ones: Array = np.ones((1, len(records)))
        t = retrained(with_bias(whole), records.y.numpy(), ones, classes=3, decay=DECAY)
        return float(adversary(t, target)[0])

    aim = Retraining(victim=victim, wish=Wish(target=target), places=places, y=y)
    found, truth = gradient_of(aim, x, y), differences(loss, x)
    assert float((found - truth).abs().max()) < 1e-6 * float(truth.abs().max())
    assert aim(x)[0] == pytest.approx(loss(x), rel=1e-8)
    linear = Adjoint(
        victim=victim, wish=Wish(target=target), y=y, leaving=victim.objective.gradient(records.x[places], y)
    )
    assert float((gradient_of(linear, x, y) - truth).abs().max()) > 1e-3 * float(truth.abs().max())


@pytest.mark.parametrize("kind", ["softmax", "tanh"])
@pytest.mark.parametrize("towards", [1.0, -1.0])
def test_matching_has_the_gradient_of_its_cosine(kind: str, towards: float) -> None:
    trained, records, target = given(kind)
    victim = Victim.of(trained, records, Retrain())
    wish, x, y = Wish(target=target), records.x[:3] + 0.1, records.y[:3]
    aimed = towards * victim.loss_gradient(target)

    def loss(rows: Tensor) -> Tensor:
        brought = victim.objective.gradient(rows, y)
        return 1 - torch.nn.functional.cosine_similarity(brought, aimed, dim=0)

    aim = Matching(victim=victim, wish=wish, y=y, towards=towards)
    found, truth = gradient_of(aim, x, y), differences(loss, x)
    assert float((found - truth).abs().max()) < 1e-6 * float(truth.abs().max())
    assert aim(x)[0] == pytest.approx(float(loss(x)))


def pixels() -> tuple[Trained, Records, Target]:
    case = digits()
    grey = (case.records.x * 200).round().to(torch.uint8)
    records = Records(grey, case.records.y, case.records.ids, case.records.owners, classes=10)
    trained = train(Recipe(model="softmax", epochs=20, weight_decay=1e-3), records)
    tests = Records((case.test.x * 200).round().to(torch.uint8), case.test.y, case.test.ids, classes=10)
    return trained, records, pick_targets(trained, tests, 1, rng=generator(3))[0]


def margin_of(trained: Trained, target: Target) -> float:
    with torch.no_grad():
        return float(margin(trained.module(prepare(target.x, torch.float32)), target))


@pytest.mark.parametrize("by", ["adjoint", "retraining", "matching"])
@pytest.mark.parametrize("eps", [0.1, 0.25])
def test_replacements_stay_within_eps_and_the_pixels_range_after_rounding(by: Any, eps: float) -> None:
    trained, records, target = pixels()
    attack = ReplaceRequests(count=12, eps=eps, by=by, steps=10, renew=2, restarts=2)
    filed = [attack.requests(trained, records, target, through=Retrain(), rng=generator(5)) for _ in range(2)]
    ((request,), (same,)) = filed
    assert request.x is not None
    assert same.x is not None
    assert request.ids == same.ids
    assert torch.equal(request.x, same.x)
    assert request.kind == "replace"
    assert 1 <= len(set(request.ids)) <= 12
    old = records.take(request.ids)
    assert request.x.dtype is torch.uint8
    assert torch.equal(request.y, old.y)
    moved = (request.x.int() - old.x.int()).abs()
    assert 0 < int(moved.max()) <= eps * 255
    assert int(request.x.max()) <= int(records.x.max())
    assert attack.contribute(records, target, rng=generator(0)) is None


def test_columns_of_floats_keep_their_own_range() -> None:
    records, target = problem(4, n=30, classes=3)
    x = records.x.clone()
    x[:, 0] = 3.0
    records = Records(x.float(), records.y, classes=3)
    trained = train(Recipe(model="softmax", epochs=5, weight_decay=DECAY), records)
    target = Target(x=target.x.float(), y=target.y)
    attack = ReplaceRequests(count=5, eps=0.3, steps=10, renew=2)
    (request,) = attack.requests(trained, records, target, through=Retrain(), rng=generator(0))
    assert request.x is not None
    old = records.take(request.ids)
    assert bool((request.x[:, 0] == 3.0).all())
    assert float((request.x - old.x).abs().max()) <= 0.3 + 1e-6
    assert bool((request.x >= records.x.amin(0)).all())
    assert bool((request.x <= records.x.amax(0)).all())


def test_rounding_beyond_eps_would_be_seen() -> None:
    old = torch.tensor([[10, 250]], dtype=torch.uint8)
    bounds = Bounds(low=torch.tensor(0, dtype=torch.uint8), high=torch.tensor(255, dtype=torch.uint8))
    moved = torch.tensor([[10 / 255 + 0.0218, 1.5]])  # 15.56 is rounded to 16: 6 steps, of which eps .0218 allows 5
    assert bounds.stored(moved, old, 0.0218).tolist() == [[15, 255]]


@pytest.mark.parametrize(
    ("through", "by"),
    [
        (InfluenceUnlearning(rows=None, damping=0.01), "auto"),
        (Retrain(), "auto"),
        (Retrain(), "matching"),
    ],
)
def test_replacements_harm_more_than_random_moves_of_the_same_rows(through: Any, by: Any) -> None:
    trained, records, target = pixels()
    attack = ReplaceRequests(count=24, eps=0.4, by=by, steps=20, renew=4)
    (request,) = attack.requests(trained, records, target, through=through, rng=generator(5))
    old = records.take(request.ids)
    signs = torch.randint(0, 2, old.x.shape, generator=generator(1)) * 2 - 1
    noise = (old.x + signs * 102).clamp(0, 200).to(torch.uint8)
    by_chance = Request.replace_rows(request.ids, noise, old.y)
    after = [through(trained, records, one, rng=generator(0)).trained for one in (request, by_chance)]
    attacked, chance = (margin_of(one, target) for one in after)
    assert attacked > chance
    assert attacked > margin_of(trained, target)


def test_gradient_ascent_refuses_replacements_which_it_would_not_learn_and_is_harmed_by_the_choice_of_rows() -> None:
    trained, records, target = pixels()
    through = GradientAscent(lr=0.5, epochs=1)
    attack = ReplaceRequests(count=12, eps=0.4, steps=4, renew=1, choose="effects")
    (request,) = attack.requests(trained, records, target, through=through, rng=generator(5))
    with pytest.raises(Unsupported, match="12 replacements would be lost; use fine-tune or retrain"):
        through(trained, records, request, rng=generator(0))
    removed = through(trained, records, Request.remove(request.ids), rng=generator(0)).trained
    assert margin_of(removed, target) > margin_of(trained, target)


def test_queries_move_rows_by_answers_alone() -> None:
    trained, records, target = pixels()
    attack = ReplaceRequests(count=12, eps=0.3, choose="effects", steps=6, samples=6, knowledge=Queries())
    asked: list[int] = []
    trained.module.register_forward_hook(lambda _, rows, __: asked.append(len(rows[0])))
    (request,) = attack.requests(trained, records, target, through=GradientAscent(), rng=generator(5))
    assert sum(asked) == Queries().cost(trained, target) + 1 + 12 * (1 + 6 * (2 * 6 + 1))
    assert request.x is not None
    rows = [prepare(some, torch.float32) for some in (records.take(request.ids).x, request.x)]
    effect = Queries().effect_of(trained, Wish(target=target))
    before, after = (effect(some, request.y) for some in rows)  # type: ignore[arg-type]
    assert float(after.sum()) > float(before.sum())
    with pytest.raises(Misuse, match="no gradient"):
        ReplaceRequests(count=1, knowledge=Queries())


@pytest.mark.parametrize("choose", ["reach", "effects", "class", "random"])
def test_rows_to_move_are_chosen_among_those_owned_and_in_every_shard(choose: Any) -> None:
    records, target = problem(8, n=60, classes=3)
    trained = softmax_model(records, sharding=Sharding(shards=2, aggregate="mean"))
    owned = frozenset(records.ids[::2])
    for knowledge in (Surrogate(share=0.7), None):
        attack = ReplaceRequests(count=6, eps=0.5, choose=choose, steps=4, renew=2, owned=owned, stealth=0.1)
        attack = attack if knowledge is None else replace(attack, knowledge=knowledge)
        (request,) = attack.requests(trained, records, target, through=Retrain(), rng=generator(0))
        assert len(request.ids) == 6
        assert set(request.ids) <= owned
        if choose == "class":
            assert bool((request.y == target.y).all())


def test_perturbed_rows_harm_influence_unlearning_and_leave_exact_retraining_as_it_was() -> None:
    case = digits()
    recipe = Recipe(model="softmax", epochs=20, weight_decay=1e-3)
    clean = train(recipe, case.records)
    target = pick_targets(clean, case.test, 1, rng=generator(3))[0]
    attack = PerturbRequests(recipe=recipe, count=30, eps=0.4, steps=15)
    brought = attack.contribute(case.records, target, rng=generator(1))
    again = attack.contribute(case.records, target, rng=generator(1))
    assert torch.equal(brought.x, again.x)
    assert len(brought) == 30
    assert set(brought.owners) == {"contributor"}
    assert bool((brought.y == target.y).all())
    together = case.records.plus(brought)
    trained = train(recipe, together)
    influence = InfluenceUnlearning(rows=None, damping=0.01)
    (request,) = attack.requests(trained, together, target, through=influence, rng=generator(0))
    assert set(request.ids) == set(brought.ids)
    exact = Retrain()(trained, together, request, rng=generator(0)).trained
    assert exact.digest() == clean.digest()
    after = margin_of(influence(trained, together, request, rng=generator(0)).trained, target)
    copies = replace(attack, eps=1e-3, steps=1).contribute(case.records, target, rng=generator(1))
    unmoved = case.records.plus(copies)
    control = influence(train(recipe, unmoved), unmoved, request, rng=generator(0)).trained
    assert margin_of(trained, target) < margin_of(clean, target) < 0 < after
    assert after > margin_of(control, target) + 1
    with pytest.raises(Misuse, match="stands on no row"):
        attack.requests(clean, case.records, target, through=influence, rng=generator(0))
    with pytest.raises(Misuse, match="name of its own"):
        attack.contribute(together, target, rng=generator(0))
    with pytest.raises(Misuse, match="fewer than"):
        replace(attack, count=400).contribute(case.records, target, rng=generator(0))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"count": 0}, "asks for nothing"),
        ({}, "one of them"),
        ({"count": 2, "eps": 0.0}, "eps must be above 0"),
        ({"count": 2, "steps": 0}, "steps and restarts"),
        ({"count": 2, "renew": 0}, "renew and samples"),
        ({"count": 2, "by": "magic"}, "got others"),
    ],
)
def test_an_attack_that_cannot_be_meant_is_refused(about: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse, match=said):
        ReplaceRequests(**about)


def test_requests_that_cannot_be_met_are_refused() -> None:
    trained, records, target = pixels()

    def ask(attack: ReplaceRequests, rows: Records = records, aim: Target = target) -> None:
        attack.requests(trained, rows, aim, through=Retrain(), rng=generator(0))

    with pytest.raises(Misuse, match="may ask about"):
        ask(ReplaceRequests(count=481))
    with pytest.raises(Misuse, match="of the class"):
        ask(ReplaceRequests(count=300, choose="class"))
    with pytest.raises(Misuse, match="too small to change"):
        ask(ReplaceRequests(count=3, eps=1e-4, steps=2, renew=1))
    with pytest.raises(Misuse, match="shape"):
        ask(ReplaceRequests(count=3), aim=Target(x=torch.zeros(1, 3), y=target.y))
    tokens = Records(records.x.long(), records.y, records.ids, classes=10)
    with pytest.raises(Unsupported, match="cannot be moved"):
        ask(ReplaceRequests(count=3), rows=tokens, aim=Target(x=target.x.long(), y=target.y))
    network, rows, other = tanh_model()
    with pytest.raises(Misuse, match="use matching"):
        ReplaceRequests(count=3, by="retraining").requests(
            network, rows, other, through=Retrain(), rng=generator(0)
        )  # fmt: skip
