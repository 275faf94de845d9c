"""Rows that were never trained on: refused at the door, and what they do where nobody stands at it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import expunge
from expunge import Recipe, Request, Retrain, generator
from expunge.attack.aim import margin, pick_targets
from expunge.attack.strangers import Strangers, naive
from expunge.core.errors import Misuse, UnknownRecord, Unsupported
from expunge.core.protocols import Target
from expunge.learn.predict import outputs
from expunge.testing.case import digits
from expunge.unlearn import GradientAscent

ASCENT = GradientAscent(lr=0.5, epochs=2)


@pytest.fixture(scope="module")
def trained() -> Any:
    return expunge.train(Recipe(model="softmax", epochs=20, weight_decay=1e-3), digits().records)


def margins(module: Any, target: Target) -> float:
    with torch.no_grad():
        return float(margin(module(target.x), target)[0])


def asked(trained: Any, target: Target, attack: Strangers | None = None) -> Request:
    (request,) = (attack or Strangers()).requests(trained, digits().records, target, through=ASCENT, rng=generator(0))
    return request


def test_strangers_are_refused_at_the_door(trained: Any) -> None:
    target = pick_targets(trained, digits().test, 1, rng=generator(1))[0]
    request = asked(trained, target)
    assert request.kind == "remove_rows"
    with pytest.raises(UnknownRecord):
        ASCENT(trained, digits().records, request, rng=generator(0))


def test_a_provider_that_does_not_look_is_turned_round_and_retraining_is_not(trained: Any) -> None:
    records = digits().records
    for target in pick_targets(trained, digits().test, 5, rng=generator(1)):
        given = naive(trained, records, asked(trained, target))
        before = trained.digest()
        after = ASCENT(*given, rng=generator(0)).trained
        assert trained.digest() == before
        assert margins(trained.module, target) < 0 < margins(after.module, target)
        again = Retrain()(*given, rng=generator(0)).trained
        assert again.digest() == trained.digest()
    right = (outputs(after.module, digits().test).argmax(1) == digits().test.y).float().mean()
    assert right > 0.3  # one digit is lost, not the model


def test_copies_stay_near_the_target_and_bear_its_label(trained: Any) -> None:
    target = pick_targets(trained, digits().test, 1, rng=generator(2))[0]
    request = asked(trained, target, Strangers(count=4, noise=0.1))
    assert torch.equal(request.x[0], target.x[0])
    apart = (request.x - target.x).abs().amax(1)
    assert float(apart[1:].min()) > 0
    assert float(apart.max()) <= 0.1 + 1e-6
    assert request.y.tolist() == target.y.tolist() * 4
    exact = asked(trained, target, Strangers(count=2, noise=0.0))
    assert torch.equal(exact.x, target.x.expand(2, -1))
    pixels = replace(target, x=(target.x * 255).to(torch.uint8))
    whole = expunge.Records((digits().records.x * 255).to(torch.uint8), digits().records.y, classes=10)
    (small,) = Strangers(noise=0.1).requests(trained, whole, pixels, through=ASCENT, rng=generator(0))
    assert small.x.dtype is torch.uint8
    assert 0 < int((small.x.int() - pixels.x.int()).abs().max()) <= 25


def test_a_member_asked_for_by_its_own_content_is_still_removed(trained: Any) -> None:
    records = digits().records
    row = records.select([3])
    request = Request.remove_rows(row.owners[0], row.x, row.y)
    assert Retrain()(trained, records, request, rng=generator(0)).trained.gone == {row.ids[0]}


def test_what_cannot_be_meant_is_refused(trained: Any) -> None:
    target = pick_targets(trained, digits().test, 1, rng=generator(1))[0]
    for wrong in ({"count": 0}, {"noise": -0.1}, {"noise": float("nan")}):
        with pytest.raises(Misuse):
            Strangers(**wrong)
    with pytest.raises(Misuse, match="shape"):
        asked(trained, Target(x=target.x[:, :5], y=target.y))
    with pytest.raises(Misuse, match="remove_rows"):
        naive(trained, digits().records, Request.remove(["row-001"]))
    tokens = expunge.Records(torch.arange(8).reshape(2, 4), torch.tensor([0, 1]), classes=2)
    with pytest.raises(Unsupported, match="noise=0"):
        Strangers().requests(trained, tokens, Target(x=tokens.x[:1], y=tokens.y[:1]), through=ASCENT, rng=generator(0))
    assert Strangers().contribute(digits().records, target, rng=generator(0)) is None
