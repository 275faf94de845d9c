"""A run belongs to one worker at a time: who lost it can change nothing, and it ends whole or not at all."""

import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from expunge.core.errors import NotNow, Overtaken
from expunge.ledger import check, jobs
from expunge.ledger.database import Database
from expunge.ledger.models import Served
from expunge.ledger.requests import Requests
from expunge.ledger.states import State
from expunge.ledger.tables import run as runs
from tests.ledger import kit


def writes(ledger, run):
    """Everything that a worker can do with its run."""
    served = Served(name="m", version=ledger.models.served("m").version + 1, digest="c" * 64, folder="other")
    return {
        "renew": lambda: ledger.runs.renew(run),
        "record": lambda: ledger.runs.record(run, "verified", found=1),
        "verifying": lambda: ledger.runs.verifying(run),
        "switch": lambda: ledger.models.switch(run, served, frozenset()),
        "fail": lambda: ledger.runs.fail(run, "no"),
        "withhold": lambda: ledger.runs.withhold(run, "no"),
        "complete": lambda: ledger.runs.complete(
            run, {one: jobs.Statement(payload=b"{}", removed=[]) for one in run.requests}, b"{}"
        ),
    }


def refused(ledger, run):
    """Which of a worker's writes were refused as Overtaken and changed nothing."""
    found = set()
    for name, write in writes(ledger, run).items():
        before = kit.tables(ledger)
        try:
            write()
        except Overtaken:
            assert kit.tables(ledger) == before
            found.add(name)
    return found


def test_a_run_is_taken_over_when_its_lease_is_over_and_the_old_worker_can_change_nothing(ledger, time):
    [one] = kit.ready(ledger, "r-0")
    first = ledger.runs.claim("m", "first", lease_s=10)
    assert (first.requests, first.fence, first.step, first.detail) == ((one,), 1, "claimed", {})
    for gone_s in (0, 9.9, 0.09):
        time.at_s += gone_s
        assert ledger.runs.claim("m", "second") is None
    first = kit.advance(ledger, first)
    time.at_s += 1
    second = ledger.runs.claim("m", "second", lease_s=10)
    assert second == replace(first, worker="second", fence=2)
    assert refused(ledger, first) == set(writes(ledger, first))
    kit.finish(ledger, second)
    assert refused(ledger, second) == set(writes(ledger, second))
    assert kit.faults(ledger) == []


def test_who_holds_a_run_can_do_all_those_writes(ledger, time):
    """The liar of the test above: were the writes refused for another reason, this would show it."""
    for name in writes(ledger, kit.Run(**dict.fromkeys(kit.Run.__dataclass_fields__, ()))):
        kit.ready(ledger, f"r-of-{name}")
        run = ledger.runs.claim("m", "w", lease_s=10)
        if name in ("withhold", "complete"):
            ledger.runs.verifying(run)
        before = kit.tables(ledger)
        time.at_s += 1
        writes(ledger, run)[name]()
        assert kit.tables(ledger) != before, name
        with ledger.database.write() as connection:
            connection.execute(runs.update().values(state="done"))


def test_a_renewed_lease_lasts_and_a_worker_that_starts_again_need_not_wait(ledger, time):
    kit.ready(ledger, "r-0")
    run = ledger.runs.claim("m", "w", lease_s=10)
    for _ in range(5):
        time.at_s += 9
        ledger.runs.renew(run, lease_s=10)
        assert ledger.runs.claim("m", "other") is None
    again = ledger.runs.claim("m", "w", lease_s=10)
    assert again == replace(run, fence=2)
    assert refused(ledger, run) == set(writes(ledger, run))


def test_two_workers_that_claim_at_once_begin_one_run(url):
    ledgers = [kit.opened(url), kit.opened(url)]
    kit.register(ledgers[0])
    for number in range(15):
        kit.ready(ledgers[0], f"r-{number}")
        together, got = threading.Barrier(2), []

        def claim(ledger, worker, together=together, got=got):
            together.wait()
            got.append(ledger.runs.claim("m", worker))

        kit.at_once(lambda: claim(ledgers[0], "a"), lambda: claim(ledgers[1], "b"))
        assert len(got) == 2
        [run] = [one for one in got if one is not None]
        assert len(run.requests) == 1
        ledgers[0].runs.fail(run, "again")
    assert len(kit.tables(ledgers[0])["run"]) == 15
    for ledger in ledgers:
        ledger.close()


def test_one_completes_a_run_while_another_claims_and_neither_waits_for_the_other_for_ever(url):
    ledgers = [kit.opened(url), kit.opened(url)]
    kit.register(ledgers[0], 40)
    for number in range(10):
        kit.ready(ledgers[0], f"r-{number}")
        run = kit.advance(ledgers[0], kit.advance(ledgers[0], ledgers[0].runs.claim("m", "a")))
        kit.ready(ledgers[0], f"r-{20 + number}")
        together, got = threading.Barrier(2), []

        def complete(run=run, together=together):
            together.wait()
            kit.finish(ledgers[0], run)

        def claim(together=together, got=got):
            together.wait()
            got.append(ledgers[1].runs.claim("m", "b"))

        kit.at_once(complete, claim)
        [new] = got
        kit.finish(ledgers[1], new or ledgers[1].runs.claim("m", "b"))
    assert kit.faults(ledgers[0]) == []
    for ledger in ledgers:
        ledger.close()


def test_requests_that_need_an_exact_method_never_share_a_run_with_others_and_come_first(ledger):
    loose = kit.ready(ledger, "r-0", "r-1")
    exact = kit.ready(ledger, "r-2", "r-3", "r-4", exact=True)
    loose += kit.ready(ledger, "r-5")
    kit.register(ledger, model="other")
    [elsewhere] = kit.ready(ledger, "r-6", model="other")
    seen = []
    while (run := ledger.runs.claim("m", "w", most=2)) is not None:
        seen.append((run.exact, list(run.requests)))
        kit.finish(ledger, run)
    assert seen == [(True, exact[:2]), (True, exact[2:]), (False, loose[:2]), (False, loose[2:])]
    assert ledger.requests.get(elsewhere).state is State.PENDING
    assert ledger.runs.claim("other", "w").requests == (elsewhere,)
    assert ledger.runs.claim("nothing", "w") is None


def test_a_completion_that_breaks_leaves_everything_as_it_was(ledger, monkeypatch):
    ids = kit.ready(ledger, "r-0", "r-1", "r-2")
    run = kit.advance(ledger, kit.advance(ledger, ledger.runs.claim("m", "w")))
    before = kit.tables(ledger)
    difference = check.canonical(run.detail["difference"])
    with pytest.raises(KeyError):
        ledger.runs.complete(run, {ids[0]: kit.statements(run)[ids[0]]}, difference)
    assert kit.tables(ledger) == before
    for room, broken in ((jobs.Runs, "hold"), (Requests, "step"), (Database, "insert")):
        with monkeypatch.context() as patch:
            patch.setattr(room, broken, _breaks_after(getattr(room, broken)))
            with pytest.raises(Broken):
                ledger.runs.complete(run, kit.statements(run), difference)
        assert kit.tables(ledger) == before
    kit.finish(ledger, run)
    assert kit.faults(ledger) == []
    assert all(kit.kinds(ledger, one).count("completed") == 1 for one in ids)


class Broken(BaseException):
    """What no code catches."""


def _breaks_after(function):
    def broken(*args, **given):
        function(*args, **given)
        raise Broken

    return broken


def test_any_worker_goes_on_where_the_last_one_stopped(ledger, time):
    kit.ready(ledger, "r-0", "r-1")
    seen, run = [], ledger.runs.claim("m", "w0", lease_s=10)
    while run is not None:
        seen.append(run.step)
        kit.advance(ledger, run)
        time.at_s += 11
        run = ledger.runs.claim("m", f"w{len(seen)}", lease_s=10)
    assert seen == ["claimed", "unlearned", "switched"]
    assert ledger.models.served("m").version == 2
    assert kit.faults(ledger) == []


def test_a_run_that_failed_or_was_withheld_is_over_and_its_requests_stand_as_said(ledger):
    [one] = kit.ready(ledger, "r-0")
    run = ledger.runs.claim("m", "w")
    before = kit.tables(ledger)
    with pytest.raises(NotNow):
        ledger.runs.withhold(run, "not verified yet")
    assert kit.tables(ledger) == before
    ledger.runs.verifying(run)
    ledger.runs.verifying(run)
    assert kit.kinds(ledger, one).count("verifying") == 1
    ledger.runs.withhold(run, "the audit failed")
    filed = ledger.requests.get(one)
    assert (filed.state, filed.why, filed.run) == (State.WITHHELD, "the audit failed", run.id)
    assert ledger.runs.claim("m", "w") is None
    ledger.requests.release(one)
    assert ledger.runs.claim("m", "w").id != run.id


def test_on_postgresql_leases_go_by_the_servers_clock(postgres_url, monkeypatch):
    ledger = kit.opened(postgres_url, now=None)
    kit.register(ledger)
    kit.ready(ledger, "r-0")
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert ledger.runs.claim("m", "a", lease_s=60) is not None
    monkeypatch.setattr("time.time", lambda: 9e9)
    assert ledger.runs.claim("m", "b", lease_s=60) is None
    with ledger.database.read() as connection:
        server = connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        assert abs(ledger.database.now(connection) - float(server)) < 60
    ledger.close()
