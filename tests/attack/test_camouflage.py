"""Camouflaged poison: what the rows look like, the gradient that makes them, and if the target sleeps and wakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge
from expunge import Recipe, Records, Retrain, generator
from expunge.attack.aim import margin, pick_targets
from expunge.attack.camouflage import Camouflage, mismatch, mismatch_gradient
from expunge.calculus import Objective
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Target
from expunge.learn.loop import prepare, row_losses
from expunge.testing.case import digits

SOFTMAX = Recipe(model="softmax", epochs=5, weight_decay=1e-3)
QUICK = Camouflage(surrogate=SOFTMAX, poison=6, camouflage=4, eps=0.1, steps=8, restarts=1)


@pytest.fixture(scope="module")
def pixels(mnist: Any) -> Records:
    return mnist.train.select(torch.randperm(60_000, generator=generator(11))[:800])


@pytest.fixture(scope="module")
def picked(pixels: Records, mnist: Any) -> tuple[Target, ...]:
    return pick_targets(expunge.train(SOFTMAX, pixels), mnist.test, 4, rng=generator(5), targeted=True)


@pytest.mark.parametrize(
    ("model", "args"), [("softmax", {}), ("mlp", {"hidden": (5,)}), ("lenet", {})], ids=["softmax", "mlp", "conv"]
)
def test_the_gradient_of_the_mismatch_is_its_finite_difference(model: str, args: Any, pixels: Records) -> None:
    records = (pixels if model == "lenet" else digits().records).select(range(40))
    recipe = Recipe(model=model, model_args=args, epochs=1, dtype="float64")
    objective = Objective(expunge.train(recipe, records).module, row_losses(recipe))
    x, y = prepare(records.x[:3], torch.float64), records.y[:3]
    x = x + 0.1 * torch.rand(x.shape, generator=generator(0), dtype=torch.float64)  # pools of equal pixels have a kink
    goal = objective.gradient(prepare(records.x[5:6], torch.float64), records.y[5:6])
    gradient = mismatch_gradient(x, y, [objective], [goal])
    towards = torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    ends = [mismatch(x + sign * 1e-6 * towards, y, [objective], [goal]) for sign in (1, -1)]
    assert float((gradient * towards).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-9)


def test_rows_keep_their_labels_and_stay_within_the_radius(pixels: Records, picked: tuple[Target, ...]) -> None:
    target = picked[0]
    new = QUICK.contribute(pixels, target, rng=generator(3))
    assert new.x.dtype is torch.uint8
    assert set(new.owners) == {"attacker"}
    assert new.ids[0] == "attacker/poison-000"
    assert new.ids[-1] == "attacker/camouflage-003"
    assert new.y.tolist() == [int(target.wanted[0])] * 6 + [int(target.y[0])] * 4
    for row, label in zip(new.x, new.y.tolist(), strict=True):
        base = pixels.of_class(label).x.int()
        assert int((base - row.int()).abs().flatten(1).amax(1).min()) <= 25  # of some row of that class
    again = QUICK.contribute(pixels, target, rng=generator(3))
    assert torch.equal(new.x, again.x)
    assert not torch.equal(new.x, QUICK.contribute(pixels, target, rng=generator(4)).x)


def test_the_request_names_the_camouflage_and_nothing_else(pixels: Records, picked: tuple[Target, ...]) -> None:
    whole = pixels.plus(QUICK.contribute(pixels, picked[0], rng=generator(3)))
    trained = expunge.train(SOFTMAX, whole)
    (request,) = QUICK.requests(trained, whole, picked[0], through=Retrain(), rng=generator(0))
    assert request.ids == tuple(f"attacker/camouflage-{i:03d}" for i in range(4))
    after = Retrain()(trained, whole, request, rng=generator(0)).trained
    with pytest.raises(Misuse, match="no camouflage"):
        QUICK.requests(after, whole, picked[0], through=Retrain(), rng=generator(0))


def test_the_target_sleeps_before_and_wakes_after_exact_retraining(pixels: Records, picked: tuple[Target, ...]) -> None:
    attack = Camouflage(surrogate=SOFTMAX, poison=40, camouflage=40, eps=0.3, steps=15, restarts=1)
    victim = replace(SOFTMAX, seed=77)  # other coins than any surrogate's
    before, after, control = 0, 0, 0
    for number, target in enumerate(picked):

        def hit(trained: Any, target: Target = target) -> int:
            with torch.no_grad():
                return int(margin(trained.module(prepare(target.x, torch.float32)), target)[0] > 0)

        for strength in (attack, replace(attack, eps=1 / 255, steps=1)):
            whole = pixels.plus(strength.contribute(pixels, target, rng=generator(number)))
            trained = expunge.train(victim, whole)
            (request,) = strength.requests(trained, whole, target, through=Retrain(), rng=generator(0))
            retrained = Retrain()(trained, whole, request, rng=generator(0)).trained
            if strength is attack:
                before, after = before + hit(trained), after + hit(retrained)
            else:
                control += hit(retrained)
    assert after >= before + 2
    assert after >= control + 2


def test_an_untargeted_attack_wants_the_second_best(pixels: Records, picked: tuple[Target, ...]) -> None:
    new = QUICK.contribute(pixels, replace(picked[0], wanted=None), rng=generator(3))
    assert len(set(new.y[:6].tolist())) == 1
    assert new.y[0] != picked[0].y[0]


def test_what_cannot_be_meant_is_refused(pixels: Records, picked: tuple[Target, ...]) -> None:
    for wrong in ({"poison": 0}, {"camouflage": 0}, {"eps": 0.0}, {"steps": 0}, {"surrogates": 0}):
        with pytest.raises(Misuse):
            Camouflage(**wrong)
    with pytest.raises(Misuse, match="without shards"):
        Camouflage(surrogate=replace(SOFTMAX, sharding=expunge.Sharding(shards=2)))
    target = picked[0]
    with pytest.raises(Misuse, match="one target row"):
        QUICK.contribute(
            pixels, Target(x=target.x.repeat(2, 1, 1), y=target.y.repeat(2), wanted=None), rng=generator(0)
        )
    with pytest.raises(Misuse, match="shape"):
        QUICK.contribute(pixels, replace(target, x=target.x[:, :5]), rng=generator(0))
    with pytest.raises(Misuse, match="1/255"):
        replace(QUICK, eps=0.001).contribute(pixels, target, rng=generator(0))
    with pytest.raises(Misuse, match="are to be brought"):
        replace(QUICK, poison=900).contribute(pixels, target, rng=generator(0))
    with pytest.raises(Misuse, match="name another"):
        replace(QUICK, owner=pixels.owners[0]).contribute(pixels, target, rng=generator(0))
    tokens = Records(torch.arange(8).reshape(2, 4), torch.tensor([0, 1]), classes=2)
    with pytest.raises(Unsupported, match="tokens"):
        QUICK.contribute(tokens, Target(x=tokens.x[:1], y=tokens.y[:1]), rng=generator(0))
