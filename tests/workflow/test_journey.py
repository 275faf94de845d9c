"""The journey: every state, every kind of request, batches, interruptions, a registry elsewhere, and what is told."""

import json
import sqlite3
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge import Claim, Constant, Cost, Guarantee, Request, Retrain, Sisa, Unlearned
from expunge.core.digest import digest_tensors
from expunge.core.errors import Misuse, UnknownRecord
from expunge.core.events import Event
from expunge.core.protocols import Failed, Held
from expunge.core.trained import TrainingLog
from expunge.ledger.jobs import Runs
from expunge.ledger.models import Models
from expunge.ledger.states import State
from expunge.unlearn.method import Done, Method
from expunge.workflow import Workspace, erasure
from expunge.workflow.steps import Steps
from tests.workflow import kit

OWNERS = kit.owners_of(kit.digits())
ANN, BOB, CAT, DAN = OWNERS[:4]
ANNS = len(kit.digits().of_owner(ANN))


def rest_of(*owners):
    return kit.digits().where(lambda _, owner: owner not in owners)


def test_a_request_is_carried_out_released_and_certified(place):
    here = place()
    asked = here.ask(Request.remove_owner(ANN))
    progress = here.run()
    assert progress.completed == (asked,)
    assert progress.good
    assert here.kinds(asked) == ["received", "screening", "screened", "running", "verifying", "completed"]
    said, mine = here.said(asked), kit.digits().of_owner(ANN)
    assert (said["removed"]["count"], said["removed"]["alreadyGone"]) == (len(mine), 0)
    assert said["claim"]["level"] == "exact"
    assert said["claim"]["exactness"] == "pathwise"
    assert said["method"]["name"] == "sisa"
    assert said["dataset"]["rowsRead"] == said["dataset"]["after"]
    assert here.checked(asked).passed
    scratch = kit.from_scratch(kit.trained().recipe, rest_of(ANN))
    assert here.served().digest() == scratch.digest() == here.statement(asked)["subject"][0]["digest"]["sha256"]
    assert here.served().gone == set(mine.ids)
    assert here.ledger.models.served(kit.MODEL).version == said["modelAfter"]["version"] == 2
    assert said["retired"] == [{"what": "model version", "name": f"{kit.MODEL}/v0001"}]
    assert len(here.versions()) == 1
    with pytest.raises(UnknownRecord, match="was erased"):
        here.workspace.asked(asked)
    assert [message["topic"] for message in here.ledger.requests.outbox()] == ["completed"]
    assert here.sound()
    assert here.run() == replace(progress, completed=())


def test_every_state_is_reached(place):
    here = place(count=1)
    once = kit.Says("verify", [Held(why="odd"), Failed(why="torn"), *[kit.Says("verify").outcomes[0]] * 9])
    here.ask(Request.remove_owner(ANN), key="first")
    assert len(here.run(stages=[once]).withheld) == 1
    here.ask(Request.remove_owner(BOB))
    assert len(here.run(stages=[once]).failed) == 1
    held = here.ask(Request.remove(["nobody"]))
    assert here.run(stages=[once]).held == (held,)
    here.ledger.requests.cancel(held)
    denied = here.ask(Request.remove_owner(CAT))
    here.ledger.requests.deny(denied, "no_match")
    proved = here.ask(Request.remove_owner(DAN), identified=False)
    late = here.ask(Request.remove_owner(CAT), identified=False, key="late")
    here.ledger.requests.verify_identity(proved)
    here.time.at_s += 31 * kit.DAY_S
    assert here.run(stages=[once]).completed == (proved,)
    assert here.state(late) == "expired"
    said = {entry.body["state"] for entry in here.ledger.log.entries() if "state" in entry.body}
    assert said == {state.value for state in State}
    assert here.sound()


@pytest.mark.parametrize("kind", ["shards", "slices", "whole", "mlp"])
def test_all_kinds_of_models_and_requests_end_in_the_bytes_of_a_training_without_the_rows(place, kind):
    here, records = place(kind), kit.digits()
    alone = records.of_owner(BOB).select([0])
    asked = {
        here.ask(Request.remove(records.of_owner(ANN).ids[:2])): set(records.of_owner(ANN).ids[:2]),
        here.ask(Request.remove_owner(CAT)): set(records.of_owner(CAT).ids),
        here.ask(Request.remove_rows(BOB, alone.x, alone.y)): set(alone.ids),
        here.ask(Request.remove_class(7)): set(records.of_class(7).ids),
    }
    assert set(here.run().completed) == set(asked)
    gone = set().union(*asked.values())
    rest = records.where(lambda record_id, _: record_id not in gone)
    assert here.served().digest() == kit.from_scratch(kit.trained(kind).recipe, rest).digest()
    assert here.served().gone == gone
    for request, ids in asked.items():
        removed = here.said(request)["removed"]
        assert removed["count"] + removed["alreadyGone"] == len(ids)
        assert here.checked(request).passed
    assert sum(here.said(request)["removed"]["count"] for request in asked) == len(gone)


def test_a_replacement_is_held_because_a_workspace_keeps_no_rows(place):
    here, row = place(), kit.digits().select([0])
    asked = here.ask(Request.replace_rows(row.ids, row.x + 1, row.y))
    assert here.run().held == (asked,)
    assert "keeps no rows" in here.filed(asked).why
    assert here.versions() == ["v0001"]


@pytest.mark.parametrize("first", ["removal", "replacement"])
def test_a_removal_and_a_replacement_of_one_record_contradict_and_the_removal_goes_on_alone(place, first):
    here, row = place("whole", count=1), kit.digits().select([0])
    filed = {"removal": Request.remove(row.ids), "replacement": Request.replace_rows(row.ids, row.x + 1, row.y)}
    ids = {name: here.ask(filed[name]) for name in sorted(filed, key=lambda name: name != first)}
    progress = here.run()
    assert (progress.completed, progress.held, progress.failed) == ((ids["removal"],), (ids["replacement"],), ())
    assert here.said(ids["removal"])["removed"]["count"] == 1
    why = here.filed(ids["replacement"]).why
    assert "cannot be carried out as it stands: a workspace keeps no rows" in why
    here.ledger.requests.release(ids["replacement"])
    assert here.run().held == (ids["replacement"],)
    assert here.workspace.asked(ids["replacement"]).kind == "replace"
    assert here.sound()


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request.remove(["no-such-record"]), "no-such-record"),
        (Request.remove_owner("no-such-owner"), "no-such-owner"),
        (Request.remove_rows(ANN, torch.zeros(1, 8, 8), torch.tensor([0])), "none of the 1 rows"),
    ],
    ids=["id", "owner", "rows"],
)
def test_what_was_never_there_is_held_with_the_reason(place, request_, why):
    here = place()
    asked = here.ask(request_)
    assert here.run().held == (asked,)
    assert here.state(asked) == "held"
    assert why in here.filed(asked).why
    assert here.ledger.requests.deny(asked, "no_match").state is State.DENIED


def test_a_request_for_all_that_there_is_is_held(place):
    here = place()
    asked = [here.ask(Request.remove(kit.digits().ids))]
    assert here.run().held == tuple(asked)
    assert "retire the model instead" in here.filed(asked[0]).why


def test_what_is_gone_already_is_completed_with_no_record_and_no_claim(place):
    here = place()
    first = here.honour(Request.remove_owner(ANN))
    digest, version = here.served().digest(), here.ledger.models.served(kit.MODEL).version
    again = here.honour(Request.remove(kit.digits().of_owner(ANN).ids))
    said = here.said(again)
    assert said["removed"] == {"count": 0, "commitmentRoot": said["removed"]["commitmentRoot"], "alreadyGone": ANNS}
    assert here.said(first)["removed"]["count"] == ANNS
    assert (said["claim"]["level"], said["claim"]["exactness"], said["claim"]["guarantee"]) == ("none", None, None)
    assert said["dataset"]["before"] == said["dataset"]["after"]
    assert said["dataset"]["rowsRead"] is None
    assert said["modelBefore"]["digest"]["sha256"] == digest == here.served().digest()
    assert here.ledger.models.served(kit.MODEL).version == version
    checked = here.checked(again)
    assert checked.passed
    assert any("the same as before" in line for line in checked.not_proved)
    assert here.sound()


@pytest.mark.parametrize("most", [10, 1])
def test_two_requests_that_name_the_same_record_are_both_completed(place, most):
    here = place(count=2, most=most)
    first, second = (here.ask(Request.remove_owner(ANN), key=key) for key in "ab")
    assert set(here.run(now=True).completed) == {first, second}
    counts = [(here.said(one)["removed"]["count"], here.said(one)["removed"]["alreadyGone"]) for one in (first, second)]
    assert counts == [(ANNS, 0), (0, ANNS)]
    assert here.checked(first).passed
    assert here.checked(second).passed


ANNS_ROWS = kit.digits().of_owner(ANN)
WAITING = {
    "owner": Request.remove_owner(ANN),
    "ids": Request.remove(ANNS_ROWS.ids[1:]),
    "rows": Request.remove_rows(ANN, ANNS_ROWS.x[:2], ANNS_ROWS.y[:2]),
}


@pytest.mark.parametrize("waiting", WAITING.values(), ids=WAITING)
def test_a_request_that_waits_for_a_person_does_not_stop_another_about_the_same_owner(place, waiting):
    here = place("whole")
    screen = kit.Says("screen", [Held(why="odd"), kit.Says("screen").outcomes[0]])
    waits = here.ask(waiting, key="a")
    goes = here.ask(Request.remove_owner(ANN), key="b")
    progress = here.run(stages=[screen])
    assert progress.held == (waits,)
    assert progress.completed == (goes,)
    here.ledger.requests.release(waits)
    assert here.run(stages=[screen]).completed == (waits,)
    assert here.said(waits)["removed"]["count"] == 0
    assert kit.holding(here.root, kit.traces(ANNS_ROWS)) == []


def test_what_a_waiting_request_names_is_still_found_in_other_files(place):
    here = place("whole")
    screen = kit.Says("screen", [Held(why="odd"), kit.Says("screen").outcomes[0]])
    here.ask(Request.remove_owner(ANN), key="a")
    goes = here.ask(Request.remove_owner(ANN), key="b")
    (here.root / "notes.txt").write_text(f"ask {ANN} again")
    with pytest.raises(erasure.Leftovers, match=r"notes\.txt"):
        here.run(stages=[screen])
    (here.root / "notes.txt").unlink()
    assert here.run(stages=[screen]).completed == (goes,)


def test_a_request_that_cannot_be_read_stops_no_other(place):
    here = place("whole")
    odd = here.ask(Request.remove_rows(BOB, torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.int64)))
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run().completed[-1:] == (asked,)
    assert here.state(odd) in ("held", "completed")


def test_the_same_key_files_once_and_another_body_is_refused(place):
    here = place()
    one = here.ask(Request.remove_owner(ANN), key="k")
    assert here.ask(Request.remove_owner(ANN), key="k") == one
    with pytest.raises(Misuse, match="used before"):
        here.ask(Request.remove_owner(BOB), key="k")
    with pytest.raises(UnknownRecord, match="no model"):
        here.workspace.file("others", Request.remove_owner(ANN))


def test_a_run_begins_when_enough_requests_wait_and_calls_the_method_once(place):
    here, method = place(count=3), kit.CountedSisa()
    asked = [here.ask(Request.remove_owner(owner)) for owner in (ANN, BOB)]
    assert here.run(method=method).waiting == tuple(asked)
    assert method.calls == []
    asked.append(here.ask(Request.remove_owner(CAT)))
    assert here.run(method=method).completed == tuple(asked)
    assert len(method.calls) == 1
    runs = {here.said(one)["run"]["id"]: here.said(one)["run"]["requests"] for one in asked}
    assert list(runs.values()) == [3]
    assert here.kinds().count("switched") == 1
    assert all(here.checked(one).passed for one in asked)


def test_a_run_begins_when_the_oldest_request_has_waited_long_enough(place):
    here, method = place(count=10, wait_hours=24), kit.CountedSisa()
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(method=method).waiting == (asked,)
    here.time.at_s += 24 * kit.HOUR_S - 1
    assert here.run(method=method).waiting == (asked,)
    here.time.at_s += 1
    assert here.run(method=method).completed == (asked,)
    assert len(method.calls) == 1


def test_a_run_honours_at_most_so_many_and_begins_at_once_if_asked_to(place):
    here, method = place(count=10, most=2), kit.CountedSisa()
    asked = [here.ask(Request.remove_owner(owner)) for owner in (ANN, BOB, CAT)]
    assert here.run(method=method).waiting == tuple(asked)
    assert here.run(method=method, now=True).completed == tuple(asked)
    assert len(method.calls) == 2
    assert [here.said(one)["run"]["requests"] for one in asked] == [2, 2, 1]


def test_exact_requests_come_first_and_apart_and_do_not_wait(place):
    here, method, exact = place(count=3), kit.CountedSisa(), kit.CountedRetrain()
    screen = kit.Says("screen", [kit.Says("screen").outcomes[0], Held(why="odd"), kit.Says("screen").outcomes[0]])
    plain = here.ask(Request.remove_owner(ANN))
    flagged = here.ask(Request.remove_owner(BOB))
    assert here.run(method=method, exact=exact, stages=[screen]).held == (flagged,)
    here.ledger.requests.release(flagged, exact=True)
    progress = here.run(method=method, exact=exact, stages=[screen])
    assert progress.completed[0] == flagged
    assert len(exact.calls) == 1
    assert here.said(flagged)["method"]["name"] == "counted-retrain"
    other = here.ask(Request.remove_owner(CAT))
    done = (*progress.completed, *here.run(method=method, exact=exact, stages=[screen], now=True).completed)
    assert done == (flagged, plain, other)
    assert here.said(plain)["method"]["name"] == "counted-sisa"
    assert here.said(plain)["run"]["id"] != here.said(flagged)["run"]["id"]


def test_a_method_that_proves_nothing_claims_nothing_and_is_not_witnessed(place):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), method=kit.fine_tune())
    said, checked = here.said(asked), here.checked(asked)
    assert (said["claim"]["level"], said["claim"]["exactness"]) == ("none", None)
    assert said["claim"]["caveat"].startswith("No claim")
    assert said["dataset"]["rowsRead"] is None
    assert checked.passed
    assert "NOT witnessed" in str(checked)
    assert "what rows training read: nobody watched it" in checked.not_proved
    exact = here.honour(Request.remove_owner(BOB))
    assert here.said(exact)["claim"]["level"] == "exact"
    assert here.served().digest() == kit.from_scratch(kit.trained("whole").recipe, rest_of(ANN, BOB)).digest()


RESIDUAL, STEPS, UNNOISED = 0.7310585786300049, 918273645, torch.linspace(-3.25, 9.125, 37)
GUARANTEE = Guarantee(
    epsilon=1.5,
    delta=1e-5,
    mu=0.5,
    sigma=2.0,
    sensitivity=0.25,
    mechanism="gaussian",
    reference="retraining",
    parameters=("0.weight",),
    releases="current",
    constants={"strong convexity": Constant(0.01, "proved", "setting recipe.weight_decay")},
)


@dataclass(frozen=True, kw_only=True)
class Solved(Event):
    """What a solver of a certified method saw, and nobody else may."""

    residual: float
    steps: int
    unnoised: str


@dataclass(frozen=True, kw_only=True)
class Certified(Method):
    """A method of the library with a proof, and with secrets wherever one can be put."""

    claim = Claim.CERTIFIED

    def _apply(self, task, *, rng):
        return Done(trained=_noised(task.trained), guarantee=GUARANTEE, events=_EVENTS)


class Foreign:
    """A method from elsewhere with a proof, and with secrets in its cost and its log too."""

    claim = Claim.CERTIFIED
    needs = frozenset()
    name = "foreign"

    def supports(self, trained):
        return None

    def __call__(self, trained, records, request, *, rng):
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        left = frozenset(split.retain.ids)
        log = TrainingLog(steps=STEPS, rows_read=STEPS, threads=1, losses=(RESIDUAL,), checkpoints={1: _SECRET})
        after = replace(_noised(trained), ids=left, gone=trained.gone | set(split.forget.ids), log=log, seal=None)
        return Unlearned(
            trained=after,
            claim=Claim.CERTIFIED,
            exactness=None,
            guarantee=GUARANTEE,
            cost=Cost(seconds=RESIDUAL, gradients=STEPS, rows_read=STEPS),
            events=_EVENTS,
        )


_SECRET = {"0.weight": UNNOISED}
_EVENTS = (Solved(residual=RESIDUAL, steps=STEPS, unnoised=digest_tensors(_SECRET)),)


def _noised(trained):
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(0.5)
    return replace(trained, secret=_SECRET)


def secrets():
    digest = digest_tensors(_SECRET)
    found = {digest.encode(), bytes.fromhex(digest), str(STEPS).encode(), str(RESIDUAL).encode()}
    found |= {
        STEPS.to_bytes(8, "little"),
        b"0.73105857",
        UNNOISED.numpy().tobytes(),
        UNNOISED.double().numpy().tobytes(),
    }
    return found


@pytest.mark.parametrize("method", [Certified(), Foreign()], ids=["ours", "foreign"])
def test_of_a_certified_method_nothing_secret_is_written_anywhere(place, method):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), method=method)
    said = here.said(asked)["claim"]
    assert said["level"] == "certified"
    assert said["guarantee"]["epsilon"] == "1.5"
    assert said["guarantee"]["basis"] == "proved"
    assert here.checked(asked).passed
    bundle = here.ledger.certificates.bundle(asked)
    payload = json.dumps(here.statement(asked)).encode()
    assert [one for one in secrets() if one in bundle or one in payload] == []
    assert kit.holding(here.root, secrets()) == []
    with sqlite3.connect(here.root / "ledger.db") as base:
        dump = "\n".join(base.iterdump()).encode()
    base.close()
    assert [one for one in secrets() if one in dump or one.hex().encode() in dump.lower()] == []
    assert here.served().secret == {}


def test_the_search_for_secrets_finds_one(place):
    here = place("whole")
    for one in secrets():
        (here.root / "notes.bin").write_bytes(b"x" + one + b"y")
        assert kit.holding(here.root, [one]) == [("notes.bin", one)]


def test_what_it_cost_is_said_nowhere(place):
    here = place()
    text = json.dumps(here.statement(here.honour(Request.remove_owner(ANN)))).lower()
    text += json.dumps([entry.to_json() for entry in here.ledger.log.entries()]).lower()
    with sqlite3.connect(here.root / "ledger.db") as base:
        text += json.dumps(base.execute("SELECT detail FROM run").fetchall()).lower()
    base.close()
    for word in ("cost", "seconds", "gradient", "duration", "elapsed"):
        assert word not in text


STEPS_OF_A_RUN = ("unlearn", "verify", "switch", "erase", "complete")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS_OF_A_RUN)
def test_interrupted_at_a_step_it_goes_on_and_its_effect_happens_once(place, monkeypatch, step, after):
    here, method = place(), kit.CountedSisa()
    asked = here.ask(Request.remove_owner(ANN))
    journey = here.journey(method=method)
    honest = getattr(Steps, step)

    def interrupted(self, run):
        if after:
            honest(self, run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Steps, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            journey.run("first")
    assert here.run("second", method=method).completed == (() if (step, after) == ("complete", True) else (asked,))
    carried_out_once(here, asked)
    assert len(method.calls) == 1


def carried_out_once(here, asked):
    assert here.state(asked) == "completed"
    assert here.kinds().count("completed") == here.kinds().count("switched") == 1
    assert here.ledger.models.served(kit.MODEL).version == 2
    assert here.served().digest() == kit.from_scratch(kit.trained().recipe, rest_of(ANN)).digest()
    assert len(here.versions()) == 1
    assert here.said(asked)["removed"]["count"] == ANNS
    assert [message["topic"] for message in here.ledger.requests.outbox()] == ["completed"]
    assert here.checked(asked).passed
    assert here.sound()


INNER = [(Runs, "erase_bodies"), (Runs, "complete"), (Workspace, "keep")]
WRITES = [(Runs, "record", number, False) for number in range(1, 5)]
WRITES += [(Runs, "verifying", 1, False), (Models, "switch", 1, False)]
WRITES += [(kind, name, 1, after) for kind, name in INNER for after in (False, True)]


@pytest.mark.parametrize(
    ("kind", "name", "number", "after"), WRITES, ids=[f"{'after' if w[3] else 'before'}-{w[1]}-{w[2]}" for w in WRITES]
)
def test_interrupted_at_any_write_it_goes_on_and_its_effect_happens_once(place, monkeypatch, kind, name, number, after):
    here, method = place(), kit.CountedSisa()
    asked = here.ask(Request.remove_owner(ANN))
    honest, seen = getattr(kind, name), []

    def interrupted(self, *given, **named):
        seen.append(name)
        if len(seen) != number:
            return honest(self, *given, **named)
        if after:
            honest(self, *given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kind, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.run("first", method=method)
    here.run("second", method=method)
    carried_out_once(here, asked)
    assert len(method.calls) <= 2


def test_what_was_retired_just_before_an_interruption_is_still_named_in_the_certificate(place, monkeypatch):
    here = place()
    asked = here.ask(Request.remove_owner(ANN))
    honest = erasure.retire

    def interrupted(*given):
        honest(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(erasure, "retire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.run("first")
    assert here.run("second").completed == (asked,)
    assert {"what": "model version", "name": f"{kit.MODEL}/v0001"} in here.said(asked)["retired"]


class Registry:
    """A mirror that notes what is done to it."""

    name = "registry:digits"

    def __init__(self, here):
        self.here, self.done = here, []

    def publish(self, folder, digest, tags):
        assert self.here.workspace.root in folder.parents
        self.done.append(("publish", digest, dict(tags)))
        return "7"

    def serve(self, version):
        self.done.append(("serve", version))

    def retire(self, keep):
        self.done.append(("retire", keep))
        return ("registry:digits version 6",)

    def certify(self, version, certificate):
        self.done.append(("certify", version, certificate))


def test_a_mirror_publishes_serves_retires_and_is_certified_in_this_order(place):
    here = place(count=2)
    mirror = Registry(here)
    asked = [here.ask(Request.remove_owner(owner)) for owner in (ANN, BOB)]
    assert here.run(mirror=mirror).completed == tuple(asked)
    assert [one[0] for one in mirror.done] == ["publish", "serve", "retire", "certify"]
    _, digest, tags = mirror.done[0]
    assert digest == here.served().digest()
    assert tags == {"unlearn.parent_version": "1", "unlearn.request_ids": ",".join(asked)}
    assert {one[1] for one in mirror.done[1:]} == {"7"}
    for one in asked:
        assert {"what": "mirror version", "name": "registry:digits version 6"} in here.said(one)["retired"]
        assert {"what": "model version", "name": f"{kit.MODEL}/v0001"} in here.said(one)["retired"]
        assert here.checked(one).passed


def test_after_the_mirror_failed_all_of_it_is_done_again_before_the_certificate(place, monkeypatch):
    here = place()
    mirror = Registry(here)
    asked = here.ask(Request.remove_owner(ANN))
    with monkeypatch.context() as patched:
        patched.setattr(mirror, "serve", lambda version: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(ConnectionError):
            here.run(mirror=mirror)
    assert here.state(asked) == "verifying"
    assert here.run(mirror=mirror).completed == (asked,)
    assert [one[0] for one in mirror.done] == ["publish", "publish", "serve", "retire", "certify"]


def test_a_whole_journey_on_postgresql(tmp_path, postgres_url):
    workspace = Workspace.init(tmp_path / "ws", url=postgres_url, keys=kit.KEYS)
    workspace.register(kit.MODEL, kit.trained(), kit.digits())
    workspace.close()
    here = kit.Place(tmp_path / "ws", kit.digits())
    asked = [here.ask(Request.remove_owner(owner)) for owner in (ANN, BOB)]
    assert here.run().completed == tuple(asked)
    for one in asked:
        assert here.checked(one).passed
        assert here.said(one)["claim"]["level"] == "exact"
    assert here.served().digest() == kit.from_scratch(kit.trained().recipe, rest_of(ANN, BOB)).digest()
    assert not (tmp_path / "ws" / "ledger.db").exists()
    assert kit.holding(here.root, kit.traces(kit.digits().where(lambda _, owner: owner in (ANN, BOB)))) == []
    assert here.sound()
    here.close()


def test_the_keys_to_removed_records_are_kept_for_their_owner_and_then_destroyed(place):
    here = place(keys_days=30)
    asked = here.honour(Request.remove_owner(ANN))
    keys = json.loads(here.ledger.certificates.record_keys(asked))["keys"]
    assert len(keys) == ANNS
    here.time.at_s += 29 * kit.DAY_S
    here.run()
    assert json.loads(here.ledger.certificates.record_keys(asked))["keys"] == keys
    here.time.at_s += 2 * kit.DAY_S
    here.run()
    with pytest.raises(Misuse, match="were destroyed"):
        here.ledger.certificates.record_keys(asked)
    assert here.checked(asked).passed
    assert here.sound()


def test_a_journey_knows_its_stages_and_wants_an_exact_method(place):
    here = place()
    with pytest.raises(Misuse, match='no stage "polish"'):
        here.journey(stages=[kit.Says("polish")])
    with pytest.raises(Misuse, match="exact method, got fine-tune"):
        here.journey(exact=kit.fine_tune())


def test_a_method_that_cannot_work_on_the_model_fails_the_run_and_says_what_can(place):
    here = place("whole")
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(method=Sisa()).failed == (asked,)
    assert "use retrain" in here.filed(asked).why
    here.ledger.requests.release(asked)
    assert here.run(method=Retrain()).completed == (asked,)


REQUESTS = st.one_of(
    st.sampled_from(OWNERS[:8]).map(Request.remove_owner),
    st.lists(st.sampled_from(kit.digits().ids[:40]), min_size=1, max_size=4, unique=True).map(Request.remove),
    st.sampled_from([3, 8]).map(Request.remove_class),
)


@settings(
    max_examples=3,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(stream=st.lists(st.lists(REQUESTS, min_size=1, max_size=3), min_size=2, max_size=2), repeat=st.booleans())
def test_gone_stays_gone_whatever_is_asked_in_whatever_order(place, stream, repeat):
    here, gone, asked = place(), set(), []
    for batch in [*stream, stream[0]] if repeat else stream:
        asked += [here.ask(request) for request in batch]
        here.run(now=True)
        before = gone
        gone = gone.union(*(set(request.named(kit.digits())) for request in batch))
        assert before <= here.served().gone == gone
    assert [here.state(one) for one in asked] == ["completed"] * len(asked)
    assert all(here.checked(one).passed for one in asked)
    assert here.kinds().count("completed") == len(asked)
    assert sum(here.said(one)["removed"]["count"] for one in asked) == len(gone)
    rest = kit.digits().where(lambda record_id, _: record_id not in gone)
    assert here.served().digest() == kit.from_scratch(kit.trained().recipe, rest).digest()
    assert here.sound()
