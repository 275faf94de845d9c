"""Whenever a worker dies or is taken over, every request is completed once, certified once, and nothing is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from expunge import Request
from expunge.core.errors import Corrupt, ExpungeError, Overtaken
from expunge.core.protocols import Held
from expunge.ledger.jobs import Run, Runs
from expunge.ledger.models import Models, Served
from expunge.ledger.tables import run as runs
from expunge.workflow import Workspace
from tests.workflow import crashes, kit

pytestmark = pytest.mark.filterwarnings("ignore::expunge.learn.shards.ShardWarning")


class Died(BaseException):
    """The worker died here."""


@pytest.fixture(scope="module")
def forker() -> Iterator[crashes.Forker]:
    made = crashes.Forker()
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """None for the file that a workspace makes by itself."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres_url")


def _survives(forker: crashes.Forker, root: Path, kills: int, seed: int) -> None:
    tally, asked = crashes.crash(forker, root, kills=kills, seed=seed)
    assert tally.errors == []
    assert tally.kills["worker"] >= kills
    assert list(crashes.faults(root, asked)) == []
    print(tally.rounds, "rounds,", tally.stops, "stops,", dict(tally.kills))


def test_nothing_is_lost_or_done_twice_though_workers_are_killed(forker, tmp_path, url):
    crashes.begin(tmp_path / "w", url)
    _survives(forker, tmp_path / "w", kills=10, seed=1)


@pytest.mark.soak
def test_nothing_is_lost_or_done_twice_in_200_kills(forker, tmp_path, url):
    crashes.begin(tmp_path / "w", url)
    _survives(forker, tmp_path / "w", kills=200, seed=2)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one request to a run, in which two are filed, and leases that do not run out by themselves."""
    made = tmp_path_factory.mktemp("template") / "w"
    crashes.begin(made, most=1, lease_s=600.0)
    crashes.file(str(made), list(ASKED), len(ASKED))
    return made


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return kit.copied(template, tmp_path / "w")


ASKED = crashes.requests(2)


def _finish(root: Path, worker: str) -> None:
    workspace = crashes.opened(root)
    crashes.journey(workspace).run(worker)
    workspace.close()


def _judged(root: Path) -> list[str]:
    return list(crashes.faults(root, ASKED))


def _die(root: Path) -> None:
    """A worker works until it dies."""
    workspace = crashes.opened(root)
    with pytest.raises(Died):
        crashes.journey(workspace).run("a")
    workspace.close()


def _dies_after(monkeypatch: pytest.MonkeyPatch, where: type, name: str, first: Callable[..., Any]) -> None:
    """The first time that this method is called, `first` is, with the method before the other arguments, and dies."""
    original, dead = getattr(where, name), []

    def once(*given: Any, **named: Any) -> Any:
        if dead:
            return original(*given, **named)
        dead.append(True)
        first(original, *given, **named)
        raise Died

    monkeypatch.setattr(where, name, once)


def _unfenced(monkeypatch: pytest.MonkeyPatch, *forgotten: str) -> None:
    """Worker a does not look whether it still holds its run, and does not write these columns."""
    honest = Runs.hold

    def hold(self: Runs, connection: Any, run: Run, **values: Any) -> None:
        if run.worker != "a":
            return honest(self, connection, run, **values)
        kept = {name: value for name, value in values.items() if name not in forgotten}
        connection.execute(runs.update().where(runs.c.id == run.id).values(worker="a", **kept))
        return None

    monkeypatch.setattr(Runs, "hold", hold)


class Meanwhile:
    """Worker b takes the run of worker a over and does all that there is, once, when a comes to a certain point."""

    name = "elsewhere"

    def __init__(self, root: Path, point: str) -> None:
        self.root, self.point, self.done = root, point, False

    def tell(self, what: str, done: int, total: int) -> None:
        """What a journey tells."""
        if what.startswith(self.point):
            self.act()

    def publish(self, folder: Path, digest: str, tags: Any) -> str:
        """A mirror's first step: after the bodies were erased, and before old versions are."""
        if self.point == "publish":
            self.act()
        return "1"

    def serve(self, version: str) -> None:
        """Nothing."""

    def retire(self, keep: str) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def certify(self, version: str, certificate: str) -> None:
        """Nothing."""

    def act(self) -> None:
        """Take over."""
        if not self.done:
            self.done = True
            workspace = crashes.opened(self.root)
            with workspace.ledger.database.write() as connection:
                connection.execute(runs.update().values(lease_until=0.0))
            crashes.journey(workspace).run("b")
            workspace.close()


POINTS = ("unlearn", "certify", "erase", "publish")


def _overtaken(root: Path, point: str, **given: Any) -> None:
    meanwhile, workspace = Meanwhile(root, point), crashes.opened(root)
    try:
        crashes.journey(workspace, tell=meanwhile.tell, mirror=meanwhile, **given).run("a")
    finally:
        workspace.close()
        assert meanwhile.done


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_that_was_taken_over_changes_nothing(root, point):
    with pytest.raises(Overtaken):
        _overtaken(root, point)
    assert _judged(root) == []


def test_a_worker_that_was_taken_over_withholds_nothing(root):
    with pytest.raises(Overtaken):
        _overtaken(root, "certify", stages=[kit.Says("verify", [Held(why="it looks odd")])])
    assert _judged(root) == []


def test_the_judge_sees_that_a_worker_did_not_look_whether_it_was_taken_over(root, monkeypatch):
    _unfenced(monkeypatch)
    with pytest.raises(ExpungeError) as raised:
        _overtaken(root, "publish")
    assert not isinstance(raised.value, Overtaken)
    assert any("cannot be read" in fault for fault in _judged(root))


@pytest.mark.parametrize("early", [False, True])
def test_the_judge_sees_that_a_certificate_was_signed_before_its_commit(root, early, monkeypatch):
    def first(_: Any, ledger_runs: Runs, run: Run, statements: Any, difference: bytes) -> None:
        workspace = crashes.opened(root)
        for statement in statements.values() if early else ():
            workspace.keys.sign_statement(statement.payload)
        workspace.close()

    _dies_after(monkeypatch, Runs, "complete", first)
    _die(root)
    _finish(root, "a")
    assert any("was signed" in fault for fault in _judged(root)) is early


@pytest.mark.parametrize("late", [False, True])
def test_the_judge_sees_that_a_model_was_written_after_the_switch(root, late, monkeypatch):
    unsaved: dict[str, Any] = {}
    if late:
        read = Workspace.read
        monkeypatch.setattr(Workspace, "keep", lambda self, trained, folder, *_: unsaved.update({folder: trained}))
        monkeypatch.setattr(
            Workspace, "read", lambda self, folder, *rest: unsaved.get(folder) or read(self, folder, *rest)
        )
    _dies_after(monkeypatch, Models, "switch", lambda switch, *given: switch(*given))
    _die(root)
    monkeypatch.undo()
    with pytest.raises(Corrupt) if late else nullcontext():
        _finish(root, "a")
    assert any("cannot be read" in fault for fault in _judged(root)) is late


@pytest.mark.parametrize("forgets", [False, True])
def test_the_judge_sees_that_a_run_was_carried_out_a_second_time(root, forgets, monkeypatch):
    if forgets:
        _unfenced(monkeypatch, "step", "detail")
    _dies_after(monkeypatch, Models, "switch", lambda switch, *given: switch(*given))
    _die(root)
    _finish(root, "b" if forgets else "a")
    assert any("are certified" in fault for fault in _judged(root)) is forgets


def test_the_judge_sees_every_single_loss(root):
    assert any("is received" in fault for fault in _judged(root))
    _finish(root, "a")
    assert _judged(root) == []
    assert any("was lost" in fault for fault in crashes.faults(root, {**ASKED, "key-9": Request.remove_owner("x")}))
    assert any("keys made" in fault for fault in crashes.faults(root, {"key-0": ASKED["key-0"]}))
    torn = root / "models" / ".torn.part"
    torn.write_bytes(b"")
    assert _judged(root) == [".torn.part was never finished"]
    torn.unlink()
    (root / "models" / kit.MODEL / "v0001").mkdir()
    assert _judged(root) == ["v0001 is still there"]


def test_what_dead_workers_left_is_deleted_by_the_next(root):
    _finish(root, "a")
    (root / ".last-checkpoint.1.part").write_bytes(b"")
    (root / "models" / kit.MODEL / "v0009-lost-1").mkdir()
    (root / "models" / kit.MODEL / ".v0009-lost-2.1.part").mkdir()
    _finish(root, "b")
    assert _judged(root) == []


def test_nothing_is_tidied_up_while_a_worker_holds_a_run(root):
    kept = root / "models" / kit.MODEL / "v0009-mine-1"

    def tell(what: str, done: int, total: int) -> None:
        if what == "certify":
            kept.mkdir(exist_ok=True)
            workspace = crashes.opened(root)
            assert crashes.journey(workspace).run("b").completed == ()
            workspace.close()
            assert kept.exists()

    workspace = crashes.opened(root)
    crashes.journey(workspace, tell=tell).run("a")
    workspace.close()
    assert _judged(root) == []


def test_an_owner_who_asks_again_meanwhile_does_not_stop_the_first_run(root):
    again = dict(ASKED)

    def tell(what: str, done: int, total: int) -> None:
        if what.startswith("erase") and "again" not in again:
            again["again"] = ASKED["key-0"]
            workspace.file(kit.MODEL, ASKED["key-0"], key="again")

    workspace = crashes.opened(root)
    crashes.journey(workspace, tell=tell).run("a")
    crashes.journey(workspace).run("a")
    second = workspace.ledger.requests.by_key("again")
    said = workspace.ledger.certificates.get(second.id).statement(workspace.keys)["predicate"]
    assert (said["removed"]["count"], said["sweep"]["clean"]) == (0, True)
    workspace.close()
    assert list(crashes.faults(root, again)) == []


def test_a_model_that_was_retired_while_it_was_read_is_read_anew(root, monkeypatch):
    workspace = crashes.opened(root)
    honest, old = Models.served, workspace.ledger.models.served(kit.MODEL)
    crashes.journey(workspace).run("a")
    answers: list[Served] = [old]
    monkeypatch.setattr(Models, "served", lambda self, name: answers.pop() if answers else honest(self, name))
    assert workspace.load(kit.MODEL, crashes.records()).gone
    monkeypatch.undo()
    (root / workspace.ledger.models.served(kit.MODEL).folder / "trained.json").unlink()
    with pytest.raises(Corrupt):
        workspace.load(kit.MODEL, crashes.records())
    workspace.close()


def test_a_saved_model_is_on_the_disk_before_the_ledger_names_it(root, monkeypatch):
    synced: set[str] = set()
    honest = os.fsync

    def fsync(opened: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{opened}"))
        honest(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    _finish(root, "a")
    workspace = Workspace(root)
    folder = (root / workspace.ledger.models.served(kit.MODEL).folder).resolve()
    workspace.close()
    wanted = {str(path) for path in (folder.parent, folder, *folder.rglob("*"))}
    assert wanted - synced == set()
