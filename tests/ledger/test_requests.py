"""Requests are filed once each, move only as the table of states says, and leave nothing personal behind."""

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from expunge.core.errors import Impossible, Misuse, NotNow, OtherBody, UnknownRecord
from expunge.ledger import states
from expunge.ledger.clock import CCPA, Clock
from expunge.ledger.requests import Submission
from expunge.ledger.states import STEPS, State
from expunge.ledger.tables import request as requests
from tests.ledger import kit


def submission(body, key, **given):
    return Submission(**{"model": "m", "kind": "remove", "body": body, "key": key, **given})


def put(ledger, request, state):
    """Set a request into a state behind the ledger's back."""
    with ledger.database.write() as connection:
        connection.execute(requests.update().where(requests.c.id == request).values(state=state.value))


def test_the_same_key_and_body_give_the_same_answer_and_another_body_files_nothing(ledger):
    first, new = ledger.requests.submit(submission(b"one", "k"))
    assert new
    before = kit.tables(ledger)
    assert ledger.requests.submit(submission(b"one", "k")) == (first, False)
    assert ledger.requests.by_key("k") == first
    assert ledger.requests.by_key("l") is None
    with pytest.raises(OtherBody, match="key was used before"):
        ledger.requests.submit(submission(b"two", "k"))
    batch = [submission(b"%d" % i, f"k{i}") for i in range(5)]
    with pytest.raises(OtherBody):
        ledger.requests.submit_many([*batch[:3], submission(b"two", "k"), *batch[3:]])
    with pytest.raises(OtherBody):
        ledger.requests.submit_many([*batch, submission(b"other", "k0")])
    assert kit.tables(ledger) == before
    answers = ledger.requests.submit_many([*batch, submission(b"one", "k"), *batch])
    assert [new for _, new in answers] == [True] * 5 + [False] * 6
    assert [filed.id for filed, _ in answers[:5]] == [filed.id for filed, _ in answers[6:]]
    assert answers[5][0] == first
    assert len(kit.tables(ledger)["request"]) == 6
    keyless = {ledger.requests.submit(submission(b"same", ""))[0].id for _ in range(3)}
    assert len(keyless) == 3
    assert kit.faults(ledger) == []


def test_a_request_is_called_by_as_much_of_its_id_as_tells_it_apart(ledger):
    ids = iter(["abcd-1", "abcd-2", "abxx_3", "12345"])
    ledger.requests.new_id = lambda: next(ids)
    ledger.requests.submit_many([submission(b"one", f"k{i}") for i in range(4)])
    whole = ledger.requests.whole_id
    assert [whole("abxx"), whole("abcd-2"), whole("1234"), whole("12345")] == ["abxx_3", "abcd-2", "12345", "12345"]
    for several in ("abcd", "ab", "", "123"):
        with pytest.raises(Misuse, match="could be another request"):
            whole(several)
    for none in ("abxx%", "abx__", "zzzz"):
        with pytest.raises(UnknownRecord, match="there is no request"):
            whole(none)


def test_a_key_is_remembered_after_its_request_is_done_and_its_body_erased(ledger):
    [done] = kit.ready(ledger, "r-1")
    kit.carry_out(ledger)
    again, new = ledger.requests.submit(submission(kit.asking("r-1"), "key of r-1"))
    assert (again.id, again.state, new) == (done, State.COMPLETED, False)
    with pytest.raises(OtherBody):
        ledger.requests.submit(submission(kit.asking("r-2"), "key of r-1"))


def test_twenty_threads_file_under_one_key_at_once_and_one_request_is_filed(url):
    ledger = kit.opened(url)
    before, together = len(ledger.log), threading.Barrier(20)
    answers = []

    def send():
        together.wait()
        answers.append(ledger.requests.submit(submission(b"one", "k")))

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert len({filed for filed, _ in answers}) == 1
    assert sorted(new for _, new in answers) == [False] * 19 + [True]
    held = kit.tables(ledger)
    assert (len(held["request"]), len(held["body"]), len(ledger.log) - before) == (1, 1, 1)
    ledger.close()


@pytest.mark.parametrize("state", State)
def test_every_step_is_allowed_or_refused_as_the_table_says(state):
    for to in State:
        if to in STEPS[state]:
            states.refuse_step("x", state, to)
        else:
            with pytest.raises(NotNow, match=f"x is {state.value} and cannot become {to.value}"):
                states.refuse_step("x", state, to)


def _moves(ledger, one, state):
    screened = state is State.SCREENING
    return {
        State.CANCELLED: lambda: ledger.requests.cancel(one),
        State.DENIED: lambda: ledger.requests.deny(one, "no_match"),
        State.SCREENING: lambda: ledger.requests.screening(one),
        State.HELD: lambda: ledger.requests.screened(one, held="looks odd"),
        State.PENDING: lambda: ledger.requests.screened(one, held=None) if screened else ledger.requests.release(one),
        State.RECEIVED: lambda: ledger.requests.verify_identity(one),
    }


def test_every_door_refuses_every_step_that_the_table_refuses_and_changes_nothing(ledger):
    one = kit.file(ledger, "r-1", identified=False).id
    for state in State:
        put(ledger, one, state)
        before = kit.tables(ledger)
        for to, move in _moves(ledger, one, state).items():
            if to not in STEPS[state] and to is not state:
                with pytest.raises(NotNow):
                    move()
        assert kit.tables(ledger) == before, state


def test_every_door_takes_every_step_that_the_table_allows_and_says_so_in_the_log(ledger):
    names = (f"r-{number}" for number in range(100))
    for state in State:
        for to in STEPS[state]:
            one = kit.file(ledger, next(names), identified=False).id
            put(ledger, one, state)
            if to in (moves := _moves(ledger, one, state)):
                anew = state is State.HELD and to is State.PENDING  # no stage had judged it: it is screened first
                then = State.SCREENING if anew else to
                assert moves[to]().state is then, (state, to)
                assert list(ledger.log.entries(one))[-1].body["state"] == then.value


def test_what_is_final_is_never_left():
    assert {state for state in State if state.final} == {
        State.COMPLETED,
        State.CANCELLED,
        State.EXPIRED,
        State.DENIED,
    }


def test_every_listed_reason_denies_and_who_asked_is_told(ledger):
    for number, reason in enumerate(states.DENIALS):
        one = kit.file(ledger, f"r-{number}", identified=False).id
        denied = ledger.requests.deny(one, reason)
        assert (denied.state, denied.why) == (State.DENIED, reason)
        [message] = [row for row in ledger.requests.outbox() if row["request"] == one]
        assert (message["topic"], json.loads(message["data"])) == ("denied", {"reason": reason})
        with pytest.raises(UnknownRecord, match="erased"):
            ledger.requests.body(one)
    assert kit.faults(ledger) == []


def test_a_screens_flag_is_no_reason_in_any_state_and_fraud_only_while_the_identity_is_unverified(ledger):
    one = kit.file(ledger, "r-1", identified=False).id
    for state in State:
        put(ledger, one, state)
        before = kit.tables(ledger)
        for flag in sorted(states._OF_A_SCREEN):
            with pytest.raises(Impossible, match="exact retraining"):
                ledger.requests.deny(one, flag)
        if state is not State.IDENTITY_UNVERIFIED:
            with pytest.raises(Impossible):
                ledger.requests.deny(one, "suspected_fraud")
        with pytest.raises(Misuse, match="is no reason"):
            ledger.requests.deny(one, "we would rather not")
        assert kit.tables(ledger) == before
    assert set(states._OF_A_SCREEN).isdisjoint(states.DENIALS)


def test_while_the_identity_is_in_doubt_the_legal_clock_stands_still(ledger, time):
    plain = kit.file(ledger, "r-0")
    doubted = kit.file(ledger, "r-1", identified=False)
    assert (doubted.state, doubted.due_at) == (State.IDENTITY_UNVERIFIED, plain.due_at)
    time.at_s += 10 * kit.DAY_S
    verified = ledger.requests.verify_identity(doubted.id)
    assert verified.state is State.RECEIVED
    later = ledger.requests.clock.due(datetime.fromtimestamp(kit.START_S, UTC), paused=timedelta(days=10))
    assert verified.due_at == later.strftime("%Y-%m-%dT%H:%M:%S.%fZ") > plain.due_at
    with pytest.raises(NotNow):
        ledger.requests.verify_identity(doubted.id)
    assert ledger.requests.get(plain.id) == plain
    assert kit.faults(ledger) == []


def test_a_regime_that_does_not_pause_runs_on(url, time):
    ledger = kit.opened(url, now=time, clock=Clock(regime=CCPA))
    doubted = kit.file(ledger, "r-1", identified=False)
    time.at_s += 10 * kit.DAY_S
    assert ledger.requests.verify_identity(doubted.id).due_at == doubted.due_at
    ledger.close()


def test_a_period_is_extended_once_in_its_first_part_and_who_asked_is_told(ledger, time):
    one, other, done = (kit.file(ledger, name) for name in ("r-0", "r-1", "r-2"))
    time.at_s += 20 * kit.DAY_S
    longer = ledger.requests.extend(one.id, "many requests")
    assert longer.extended
    assert longer.due_at > one.due_at
    [message] = ledger.requests.outbox()
    assert (message["request"], message["topic"]) == (one.id, "extended")
    assert json.loads(message["data"]) == {"why": "many requests", "due_at": longer.due_at}
    ledger.requests.cancel(done.id)
    before = kit.tables(ledger)
    for request in (one.id, done.id):
        with pytest.raises(NotNow, match="cannot be extended"):
            ledger.requests.extend(request, "again")
    time.at_s += 30 * kit.DAY_S
    with pytest.raises(NotNow, match="cannot be extended"):
        ledger.requests.extend(other.id, "too late")
    assert kit.tables(ledger) == before
    ledger.requests.sent(message["id"])
    assert [row["topic"] for row in ledger.requests.outbox()] == ["cancelled"]
    assert kit.faults(ledger) == []


def test_a_request_is_taken_back_until_it_runs_and_not_after(ledger):
    one, held, failed, running = kit.ready(ledger, "r-0", "r-1", "r-2", "r-3")
    fresh = kit.file(ledger, "r-4").id
    put(ledger, held, State.HELD)
    put(ledger, failed, State.FAILED)
    for request in (one, held, failed, fresh):
        assert ledger.requests.cancel(request).state is State.CANCELLED
    run = ledger.runs.claim("m", "w")
    assert run.requests == (running,)
    for _ in range(2):
        with pytest.raises(NotNow):
            ledger.requests.cancel(running)
        ledger.runs.verifying(run)
    kit.finish(ledger, run)
    with pytest.raises(NotNow, match="nothing: it is final"):
        ledger.requests.cancel(running)


def test_those_who_never_prove_who_they_are_expire(ledger, time):
    old = kit.file(ledger, "r-0", identified=False)
    proved = kit.file(ledger, "r-1", identified=False)
    ledger.requests.verify_identity(proved.id)
    time.at_s += 5 * kit.DAY_S
    young = kit.file(ledger, "r-2", identified=False)
    ended = ledger.requests.expire(datetime.fromtimestamp(kit.START_S + kit.DAY_S, UTC))
    assert [(one.id, one.state) for one in ended] == [(old.id, State.EXPIRED)]
    assert ledger.requests.get(young.id) == young
    assert [row["topic"] for row in ledger.requests.outbox()] == ["expired"]
    assert kit.faults(ledger) == []


def test_a_released_request_runs_again_and_the_log_agrees_at_every_step(ledger):
    [one] = kit.ready(ledger, "r-0")
    ledger.runs.fail(ledger.runs.claim("m", "w"), "the power went")
    assert ledger.requests.get(one).why == "the power went"
    assert kit.faults(ledger) == []
    released = ledger.requests.release(one, exact=True)
    assert (released.state, released.exact, released.run, released.why) == (State.PENDING, True, None, None)
    assert kit.faults(ledger) == []
    run = ledger.runs.claim("m", "w")
    assert run.exact
    ledger.runs.verifying(run)
    ledger.runs.withhold(run, "the audit failed")
    assert ledger.requests.release(one).exact
    kit.carry_out(ledger)
    assert kit.kinds(ledger, one) == [
        *("received", "screening", "screened", "running", "failed", "released", "running", "verifying", "withheld"),
        *("released", "running", "verifying", "completed"),
    ]
    assert kit.faults(ledger) == []


def test_what_a_request_says_of_itself_is_checked_when_it_is_filed(ledger):
    tomorrow = datetime.fromtimestamp(kit.START_S, UTC) + timedelta(days=2)
    before = kit.tables(ledger)
    with pytest.raises(Misuse, match="in the future"):
        ledger.requests.submit(submission(b"one", "k", received_at=tomorrow))
    for unknown in (ledger.requests.get, ledger.requests.cancel, ledger.requests.body):
        with pytest.raises(UnknownRecord):
            unknown("nobody")
    assert kit.tables(ledger) == before
    last_week = datetime.fromtimestamp(kit.START_S, UTC) - timedelta(days=7)
    filed, _ = ledger.requests.submit(submission(b"one", "k", received_at=last_week))
    assert filed.due_at < kit.file(ledger, "r-0").due_at


MARKS = {name: f"PERSONAL-{name}-7b1f" for name in ("completed", "cancelled", "denied", "expired")}


def _personal(ledger):
    """A request that ends in each way, whose body and key hold a mark to look for."""
    ids = {}
    for number, (end, mark) in enumerate(MARKS.items()):
        given = {
            "key": f"key {mark}",
            "identified": end != "expired",
            "body": json.dumps([f"r-{number}", mark]).encode(),
        }
        ids[end] = kit.file(ledger, f"r-{number}", **given).id
    yield ids
    ledger.requests.cancel(ids["cancelled"])
    ledger.requests.deny(ids["denied"], "no_match")
    ledger.requests.expire(datetime.fromtimestamp(kit.START_S + 1, UTC))
    ledger.requests.screening(ids["completed"])
    ledger.requests.screened(ids["completed"], held=None)
    run = ledger.runs.claim("m", "w")
    names = {ids["completed"]: [kit.KEYS.pseudonym("r-0")]}
    kit.finish(ledger, ledger.runs.record(run, "unlearned", **kit.plan(ledger, run, names)))
    ledger.certificates.sign()
    yield ids


def _bytes_of(ledger, url, server):
    """All that the database keeps on the disk, PostgreSQL's write-ahead log left out."""
    if ledger.database.on_sqlite:
        return b"".join(path.read_bytes() for path in kit.files_of(url))
    with ledger.database.engine.connect() as plain:
        connection = plain.execution_options(isolation_level="AUTOCOMMIT")
        number = connection.execute(sa.text("SELECT oid FROM pg_database WHERE datname = current_database()")).scalar()
        connection.execute(sa.text("CHECKPOINT"))
    return b"".join(path.read_bytes() for path in (Path(server) / "data" / "base" / str(number)).iterdir())


def test_nothing_personal_stays_in_the_database_once_a_request_is_done(url, request, ledger):
    server = None if ledger.database.on_sqlite else request.getfixturevalue("postgres_server").folder
    open_still = kit.file(ledger, "r-9", body=b"still open", key="another").id
    steps = _personal(ledger)
    next(steps)
    for mark in MARKS.values():
        assert mark.encode() in _bytes_of(ledger, url, server)
    next(steps)
    ledger.database.forget_pages()
    held = repr(kit.tables(ledger)).encode()
    on_disk = _bytes_of(ledger, url, server)
    for mark in (*MARKS.values(), "key of r-9"):
        assert mark.encode() not in held
        assert mark.encode() not in on_disk
    assert ledger.requests.body(open_still) == b"still open"
    assert b"still open" in on_disk
    assert kit.faults(ledger) == []
