"""Screening within the journey of a request."""

import json

import pytest

from expunge import Misuse, Request
from expunge.core.coins import generator
from expunge.core.protocols import Held, Job, Passed, Screen, Stage
from expunge.screen import Coalition, GradientInfluence, GradientNorm, Isolation, ScreenStage, default_screens
from tests.screen import kit, liars
from tests.workflow import kit as places


def job(*requests, kind="softmax"):
    return Job(requests=requests, before=kit.trained(kind), after=None, records=kit.records())


def stage(**more):
    return ScreenStage(
        **{"screens": (GradientNorm(), Isolation(), GradientInfluence(), Coalition()), "draws": 40, **more}
    )


def test_a_benign_request_passes_and_a_picked_one_is_held():
    one = stage(seed=3)
    benign = Request.remove(kit.records().ids[40:60])
    passed = one(job(benign, kind="mlp"), rng=generator(0))
    assert isinstance(passed, Passed)
    held = one(job(benign, Request.remove(kit.picked()[0].ids), kind="mlp"), rng=generator(0))
    assert isinstance(held, Held)
    assert held.why.startswith("flagged by ")
    assert held.why == held.evidence["told"]
    assert not any(name in held.why for name in kit.records().ids)
    assert passed.evidence["told"].startswith("not flagged: p ")
    assert json.loads(json.dumps(held.evidence)) == held.evidence
    first, second = held.evidence["decisions"]
    assert (first["action"], second["action"], second["hold"]) == ("carry out", "exact", True)
    assert second["judgements"]["GradientNorm"][0]["record"] in kit.records().ids
    assert second["reasons"]


def test_with_a_seed_the_screens_look_at_a_model_once():
    for one, same in ((stage(seed=3), True), (stage(), False)):
        desks = []
        for number in range(2):
            one(job(Request.remove(kit.records().ids[:3])), rng=generator(number))
            desks.append(one._desks[0])
        assert (desks[0] is desks[1]) is same
    again = [stage(seed=3)(job(Request.remove(kit.records().ids[:3])), rng=generator(n)).evidence for n in (5, 6)]
    assert again[0] == again[1]


def test_what_cannot_be_removed_is_held_for_a_person_and_nothing_is_passed_on():
    whole = kit.records()
    held = stage()(job(Request.remove_rows("nobody", 1 - whole.x[:1], whole.y[:1])), rng=generator(0))
    assert isinstance(held, Held)
    assert held.evidence["decisions"][0]["action"] == "refuse"
    assert isinstance(stage()(job(Request.remove([])), rng=generator(0)), Passed)


def test_a_sharded_model_is_screened_too():
    assert isinstance(
        stage(draws=20)(job(Request.remove_owner("owner-07"), kind="shards"), rng=generator(0)), Passed | Held
    )


def test_screens_and_liars_are_screens_and_the_stage_is_a_stage():
    known: Stage = stage()
    assert known.name == "screen"
    for one in (*default_screens(), liars.FlagsAll(), liars.FlagsNothing(), liars.ReadsLabels(), liars.ReadsWhoAsked()):
        assert isinstance(one, Screen)
    with pytest.raises(Misuse, match="draws"):
        stage(draws=5)


@pytest.mark.parametrize(("policy", "state"), [("hold", "held"), ("exact", "completed")])
def test_in_a_journey_a_flagged_erasure_waits_or_goes_to_exact_retraining_and_is_never_lost(tmp_path, policy, state):
    root = places.copied(places.template(tmp_path / "template", "whole"), tmp_path / "workspace", on_flag=policy)
    records = places.digits()
    ann, bob = places.owners_of(records)[:2]
    known = liars.ReadsLabels(malicious=frozenset([frozenset(records.of_owner(ann).ids)]))
    here = places.Place(root, records)
    try:
        flagged = here.ask(Request.remove_owner(ann))
        here.run(stages=[ScreenStage(screens=(known,), draws=40)], now=True)
        assert here.state(flagged) == state
        words = "flagged by ReadsLabels: p 0.0244, at 5 % false alarms"
        (entry,) = [one for one in here.ledger.log.entries(flagged) if one.kind in ("screened", "held")]
        assert entry.body["stages"] == [f"screen: held: {words}"]
        assert ann not in json.dumps(entry.to_json())
        if policy == "exact":
            assert here.stages(flagged)["screen"] == "held"
            assert "p 0.0244" not in json.dumps(here.statement(flagged))
        else:
            assert here.filed(flagged).why == words
        benign = here.ask(Request.remove_owner(bob))
        here.run(stages=[ScreenStage(screens=(known, GradientNorm()), draws=40, rate=0.03)], now=True)
        assert here.state(benign) == "completed"
        assert here.stages(benign)["screen"] == "passed"
        assert here.sound()
    finally:
        here.close()
