"""What stages decide: a flag holds, a withheld result is deleted, and a stage that was not there never passed."""

import json

import pytest

from expunge import Request, Retrain, generator
from expunge.core.errors import Impossible, Misuse, NotNow
from expunge.core.protocols import Failed, Held, Passed
from expunge.workflow import AFTER, BEFORE, FallBack
from tests.workflow import kit

ANN, BOB, CAT = kit.owners_of(kit.digits())[:3]
ODD = Held(why="it looks like an attack", evidence={"score": 0.5})
FINE = Passed(why="nothing odd", evidence={"score": 0.1})


def without(*owners):
    return kit.digits().where(lambda _, owner: owner not in owners)


def screen(*said):
    return kit.Says("screen", said)


def verify(*said):
    return kit.Says("verify", said)


def test_a_flagged_request_is_held_for_a_person_and_its_clock_runs_on(place):
    here, stage = place("whole"), screen(ODD)
    asked = here.ask(Request.remove_owner(ANN))
    due = here.filed(asked).due_at
    progress = here.run(stages=[stage])
    assert progress.held == (asked,)
    assert not progress.good
    here.time.at_s += 3 * kit.DAY_S
    assert here.run(stages=[stage]).held == ()
    assert (here.state(asked), here.filed(asked).why) == ("held", "it looks like an attack")
    assert here.filed(asked).due_at == due
    assert len(stage.jobs) == 1
    job = stage.jobs[0]
    assert job.requests[0].owner == ANN
    assert job.after is None
    assert job.before.digest() == here.served().digest()
    assert job.records is here.records


@pytest.mark.parametrize("said", [ODD, Failed(why="no memory left")], ids=["held", "failed"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_was_held_is_released_by_a_person_to_either_method(place, said, exact):
    here, method, anew = place(), kit.CountedSisa(), kit.CountedRetrain()
    given = {"method": method, "exact": anew, "stages": [screen(said)]}
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(**given).held == (asked,)
    here.ledger.requests.release(asked, exact=exact)
    assert here.run(**given).completed == (asked,)
    assert (len(method.calls), len(anew.calls)) == (not exact, exact)
    assert here.stages(asked)["screen"] == "held"
    assert here.checked(asked).passed


@pytest.mark.parametrize("said", [ODD, Failed(why="no memory left")], ids=["held", "failed"])
def test_a_policy_may_send_what_is_flagged_to_exact_retraining_at_once(place, said):
    here, method, anew = place(on_flag="exact"), kit.CountedSisa(), kit.CountedRetrain()
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(method=method, exact=anew, stages=[screen(said)]).completed == (asked,)
    assert (len(method.calls), len(anew.calls)) == (0, 1)
    assert here.stages(asked)["screen"] == "held"
    assert here.said(asked)["method"]["name"] == "counted-retrain"
    assert "attack" not in json.dumps(here.statement(asked))


def test_what_passes_goes_on_and_says_so(place):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), stages=[screen(FINE)])
    assert here.stages(asked)["screen"] == "passed"
    assert "0.1" not in json.dumps([stage for stage in here.said(asked)["stages"] if stage["name"] == "screen"])


def test_a_screen_that_was_not_done_is_never_shown_as_passed(place):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), stages=[screen(kit.nothing())])
    assert here.stages(asked)["screen"] == "not done"


def test_a_screen_that_came_only_after_the_request_was_screened_is_not_shown_as_passed(place):
    here = place("whole", count=2)
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run().waiting == (asked,)
    late = screen(FINE)
    assert here.run(stages=[late], now=True).completed == (asked,)
    assert late.jobs == []
    assert here.stages(asked)["screen"] == "not done"


def test_a_screen_that_held_is_not_forgotten_when_the_run_has_no_screen(place):
    here = place("whole", on_flag="exact", count=1)
    asked = here.ask(Request.remove_owner(ANN))
    here.journey(stages=[screen(ODD)]).screen(here.filed(asked))
    assert here.run().completed == (asked,)
    assert here.stages(asked)["screen"] == "held"


@pytest.mark.parametrize("reason", ["flagged", "screen", "malicious", "attack", "poison", "suspected_fraud"])
def test_a_flag_is_no_reason_to_deny(place, reason):
    here = place("whole")
    asked = here.ask(Request.remove_owner(ANN))
    here.run(stages=[screen(ODD)])
    with pytest.raises(Impossible, match="exact retraining"):
        here.ledger.requests.deny(asked, reason)
    assert here.state(asked) == "held"


def test_a_withheld_result_is_deleted_and_the_old_model_still_served(place):
    here, stage = place("whole"), verify(Held(why="membership is still visible"), FINE)
    asked = here.ask(Request.remove_owner(ANN))
    before, due = here.served().digest(), here.filed(asked).due_at
    here.time.at_s += kit.DAY_S
    progress = here.run(stages=[stage])
    assert progress.withheld == (asked,)
    assert not progress.good
    assert stage.jobs[0].after.gone == set(kit.digits().of_owner(ANN).ids)
    assert (here.state(asked), here.filed(asked).due_at) == ("withheld", due)
    assert here.filed(asked).why == "verify: membership is still visible"
    assert here.served().digest() == before
    assert here.versions() == ["v0001"]
    assert "switched" not in here.kinds()
    assert here.workspace.asked(asked).owner == ANN
    with pytest.raises(NotNow):
        here.ledger.requests.deny(asked, "no_match")
    with pytest.raises(NotNow):
        here.ledger.requests.cancel(asked)
    assert here.run(stages=[stage]).completed == ()
    assert here.ledger.requests.release(asked, exact=True).due_at == due
    anew = kit.CountedRetrain()
    assert here.run(stages=[stage], exact=anew).completed == (asked,)
    assert len(anew.calls) == 1
    assert here.said(asked)["method"]["name"] == "counted-retrain"
    assert here.said(asked)["request"]["dueAt"] == due
    assert here.served().digest() == kit.from_scratch(kit.trained("whole").recipe, without(ANN)).digest()
    assert here.checked(asked).passed
    assert here.sound()


def withheld(here, owner=ANN):
    asked = here.ask(Request.remove_owner(owner))
    assert here.run(stages=[verify(ODD)]).withheld == (asked,)
    return asked


def fallback(*owners):
    """A model that never read these owners' records, nor every third of the others."""
    left = without(*owners)
    return kit.from_scratch(kit.recipe(), left.select([i for i in range(len(left)) if i % 3]))


def test_a_model_that_cannot_be_mended_is_retired_for_the_fallback(place):
    here = place("whole")
    asked, other = withheld(here), fallback(ANN)
    progress = here.journey(stages=[verify(FINE)]).fall_back(other, "w")
    assert progress.completed == (asked,)
    said = here.said(asked)
    assert (said["claim"]["level"], said["claim"]["exactness"]) == ("none", None)
    assert said["method"]["name"] == "fall-back"
    assert said["dataset"]["rowsRead"] is None
    assert said["dataset"]["after"]["count"] == len(other.ids)
    assert said["removed"]["count"] == len(kit.digits().of_owner(ANN))
    assert here.served().digest() == other.digest()
    assert here.served().gone == set(kit.digits().of_owner(ANN).ids)
    assert "NOT witnessed" in str(here.checked(asked))
    assert here.checked(asked).passed
    assert here.sound()
    mine = sorted(one for one in other.ids if one in kit.digits().of_owner(BOB).ids)
    again = here.honour(Request.remove(mine), method=Retrain())
    assert here.checked(again).passed
    assert here.said(again)["dataset"]["rowsRead"]["count"] == len(other.ids) - len(mine)


def test_a_fallback_that_was_trained_on_a_forgotten_record_is_refused(place):
    here = place("whole")
    asked, before = withheld(here), here.served().digest()
    progress = here.journey().fall_back(fallback(BOB), "w")
    assert progress.failed == (asked,)
    assert "declare one that was not" in here.filed(asked).why
    assert here.served().digest() == before
    assert here.versions() == ["v0001"]
    here.ledger.requests.release(asked)
    assert here.run().completed == (asked,)


def test_a_fallback_that_was_trained_on_what_is_gone_is_refused(place):
    here = place("whole")
    here.honour(Request.remove_owner(BOB))
    asked = withheld(here)
    assert here.journey().fall_back(fallback(ANN), "w").failed == (asked,)
    assert "does not stand on" in here.filed(asked).why


def test_without_anything_withheld_there_is_no_fallback(place):
    here = place("whole")
    with pytest.raises(Misuse, match="is withheld"):
        here.journey().fall_back(fallback(ANN), "w")
    assert FallBack(model=fallback(ANN)).supports(here.served()) is None


def test_a_fallback_answers_with_its_own_weights_and_the_books_of_the_other():
    other, mine = fallback(ANN), kit.digits().of_owner(ANN)
    made = FallBack(model=other)(kit.trained(), kit.digits(), Request.remove_owner(ANN), rng=generator(0))
    assert made.trained.digest() == other.digest()
    assert (made.trained.ids, made.trained.gone) == (other.ids, set(mine.ids))


@pytest.mark.parametrize("name", AFTER)
def test_a_later_stage_that_fails_fails_the_run_which_can_be_tried_again(place, name):
    here = place("whole")
    stage = kit.Says(name, [Failed(why="no disk left"), FINE])
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(stages=[stage]).failed == (asked,)
    assert here.filed(asked).why == f"{name}: no disk left"
    assert here.versions() == ["v0001"]
    assert here.run(stages=[stage]).completed == ()
    here.ledger.requests.release(asked)
    assert here.run(stages=[stage]).completed == (asked,)
    assert here.stages(asked) == {one: "passed" if one == name else "not done" for one in (*BEFORE, *AFTER)}
    assert here.checked(asked).passed


def test_stages_that_were_not_configured_or_not_installed_are_not_done(place):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), stages=[kit.Says("audit", [kit.nothing()]), verify(FINE)])
    assert here.stages(asked) == {
        "screen": "not done", "certify": "not done", "verify": "passed",
        "audit": "not done", "value": "not done", "assure": "not done",
    }  # fmt: skip
    why = {stage["name"]: stage["why"] for stage in here.said(asked)["stages"]}
    assert why["audit"] == "the stage says that it was not done"
    assert why["assure"] == "no such stage was configured"
    lines = here.checked(asked).not_proved
    assert any(line.startswith("stage audit: the stage says") for line in lines)
    assert not any(line.startswith("stage verify") for line in lines)


def test_all_stages_see_the_job_in_order_and_publish_no_evidence(place):
    here, told = place("whole"), []
    stages = [kit.Says(name, [Passed(why=f"the figures of {name}", evidence={"p": 1})]) for name in (*AFTER, *BEFORE)]
    asked = here.honour(Request.remove_owner(ANN), stages=stages, tell=lambda what, *_: told.append(what))
    assert [what for what in told if what in AFTER] == list(AFTER)
    for stage in stages[:-1]:
        (job,) = stage.jobs
        assert job.after.digest() == here.served().digest()
        assert job.before.digest() == kit.trained("whole").digest()
        assert [request.owner for request in job.requests] == [ANN]
    assert set(here.stages(asked).values()) == {"passed"}
    assert "the figures of" not in json.dumps(here.statement(asked))


def test_a_screen_that_raises_loses_no_request(place):
    here, stage = place("whole"), screen(RuntimeError("torn"), FINE)
    asked = here.ask(Request.remove_owner(ANN))
    with pytest.raises(RuntimeError, match="torn"):
        here.run(stages=[stage])
    assert here.state(asked) == "screening"
    assert here.run(stages=[stage]).completed == (asked,)
    assert here.kinds(asked).count("screening") == 1


def test_a_later_stage_that_raises_leaves_the_run_to_the_next_attempt(place):
    here, stage, method = place(), verify(RuntimeError("torn"), FINE), kit.CountedSisa()
    asked, before = here.ask(Request.remove_owner(ANN)), here.served().digest()
    with pytest.raises(RuntimeError, match="torn"):
        here.run(stages=[stage], method=method)
    assert here.served().digest() == before
    assert here.run("another", stages=[stage], method=method).completed == (asked,)
    assert len(method.calls) == 1
    assert here.stages(asked)["verify"] == "passed"


def test_a_later_stage_that_raises_our_own_error_fails_the_run_with_the_reason(place):
    here = place("whole")
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(stages=[verify(Misuse("three models are needed, got 1"))]).failed == (asked,)
    assert here.filed(asked).why == "three models are needed, got 1"
    assert here.versions() == ["v0001"]
    here.ledger.requests.release(asked)
    assert here.run().completed == (asked,)


def test_a_withheld_run_withholds_all_of_its_requests(place):
    here = place("whole", count=3)
    asked = [here.ask(Request.remove_owner(owner)) for owner in (ANN, BOB, CAT)]
    assert here.run(stages=[verify(ODD)]).withheld == tuple(asked)
    for one in asked:
        here.ledger.requests.release(one, exact=True)
    assert here.run(stages=[verify(FINE)]).completed == tuple(asked)
    assert here.sound()
