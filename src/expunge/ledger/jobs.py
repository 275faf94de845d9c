"""Runs: one carries out many requests about one model, leased to one worker and fenced against all others."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.digest import sha256_hex
from expunge.core.errors import Overtaken
from expunge.ledger.check import canonical
from expunge.ledger.database import Database, inserting
from expunge.ledger.log import SIZE, Log
from expunge.ledger.requests import Requests
from expunge.ledger.states import State
from expunge.ledger.tables import body as bodies
from expunge.ledger.tables import certificate as certificates
from expunge.ledger.tables import entry as entries
from expunge.ledger.tables import record as records
from expunge.ledger.tables import request as requests
from expunge.ledger.tables import run as runs


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its worker holds it.

    Attributes:
        id: its name.
        model: the model that it changes.
        step: the last step that is done: ``claimed``, ``unlearned``, ``verified``, ``switched``, ``erased``.
        exact: whether only an exact method will do.
        worker: who holds it.
        fence: how often it was taken; who holds an older number can change nothing.
        detail: what the steps found, for the steps that follow.
        requests: the requests that it carries out, in the order in which they were filed.
    """

    id: str
    model: str
    step: str
    exact: bool
    worker: str
    fence: int
    detail: Mapping[str, Any]
    requests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What is to be certified of one request: the certificate's payload, and the commitments removed for it."""

    payload: bytes
    removed: Sequence[bytes]


class Runs:
    """The runs of one ledger."""

    def __init__(self, database: Database, log: Log, filed: Requests, new_id: Callable[[], str] | None = None) -> None:
        """`new_id` makes the runs' ids (random UUIDs if None)."""
        self.database, self.log, self.filed = database, log, filed
        self.new_id = new_id or (lambda: str(uuid.uuid4()))

    def claim(self, model: str, worker: str, *, lease_s: float = 60.0, most: int = 1000) -> Run | None:
        """Take over the model's run whose lease ran out, or begin one with the pending requests; None if neither.

        Requests that need an exact method and others do not share a run: the exact ones come first.
        """
        with self.database.write() as connection:
            active = _active(connection, model)
            if active is not None:
                return self._take_over(connection, active, worker, lease_s)
            return self._begin(connection, model, worker, lease_s, most)

    def _take_over(self, connection: Connection, row: Any, worker: str, lease_s: float) -> Run | None:
        now = self.database.now(connection)
        if row.lease_until > now and row.worker != worker:
            return None
        changed = connection.execute(
            runs.update()
            .where(runs.c.id == row.id, runs.c.fence == row.fence, runs.c.state == "active")
            .values(worker=worker, fence=row.fence + 1, lease_until=now + lease_s)
        )
        return _run(connection, row, worker, row.fence + 1) if changed.rowcount == 1 else None

    def _begin(self, connection: Connection, model: str, worker: str, lease_s: float, most: int) -> Run | None:
        pending = (
            sa.select(requests)
            .where(requests.c.model == model, requests.c.state == State.PENDING.value)
            .order_by(requests.c.exact.desc(), requests.c.seq)
            .limit(most)
            .with_for_update(skip_locked=True)
        )
        rows = [dict(row) for row in connection.execute(pending).mappings()]
        rows = [row for row in rows if row["exact"] == rows[0]["exact"]]
        if not rows:
            return None
        begun: dict[str, Any] = {
            "id": self.new_id(),
            "model": model,
            "state": "active",
            "step": "claimed",
            "exact": bool(rows[0]["exact"]),
            "worker": worker,
            "fence": 1,
            "lease_until": self.database.now(connection) + lease_s,
            "detail": "{}",
        }
        connection.execute(runs.insert().values(**begun))
        for row in rows:
            self.filed.step(connection, row, State.RUNNING, event="running", said={"run": begun["id"]}, run=begun["id"])
        return Run(
            id=begun["id"],
            model=model,
            step="claimed",
            exact=begun["exact"],
            worker=worker,
            fence=1,
            detail={},
            requests=tuple(row["id"] for row in rows),
        )

    def active(self, connection: Connection, model: str) -> bool:
        """Whether the model has a run that did not end; within a transaction that writes none can begin meanwhile."""
        return _active(connection, model) is not None

    def renew(self, run: Run, lease_s: float = 60.0) -> None:
        """Hold the run for longer; Overtaken if it was lost."""
        with self.database.write() as connection:
            self.hold(connection, run, lease_until=self.database.now(connection) + lease_s)

    def record(self, run: Run, step: str, **found: Any) -> Run:
        """Say that a step is done and what it found; Overtaken if the run was lost."""
        detail = {**run.detail, **found}
        with self.database.write() as connection:
            self.hold(connection, run, step=step, detail=json.dumps(detail, sort_keys=True))
        return replace(run, step=step, detail=detail)

    def verifying(self, run: Run) -> None:
        """Say of its requests that the result is being verified; said again, it changes nothing."""
        with self.database.write() as connection:
            self.hold(connection, run)
            for row in _requests_of(connection, run.id):
                if row["state"] == State.RUNNING.value:
                    self.filed.step(connection, row, State.VERIFYING, event="verifying")

    def erase_bodies(self, run: Run) -> None:
        """Erase what its requests asked: from now on the run knows its records by their pseudonyms alone."""
        with self.database.write() as connection:
            self.hold(connection, run)
            connection.execute(bodies.delete().where(bodies.c.request.in_(run.requests)))

    def let_fail(self, run: Run, request: str, why: str) -> Run:
        """Take one request out of a run, which goes on with the others: it has failed, and may be tried again."""
        with self.database.write() as connection:
            self.hold(connection, run)
            row = next(row for row in _requests_of(connection, run.id) if row["id"] == request)
            self.filed.step(connection, row, State.FAILED, event="failed", said={"run": None}, why=why, run=None)
        return replace(run, requests=tuple(one for one in run.requests if one != request))

    def note(self, run: Run, why: str) -> None:
        """Say why its requests are where they are, for people to read; nothing of it goes into the log."""
        with self.database.write() as connection:
            self.hold(connection, run)
            connection.execute(requests.update().where(requests.c.run == run.id).values(why=why))

    def let_go(self, run: Run) -> None:
        """Let another worker, or the next attempt, take the run over at once; nothing if it was lost already."""
        with self.database.write() as connection:
            mine = (runs.c.id == run.id) & (runs.c.fence == run.fence)
            connection.execute(runs.update().where(mine).values(lease_until=0.0))

    def finished(self, before: str) -> list[str]:
        """Runs that were completed before this time stamp, the keys to whose records are still there."""
        query = (
            sa.select(requests.c.run)
            .join(entries, entries.c.request == requests.c.id)
            .join(records, records.c.run == requests.c.run)
            .where(entries.c.kind == "completed", entries.c.at <= before, records.c.key.is_not(None))
            .distinct()
        )
        with self.database.read() as connection:
            return [str(name) for name in connection.execute(query).scalars()]

    def fail(self, run: Run, why: str) -> None:
        """End the run; its requests have failed, and may be tried again."""
        self._end(run, "failed", State.FAILED, why)

    def withhold(self, run: Run, why: str) -> None:
        """End the run; its result is not released, and its requests wait for an exact method or the fallback."""
        self._end(run, "withheld", State.WITHHELD, why)

    def _end(self, run: Run, state: str, to: State, why: str) -> None:
        with self.database.write() as connection:
            self.hold(connection, run, state=state)
            for row in _requests_of(connection, run.id):
                self.filed.step(connection, row, to, event=to.value, said={"run": run.id}, why=why)

    def complete(self, run: Run, statements: Mapping[str, Statement], difference: bytes) -> None:
        """End the run in one transaction.

        Every request is completed, its certificate is fixed (to be signed after the commit), who asked is to be told,
        and what they asked is erased.

        Raises:
            Overtaken: if another worker took the run over; nothing was changed.
        """
        with self.database.write() as connection:
            self.hold(connection, run, state="done", step="completed", difference=difference)
            size = connection.execute(SIZE).scalar_one()
            made = []
            for place, row in enumerate(_requests_of(connection, run.id)):
                statement = statements[row["id"]]
                said = {"certificate": sha256_hex(statement.payload), "run": run.id}
                self.filed.step(connection, row, State.COMPLETED, event="completed", said=said, why=None)
                made.append(_certificate(row["id"], size + place, statement, run.id))  # each step is one entry
            self.database.insert(connection, _INSERT_CERTIFICATE, made)
            mine = sa.select(requests.c.id).where(requests.c.run == run.id)
            connection.execute(bodies.delete().where(bodies.c.request.in_(mine)))

    def hold(self, connection: Connection, run: Run, **values: Any) -> None:
        """Within a transaction: go on only if this worker still holds the run; Overtaken, and undone, if not."""
        changed = connection.execute(
            runs.update()
            .where(runs.c.id == run.id, runs.c.fence == run.fence, runs.c.state == "active")
            .values(**{"worker": run.worker, **values})
        )
        if changed.rowcount != 1:
            raise Overtaken(f"run {run.id} was taken over by another worker; this one changed nothing and stops")


_INSERT_CERTIFICATE = inserting(certificates)


def _certificate(request: str, index: int, statement: Statement, run: str) -> dict[str, Any]:
    removed = canonical([member.hex() for member in sorted(statement.removed)])
    about = {"request": request, "idx": index, "run": run}
    return {**about, "payload": statement.payload, "removed": removed, "envelope": None}


def _active(connection: Connection, model: str) -> Any:
    return connection.execute(
        sa.select(runs).where(runs.c.model == model, runs.c.state == "active").with_for_update(skip_locked=True)
    ).first()


def _requests_of(connection: Connection, run: str) -> Sequence[Mapping[str, Any]]:
    query = sa.select(requests).where(requests.c.run == run).order_by(requests.c.seq)
    return [dict(row) for row in connection.execute(query).mappings()]


def _run(connection: Connection, row: Any, worker: str, fence: int) -> Run:
    return Run(
        id=row.id,
        model=row.model,
        step=row.step,
        exact=bool(row.exact),
        worker=worker,
        fence=fence,
        detail=json.loads(row.detail),
        requests=tuple(one["id"] for one in _requests_of(connection, row.id)),
    )
