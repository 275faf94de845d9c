"""Whatever happens, in whatever order, crashes included: the ledger is what plain lists say. And each liar fails."""

import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from expunge.core.errors import Corrupt, NotNow, OtherBody, Overtaken, Unwritable
from expunge.core.store import write_atomically
from expunge.ledger import check, database, jobs, log, requests
from expunge.ledger.database import Database
from expunge.ledger.keys import Keys
from expunge.ledger.requests import Submission
from expunge.ledger.states import STEPS, State
from expunge.ledger.tables import entry, outbox
from expunge.ledger.tables import request as request_table
from expunge.ledger.tree import Tree
from tests.ledger import kit

ROWS = 40
LEASE_S = 10.0
PATIENT_S = 60.0  # where the two do meet
_IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of commits, and no power fails here
NEXT = {"claimed": "unlearned", "unlearned": "switched", "switched": "done"}


class Crash(BaseException):
    """The process dies here."""


@dataclass
class Wanted:
    """A request as it ought to be."""

    id: str
    body: bytes
    state: State
    exact: bool = False
    run: str | None = None
    events: int = 1
    told: list[str] = field(default_factory=list)


@dataclass
class Active:
    """The run that ought to go on."""

    id: str
    requests: tuple[str, ...]
    worker: str
    until_s: float
    fence: int = 1
    step: str = "claimed"


class Sequence(RuleBasedStateMachine):
    """One model, two workers, any order. `place` gives a database of one's own."""

    place = None

    def __init__(self):
        super().__init__()
        self.at = self.place()
        self.url, self.folder = self.at.__enter__()
        self.time, self.ids = kit.Time(), kit.counted("id")
        self.other = None
        self.ledger = self.open()
        kit.register(self.ledger, ROWS)
        self.wanted, self.keys = {}, {}
        self.active, self.held, self.ended, self.anchored = None, [], 0, 1

    def open(self):
        return kit.opened(self.url, now=self.time, new_id=self.ids, anchor=self.folder / "anchor")

    def teardown(self):
        try:
            if self.at is not None and self.ledger is not None:
                assert kit.faults(self.ledger) == []
        finally:
            for ledger in (self.ledger, self.other):
                if ledger is not None:
                    ledger.close()
            self.at.__exit__(None, None, None)

    @initialize(claimed=st.booleans())
    def begin(self, claimed):
        """Not from nothing: most that can go wrong needs a run that has begun."""
        for key in range(3):
            self.submit(key, False)
            self.screen(key, exact=key == 2, held=False)
        if claimed:
            self.claim("a", 4)

    def pick(self, number):
        return list(self.wanted.values())[number % len(self.wanted)]

    def move(self, want, to, told=None):
        want.state, want.events = to, want.events + 1
        if told:
            want.told.append(told)

    @rule(key=st.integers(0, 11), variant=st.integers(0, 3).map(lambda drawn: drawn == 3))
    def submit(self, key, variant):
        """Under few keys, so that most come again; sometimes with another body."""
        body = kit.asking(f"r-{key}", *(["r-39"] if variant else []))
        known = self.keys.get(key)
        submission = Submission(model="m", kind="remove", body=body, key=f"k{key}")
        if known is not None and self.wanted[known].body != body:
            with pytest.raises(OtherBody):
                self.ledger.requests.submit(submission)
            return
        if variant:
            return  # two requests for one record are the workflow's affair
        filed, new = self.ledger.requests.submit(submission)
        assert new == (known is None)
        assert known in (None, filed.id)
        self.keys[key] = filed.id
        self.wanted.setdefault(filed.id, Wanted(filed.id, body, State.RECEIVED))

    @precondition(lambda self: self.wanted)
    @rule(number=st.integers(0, 99), exact=st.booleans(), held=st.integers(0, 4).map(lambda drawn: drawn == 4))
    def screen(self, number, exact, held):
        want = self.pick(number)
        if State.SCREENING not in STEPS[want.state]:
            with pytest.raises(NotNow):
                self.ledger.requests._move(want.id, State.SCREENING, event="screening")
            return
        if want.state is not State.RECEIVED:
            return  # a held one is screened anew only by a release, see `decide`
        self.ledger.requests.screening(want.id)
        self.ledger.requests.screened(want.id, held="odd" if held else None, exact=exact, stages=["screen: judged"])
        self.move(want, State.SCREENING)
        self.move(want, State.HELD if held else State.PENDING)
        want.exact = exact

    @precondition(lambda self: self.wanted)
    @rule(number=st.integers(0, 99), how=st.sampled_from(["cancel", "deny", "release"]))
    def decide(self, number, how):
        """A person's word, at any time: also while a worker has the request."""
        want = self.pick(number)
        to = {"cancel": State.CANCELLED, "deny": State.DENIED, "release": State.PENDING}[how]
        given = ["no_match"] if how == "deny" else []
        act = getattr(self.ledger.requests, how)
        possible = to in STEPS[want.state] and not (how == "release" and want.state is State.SCREENING)
        if not possible:
            with pytest.raises(NotNow):
                act(want.id, *given)
            return
        act(want.id, *given)
        self.move(want, to, None if how == "release" else to.value)
        want.run = None if how == "release" else want.run

    def may_claim(self, worker):
        if self.active is not None:
            return self.active.until_s <= self.time.at_s or self.active.worker == worker
        return any(want.state is State.PENDING for want in self.wanted.values())

    def expect_claim(self, worker, most):
        if self.active is not None:
            self.active.fence, self.active.worker = self.active.fence + 1, worker
            self.active.until_s = self.time.at_s + LEASE_S
            return
        pending = [want for want in self.wanted.values() if want.state is State.PENDING]
        chosen = sorted(pending, key=lambda want: not want.exact)[:most]
        chosen = [want for want in chosen if want.exact == chosen[0].exact]
        self.active = Active("", tuple(want.id for want in chosen), worker, self.time.at_s + LEASE_S)
        for want in chosen:
            self.move(want, State.RUNNING)

    @rule(worker=st.sampled_from(["a", "b"]), most=st.integers(1, 4))
    def claim(self, worker, most):
        possible = self.may_claim(worker)
        run = self.ledger.runs.claim("m", worker, lease_s=LEASE_S, most=most)
        assert (run is not None) == possible
        if run is None:
            return
        self.expect_claim(worker, most)
        self.active.id = self.active.id or run.id
        for one in run.requests:
            self.wanted[one].run = run.id
        assert (run.id, run.requests, run.fence) == (self.active.id, self.active.requests, self.active.fence)
        assert (run.worker, run.step) == (worker, self.active.step)
        self.held = [*self.held, run][-4:]

    @precondition(lambda self: self.active or self.may_claim("a"))
    @rule()
    def steal(self):
        """The lease runs out and the other takes over, while the first goes on without knowing."""
        if self.active is None:
            self.claim("a", 4)
        first = next(filter(self.holds, self.held), None)
        self.time.at_s = max(self.time.at_s, self.active.until_s)
        self.claim("b" if self.active.worker == "a" else "a", 4)
        if first is not None:
            self.refused(first)

    @rule(seconds=st.sampled_from([1.0, 11.0, -3600.0]))
    def tick(self, seconds):
        """Clocks go on, and sometimes back."""
        self.time.at_s += seconds

    def holds(self, run):
        return self.active is not None and (run.id, run.fence) == (self.active.id, self.active.fence)

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 9))
    def work(self, number):
        """A worker does the next step; he who lost the run is refused whatever he does."""
        run = self.held[number % len(self.held)]
        if not self.holds(run):
            self.refused(run)
            return
        after = kit.advance(self.ledger, run)
        self.expect_step(run)
        self.held = [*(one for one in self.held if one is not run), *([after] if after else [])]

    def refused(self, run):
        """Whatever he believes, nothing of it is done."""
        statement = jobs.Statement(payload=b"{}", removed=[])
        for write in (
            lambda: self.ledger.runs.record(run, "unlearned"),
            lambda: self.ledger.runs.complete(run, dict.fromkeys(run.requests, statement), b"{}"),
            lambda: self.ledger.runs.fail(run, "no"),
        ):
            with pytest.raises(Overtaken):
                write()
        self.held = [one for one in self.held if one is not run]

    def expect_step(self, run):
        mine = [self.wanted[one] for one in run.requests]
        if run.step == "unlearned":
            for want in mine:
                if want.state is State.RUNNING:
                    self.move(want, State.VERIFYING)
            self.anchored += 1
        self.active.step = NEXT[run.step]
        if self.active.step == "done":
            for want in mine:
                self.move(want, State.COMPLETED, "completed")
            self.active = None

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 9))
    def fail(self, number):
        run = self.held[number % len(self.held)]
        if not self.holds(run) or self.active.step == "switched":
            return  # after the switch a run is carried to its end: its records are gone
        self.ledger.runs.fail(run, "no luck")
        for one in run.requests:
            self.move(self.wanted[one], State.FAILED)
        self.active = None
        self.held = [one for one in self.held if one is not run]

    @rule()
    def sign(self):
        self.ledger.certificates.sign()
        self.ledger.log.checkpoint()

    def reopen(self):
        self.ledger.close()
        self.ledger = None
        self.ledger = self.open()

    @rule()
    def crash_between(self):
        self.reopen()

    @rule(where=st.sampled_from(["before update", "before commit", "after commit"]), what=st.integers(0, 5))
    def crash_inside(self, where, what):
        """The process dies within the very transaction, or just after it, before anybody knows."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "failpoint", dies_at(where))
            kept = where == "after commit"
            if what >= 3 and any(map(self.holds, self.held)):
                self.crash_working(kept)
            elif what == 2 and any(State.CANCELLED in STEPS[want.state] for want in self.wanted.values()):
                self.crash_deciding(kept)
            else:
                self.crash_filing(kept)
        self.reopen()

    @precondition(lambda self: any(map(self.holds, self.held)))
    @rule(where=st.sampled_from(["before commit", "after commit"]))
    def crash_at_the_end(self, where):
        """All steps of a run but its last, at which the process dies."""
        [run] = [one for one in self.held if self.holds(one)]
        while run.step != "switched":
            self.held = [one for one in self.held if one is not run]
            run, before = kit.advance(self.ledger, run), run
            self.held.append(run)
            self.expect_step(before)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "failpoint", dies_at(where))
            self.crash_working(where == "after commit")
        self.reopen()

    def crash_deciding(self, kept):
        want = next(want for want in self.wanted.values() if State.CANCELLED in STEPS[want.state])
        with pytest.raises(Crash):
            self.ledger.requests.cancel(want.id)
        if kept:
            self.move(want, State.CANCELLED, "cancelled")

    def crash_filing(self, kept):
        key = next((key for key in range(12, ROWS - 1) if key not in self.keys), None)
        if key is None:
            return
        body = kit.asking(f"r-{key}")
        with pytest.raises(Crash):
            self.ledger.requests.submit(Submission(model="m", kind="remove", body=body, key=f"k{key}"))
        found = self.ledger.requests.by_key(f"k{key}")
        assert (found is not None) == kept
        if found:
            self.keys[key] = found.id
            self.wanted[found.id] = Wanted(found.id, body, State.RECEIVED)

    def crash_working(self, kept):
        """In the one transaction of a step that ends it: its results count if it was committed, and only then."""
        [run] = [one for one in self.held if self.holds(one)]
        self.held = [one for one in self.held if one is not run]
        with pytest.raises(Crash):
            kit.advance(self.ledger, run)
        if kept and run.step == "unlearned":
            for one in run.requests:  # the first of two transactions: the requests are being verified
                if self.wanted[one].state is State.RUNNING:
                    self.move(self.wanted[one], State.VERIFYING)
        elif kept:
            self.expect_step(run)

    @precondition(lambda self: len([key for key in range(12, ROWS - 1) if key not in self.keys]) > 1)
    @rule()
    def two_at_once(self):
        """Two processes file at the same instant."""
        if self.other is None:
            self.other = self.open()
        first, second = [key for key in range(12, ROWS - 1) if key not in self.keys][:2]

        def send(ledger, key):
            body = kit.asking(f"r-{key}")
            return key, ledger.requests.submit(Submission(model="m", kind="remove", body=body, key=f"k{key}"))

        for key, (filed, new) in sorted(
            kit.at_once(lambda: send(self.ledger, first), lambda: send(self.other, second)),
            key=lambda sent: self.place_of(sent[1][0].id),
        ):
            assert new
            self.keys[key] = filed.id
            self.wanted[filed.id] = Wanted(filed.id, kit.asking(f"r-{key}"), State.RECEIVED)

    def place_of(self, one):
        return [filed.id for filed in self.ledger.requests.find()].index(one)

    @invariant()
    def tables_are_what_the_lists_say(self):
        if self.ledger is None:
            return
        with self.ledger.database.read() as connection:
            filed = connection.execute(
                sa.select(request_table.c.id, request_table.c.state, request_table.c.run).order_by(request_table.c.seq)
            ).all()
            events = connection.execute(sa.select(entry.c.idx, entry.c.request).order_by(entry.c.idx)).all()
            told = sorted(map(tuple, connection.execute(sa.select(outbox.c.request, outbox.c.topic))))
        assert [tuple(row) for row in filed] == [(want.id, want.state.value, want.run) for want in self.wanted.values()]
        assert [row.idx for row in events] == list(range(len(events)))
        assert len(events) == self.anchored + sum(want.events for want in self.wanted.values())
        assert told == sorted((want.id, topic) for want in self.wanted.values() for topic in want.told)


def dies_at(where):
    def failpoint(name):
        if name == where:
            raise Crash

    return failpoint


@contextmanager
def a_file():
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder:
        yield f"sqlite:///{folder}/ledger.db", Path(folder)


def run(place, examples, steps, *phases):
    """Twenty-five steps in twenty-five orders, the same each time."""
    machine = type("Sequence", (Sequence,), {"place": staticmethod(place)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            database=None,
            deadline=None,
            phases=phases or (Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


def caught():
    """What the machine fails with, in no more examples than the test runs."""
    with pytest.raises((Exception, pytest.fail.Exception)) as raised:
        run(a_file, 25, 25, Phase.generate)
    return raised.value


def test_any_sequence_leaves_the_ledger_as_plain_lists_say():
    run(a_file, 25, 25)


def test_any_sequence_does_on_postgresql_too(postgres_server):
    @contextmanager
    def a_database():
        with postgres_server.database() as url, tempfile.TemporaryDirectory() as folder:
            yield url, Path(folder)

    run(a_database, 3, 25)


@pytest.mark.soak
def test_any_long_sequence_leaves_the_ledger_as_plain_lists_say():
    run(a_file, 60, 60)


def test_without_the_fence_the_machine_fails(monkeypatch):
    def hold(self, connection, run, **values):
        connection.execute(
            sa.update(jobs.runs).where(jobs.runs.c.id == run.id).values(**{"worker": run.worker, **values})
        )

    monkeypatch.setattr(jobs.Runs, "hold", hold)
    assert str(caught()).startswith("DID NOT RAISE Overtaken")


def test_with_bodies_that_all_look_the_same_the_machine_fails(monkeypatch):
    mac = Keys.mac
    monkeypatch.setattr(Keys, "mac", lambda self, data: mac(self, b"" if data.startswith(b"[") else data))
    assert str(caught()).startswith("DID NOT RAISE OtherBody")


def test_with_keys_that_are_never_known_again_the_machine_fails(monkeypatch):
    mac, number = Keys.mac, count()
    fresh = lambda data: data if data.startswith(b"[") else b"%d %s" % (next(number), data)  # noqa: E731
    monkeypatch.setattr(Keys, "mac", lambda self, data: mac(self, fresh(data)))
    assert isinstance(caught(), (AssertionError, pytest.fail.Exception))


def signing_append(append):
    """An append that signs at once what is not committed yet."""

    def append_and_sign(self, connection, events, at):
        made = append(self, connection, events, at)
        leaves = connection.execute(sa.select(entry.c.leaf).order_by(entry.c.idx))
        tree = Tree(bytes(row.leaf) for row in leaves)
        if self.anchor is not None:
            note = self.keys.sign_checkpoint(check.Checkpoint(self.origin, len(tree), tree.root()))
            write_atomically(self.anchor, note.encode("utf-8"))
        return made

    return append_and_sign


def test_with_a_checkpoint_signed_before_the_commit_the_machine_fails(monkeypatch):
    monkeypatch.setattr(log.Log, "append", signing_append(log.Log.append))
    assert "rolled back" in str(caught())


def test_with_the_message_put_in_after_the_commit_the_machine_fails(monkeypatch):
    waiting, write, tell = [], Database.write, requests.tell

    @contextmanager
    def write_then_tell(self):
        waiting.clear()
        with write(self) as connection:
            yield connection
        if waiting:
            with self.engine.begin() as connection:
                for message in waiting:
                    tell(connection, *message)

    monkeypatch.setattr(requests, "tell", lambda connection, *message: waiting.append(message))
    monkeypatch.setattr(Database, "write", write_then_tell)
    assert isinstance(caught(), AssertionError)


def two_append_at_once(url, patience_s=0.3):
    """Both know the log's size, and neither has written yet, if the database lets them."""
    together = threading.Barrier(2)
    ledgers = [kit.opened(url), kit.opened(url)]
    before = len(ledgers[0].log)

    def meet(connection, cursor, statement, *_):
        if statement.startswith("INSERT INTO entry"):
            with suppress(threading.BrokenBarrierError):
                together.wait(timeout=patience_s)  # the other never comes, where writers take turns

    def append(ledger):
        sa.event.listen(ledger.database.engine, "before_cursor_execute", meet)
        with ledger.database.write() as connection:
            ledger.log.append(connection, [("received", "nobody", {})], ledger.database.utc(connection))

    try:
        kit.at_once(*(partial(append, ledger) for ledger in ledgers))
        assert [entry.index for entry in ledgers[0].log.entries(start=before)] == [before, before + 1]
        ledgers[0].log.checkpoint()
    finally:
        for ledger in ledgers:
            ledger.close()


def one_completes_while_another_claims(url, patience_s=0.3):
    """The first has the run's row when the second takes the lock on appends, if the database lets it."""
    together, has_row = threading.Barrier(2), threading.Event()
    meet = suppress(threading.BrokenBarrierError)
    hold, begin = jobs.Runs.hold, jobs.Runs._begin
    ledgers = [kit.opened(url), kit.opened(url)]
    kit.register(ledgers[0])
    kit.ready(ledgers[0], "r-0")
    held = kit.advance(ledgers[0], kit.advance(ledgers[0], ledgers[0].runs.claim("m", "a")))
    kit.ready(ledgers[0], "r-1")

    def hold_and_meet(self, connection, run, **values):
        hold(self, connection, run, **values)
        has_row.set()
        with meet:
            together.wait(timeout=patience_s)

    def meet_and_begin(self, connection, *given):
        self.database.lock_appends(connection)
        with meet:
            together.wait(timeout=patience_s)
        return begin(self, connection, *given)

    def claim():
        assert has_row.wait(PATIENT_S)
        ledgers[1].runs.claim("m", "b")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Runs, "hold", hold_and_meet)
        patch.setattr(jobs.Runs, "_begin", meet_and_begin)
        try:
            kit.at_once(lambda: kit.finish(ledgers[0], held), claim)
            assert kit.faults(ledgers[0]) == []
        finally:
            for ledger in ledgers:
                ledger.close()


def test_two_who_append_at_once_take_turns(database_url):
    two_append_at_once(database_url)


def test_who_completes_a_run_and_who_claims_one_never_wait_for_each_other(database_url):
    one_completes_while_another_claims(database_url)


def test_without_the_lock_on_appends_two_take_the_same_place_on_postgresql(postgres_url, monkeypatch):
    monkeypatch.setattr(Database, "lock_appends", lambda *_: None)
    with pytest.raises(sa.exc.IntegrityError):
        two_append_at_once(postgres_url, PATIENT_S)


def test_with_a_plain_begin_two_who_append_at_once_fail_on_sqlite(tmp_path, monkeypatch):
    plain = Database.write

    @contextmanager
    def write(self):
        with plain(self) as connection:
            if self.on_sqlite and connection.exec_driver_sql("SELECT count(*) FROM meta").scalar():
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("BEGIN")
            yield connection

    monkeypatch.setattr(Database, "write", write)
    with pytest.raises(Unwritable, match="locked"):
        two_append_at_once(f"sqlite:///{tmp_path}/ledger.db", PATIENT_S)


def test_with_the_lock_taken_late_the_two_wait_for_each_other_on_postgresql(postgres_url, monkeypatch):
    @contextmanager
    def write(self):
        with self._explained(), self.engine.begin() as connection:
            yield connection

    monkeypatch.setattr(Database, "write", write)
    with pytest.raises(Unwritable, match="deadlock"):
        one_completes_while_another_claims(postgres_url, PATIENT_S)


def test_a_certificate_is_signed_only_once_its_run_is_committed(database_url, tmp_path):
    what_is_signed_is_kept(database_url, tmp_path)


def what_is_signed_is_kept(url, folder):
    """Die at the commit of a completion: nothing that was signed may say more than the database then holds."""
    ledger = kit.opened(url, anchor=folder / "anchor")
    kit.register(ledger)
    kit.ready(ledger, "r-0")
    run = kit.advance(ledger, kit.advance(ledger, ledger.runs.claim("m", "a")))
    signed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "failpoint", dies_at("before commit"))
        patch.setattr(kit.KEYS.__class__, "sign_statement", recording(kit.KEYS.__class__.sign_statement, signed))
        with pytest.raises(Crash):
            kit.finish(ledger, run)
    ledger.close()
    ledger = kit.opened(url, anchor=folder / "anchor")
    assert signed == []
    kit.finish(ledger, run)
    assert kit.faults(ledger) == []
    ledger.close()


def recording(function, calls):
    def recorded(*given):
        calls.append(given)
        return function(*given)

    return recorded


def test_a_certificate_signed_within_the_transaction_is_seen(tmp_path, monkeypatch):
    fixed = jobs._certificate

    def fixed_and_signed(request, index, statement, run):
        kit.KEYS.sign_statement(statement.payload)
        return fixed(request, index, statement, run)

    monkeypatch.setattr(jobs, "_certificate", fixed_and_signed)
    with pytest.raises(AssertionError):
        what_is_signed_is_kept(f"sqlite:///{tmp_path}/ledger.db", tmp_path)


def test_a_checkpoint_signed_within_the_transaction_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(log.Log, "append", signing_append(log.Log.append))
    with pytest.raises(Corrupt, match="rolled back"):
        what_is_signed_is_kept(f"sqlite:///{tmp_path}/ledger.db", tmp_path)
