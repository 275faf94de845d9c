"""Requests: filed once each, moved from state to state, every step an entry of the log in the same transaction."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.errors import Corrupt, Misuse, NotNow, OtherBody, UnknownRecord
from expunge.ledger import states
from expunge.ledger.check import canonical
from expunge.ledger.clock import Clock
from expunge.ledger.database import Database, moment, stamp
from expunge.ledger.keys import Keys
from expunge.ledger.log import Log
from expunge.ledger.states import State
from expunge.ledger.tables import body as bodies
from expunge.ledger.tables import outbox
from expunge.ledger.tables import request as requests

_TOLD = frozenset({State.COMPLETED, State.CANCELLED, State.EXPIRED, State.DENIED})
"""Outcomes of which who asked must be told: each puts one row into the outbox."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is filed.

    Attributes:
        model: the model that it is about.
        kind: remove, replace or remove_rows.
        body: the whole request; kept until it is done, then erased.
        key: idempotency key; filed again under the same key, the same body gives the same answer and another body is
            refused. Empty: a fresh one.
        received_at: when it reached you; None for now. The legal clock runs from then.
        identified: False while who asked must still prove to be who they say; the clock stands still meanwhile.
    """

    model: str
    kind: str
    body: bytes
    key: str = ""
    received_at: datetime | None = None
    identified: bool = True


@dataclass(frozen=True, kw_only=True)
class Filed:
    """A request as the ledger knows it. Times are RFC 3339 in UTC; `why` says why it stands where it does."""

    id: str
    model: str
    kind: str
    state: State
    regime: str
    received_at: str
    due_at: str
    extended: bool
    exact: bool
    run: str | None
    why: str | None
    updated_at: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"state": self.state.value}


class Requests:
    """The requests of one ledger."""

    def __init__(
        self, database: Database, log: Log, keys: Keys, clock: Clock, new_id: Callable[[], str] | None = None
    ) -> None:
        """`clock` sets when requests are due; `new_id` makes their ids (random UUIDs if None)."""
        self.database, self.log, self.keys, self.clock = database, log, keys, clock
        self.new_id = new_id or (lambda: str(uuid.uuid4()))
        self._due: tuple[tuple[Clock, date], str] | None = None

    def submit(self, submission: Submission) -> tuple[Filed, bool]:
        """File one request durably. Returns it, and whether it is new."""
        return self.submit_many([submission])[0]

    def submit_many(self, submissions: Sequence[Submission]) -> list[tuple[Filed, bool]]:
        """File requests, all in one transaction: all are kept, or none.

        Raises:
            OtherBody: if a key was used before for another body; nothing is filed.
        """
        with self.database.write() as connection:
            now = self.database.utc(connection)
            at = moment(now)
            given = [self._row(submission, now, at) for submission in submissions]
            fresh: dict[str, dict[str, Any]] = {}
            for row in given:
                _refuse_other_body(fresh.setdefault(row["key_mac"], row), row)
            known = self._insert(connection, fresh, now)
        return [(_filed(known[row["key_mac"]]), known[row["key_mac"]] is row) for row in given]

    def _row(self, submission: Submission, now: str, at: datetime) -> dict[str, Any]:
        if not 0 < len(submission.model) <= 80 or not submission.model.isprintable():
            raise Misuse(f"a model is called by 1 to 80 printable characters, got {submission.model[:80]!r}")
        received = submission.received_at or at
        received_at = now if received is at else stamp(received)
        if received > at + _DAY:
            raise Misuse(
                f"a request cannot have been received in the future, got {received.isoformat()}; mend the date"
            )
        request_id = self.new_id()
        return {
            "id": request_id,
            "key_mac": self.keys.mac((submission.key or request_id).encode("utf-8")),
            "body_mac": self.keys.mac(body_of(submission.model, submission.body)),
            "model": submission.model,
            "kind": submission.kind,
            "state": (State.RECEIVED if submission.identified else State.IDENTITY_UNVERIFIED).value,
            "regime": self.clock.regime.name,
            "received_at": received_at,
            "due_at": self._due_today(at) if received is at else stamp(self.clock.due(received)),
            "extended": False,
            "paused_at": None if submission.identified else received_at,
            "paused_s": 0,
            "exact": False,
            "run": None,
            "why": None,
            "updated_at": now,
            "data": submission.body,
        }

    def _due_today(self, at: datetime) -> str:
        """When a request received now is due: worked out once a day, as a period runs from the day of receipt."""
        key, due = (self.clock, at.astimezone(self.clock.zone).date()), self._due
        if due is None or due[0] != key:
            self._due = due = key, stamp(self.clock.due(at))
        return due[1]

    def _known(self, keys: Iterable[str], connection: Connection) -> dict[str, dict[str, Any]]:
        wanted = sorted(set(keys))
        if len(wanted) == 1:  # filed one by one, as most are; an IN with one member takes twice the time
            rows = connection.execute(_BY_KEY_MAC, {"mac": wanted[0]}).mappings().all()
        else:
            chunks = [wanted[start : start + 500] for start in range(0, len(wanted), 500)]
            rows = [row for macs in chunks for row in connection.execute(_BY_KEY_MACS, {"macs": macs}).mappings()]
        return {row["key_mac"]: dict(row) for row in rows}

    def _insert(
        self, connection: Connection, fresh: dict[str, dict[str, Any]], now: str
    ) -> Mapping[str, Mapping[str, Any]]:
        """Insert those whose keys are new, and nothing of the others; returns, by key, what stands there now."""
        file = _INSERT if self.database.on_sqlite else _INSERT_WITH_BODY
        if not fresh or self.database.insert(connection, file, list(fresh.values())) == len(fresh):
            known, new = fresh, list(fresh.values())
        else:
            known = self._known(fresh, connection)
            new = [row for key, row in fresh.items() if known[key]["id"] == row["id"]]
            for key, row in fresh.items():
                _refuse_other_body(known[key], row)
            known |= {row["key_mac"]: row for row in new}
        if new:
            if self.database.on_sqlite:
                self.database.insert(connection, _INSERT_BODY, new)
            events = [("received", row["id"], {name: row[name] for name in _SAID}) for row in new]
            self.log.append(connection, events, now)
        return known

    def get(self, request_id: str) -> Filed:
        """One request; UnknownRecord if there is none of this id."""
        with self.database.read() as connection:
            return _filed(_row_of(connection, request_id))

    def whole_id(self, beginning: str) -> str:
        """The id of the one request whose id begins so.

        Raises:
            UnknownRecord: if there is none.
            Misuse: if there are several, or fewer than four characters were given.
        """
        query = sa.select(requests.c.id).where(requests.c.id.startswith(beginning, autoescape=True)).limit(2)
        with self.database.read() as connection:
            found = list(connection.execute(query).scalars())
        if beginning in found:
            return beginning
        if not found:
            raise UnknownRecord(f'there is no request "{beginning}"; list them with: expunge status')
        if len(found) > 1 or len(beginning) < 4:
            raise Misuse(f'"{beginning}" could be another request; give more of its id (expunge status --json)')
        return str(found[0])

    def by_key(self, key: str) -> Filed | None:
        """The request filed under this idempotency key, if any."""
        with self.database.read() as connection:
            found = self._known([self.keys.mac(key.encode("utf-8"))], connection)
        return next(map(_filed, found.values()), None)

    def find(self, *, model: str | None = None, state: Iterable[State] | None = None) -> list[Filed]:
        """All requests, or those about a model, or in some states, in the order in which they were filed."""
        query = sa.select(requests).order_by(requests.c.seq)
        if model is not None:
            query = query.where(requests.c.model == model)
        if state is not None:
            query = query.where(requests.c.state.in_([one.value for one in state]))
        with self.database.read() as connection:
            return [_filed(dict(row)) for row in connection.execute(query).mappings()]

    def body(self, request_id: str) -> bytes:
        """What was asked; UnknownRecord once it has been erased, Corrupt if it is not what was filed."""
        query = sa.select(bodies.c.data, requests.c.body_mac, requests.c.model).join(
            requests, requests.c.id == bodies.c.request
        )
        with self.database.read() as connection:
            row = connection.execute(query.where(bodies.c.request == request_id)).first()
        if row is None:
            raise UnknownRecord(f"the body of request {request_id} was erased when it was done, or never was here")
        if self.keys.mac(body_of(row.model, bytes(row.data))) != row.body_mac:
            raise Corrupt(f"the body of request {request_id} is not the one that was filed; restore the database")
        return bytes(row.data)

    def verify_identity(self, request_id: str) -> Filed:
        """Who asked is who they say: the legal clock runs again."""
        with self.database.write() as connection:
            row = _row_of(connection, request_id)
            states.refuse_step(request_id, State(row["state"]), State.RECEIVED)
            now = self.database.utc(connection)
            paused = row["paused_s"] + max(0, round((moment(now) - moment(row["paused_at"])).total_seconds()))
            due = self.clock.due(moment(row["received_at"]), extended=row["extended"], paused=timedelta(seconds=paused))
            new = {"paused_at": None, "paused_s": paused, "due_at": stamp(due)}
            return self.step(
                connection,
                row,
                State.RECEIVED,
                event="identified",
                said={"due_at": stamp(due), "paused_s": paused},
                **new,
            )

    def extend(self, request_id: str, why: str) -> Filed:
        """Extend the legal period, once; who asked is told, with the reason.

        Raises:
            NotNow: if it is extended or done already, or the first period is over.
        """
        with self.database.write() as connection:
            row = _row_of(connection, request_id)
            now, received = moment(self.database.utc(connection)), moment(row["received_at"])
            paused = timedelta(seconds=row["paused_s"])
            if row["extended"] or State(row["state"]).final or not self.clock.may_extend(received, now, paused=paused):
                raise NotNow(
                    f"request {request_id} cannot be extended: once only, within the first period, and not when done"
                )
            due = stamp(self.clock.due(received, extended=True, paused=paused))
            tell(connection, self.new_id(), request_id, "extended", {"why": why, "due_at": due}, stamp(now))
            return self.step(connection, row, None, event="extended", said={"due_at": due}, due_at=due, extended=True)

    def cancel(self, request_id: str) -> Filed:
        """Take a request back, which is possible until its run has begun."""
        return self._move(request_id, State.CANCELLED, event="cancelled", why=None)

    def deny(self, request_id: str, reason: str) -> Filed:
        """Deny a request for a legal or identity reason; see `states.refuse_denial` for errors."""
        with self.database.write() as connection:
            row = _row_of(connection, request_id)
            states.refuse_denial(request_id, State(row["state"]), reason)
            return self.step(connection, row, State.DENIED, event="denied", said={"reason": reason}, why=reason)

    def expire(self, before: datetime) -> list[Filed]:
        """End all requests received before then whose senders have not proved who they are."""
        ended = []
        for one in self.find(state=[State.IDENTITY_UNVERIFIED]):
            if moment(one.received_at) < before:
                ended.append(self._move(one.id, State.EXPIRED, event="expired", why=None))
        return ended

    def screening(self, request_id: str) -> Filed:
        """Say that its screening begins; said again after a crash, it changes nothing."""
        filed = self.get(request_id)
        return filed if filed.state is State.SCREENING else self._move(request_id, State.SCREENING, event="screening")

    def screened(self, request_id: str, *, held: str | None, exact: bool = False, stages: Sequence[str] = ()) -> Filed:
        """Let a screened request go on, to an exact method if need be, or hold it for a person to look at."""
        said = {"exact": exact, "stages": list(stages)}
        to, event = (State.PENDING, "screened") if held is None else (State.HELD, "held")
        return self._move(request_id, to, event=event, said=said, exact=exact, why=held)

    def release(self, request_id: str, *, exact: bool = False) -> Filed:
        """Let a held, withheld or failed request go on, to an exact method if asked.

        One that was held before any stage had judged it is screened anew.
        """
        filed = self.get(request_id)
        if filed.state not in (State.HELD, State.WITHHELD, State.FAILED):
            raise NotNow(
                f"request {request_id} is {filed.state.value} and cannot become pending by a release; "
                "held, withheld and failed ones can"
            )
        exact = exact or filed.exact
        said = {"exact": exact, "run": None}
        screened = any(
            entry.kind in ("held", "screened") and entry.body["stages"] for entry in self.log.entries(request_id)
        )
        to = State.PENDING if screened or filed.state is not State.HELD else State.SCREENING
        return self._move(request_id, to, event="released", said=said, exact=exact, why=None, run=None)

    def _move(self, request_id: str, to: State, **how: Any) -> Filed:
        with self.database.write() as connection:
            return self.step(connection, _row_of(connection, request_id), to, **how)

    def step(
        self,
        connection: Connection,
        row: Mapping[str, Any],
        to: State | None,
        *,
        event: str,
        said: Mapping[str, Any] | None = None,
        **columns: Any,
    ) -> Filed:
        """Within a transaction: one step (None: no new state), its entry in the log, and its row in the outbox."""
        now = self.database.utc(connection)
        new: dict[str, Any] = {**columns, "updated_at": now}
        if to is not None:
            states.refuse_step(row["id"], State(row["state"]), to)
            new["state"] = to.value
        changed = connection.execute(_update(tuple(new)), {"its_id": row["id"], "its_state": row["state"], **new})
        if changed.rowcount != 1:
            raise NotNow(f"request {row['id']} was moved by somebody else meanwhile; look at it again")
        state = {} if to is None else {"state": to.value}
        self.log.append(connection, [(event, row["id"], {**(said or {}), **state})], now)
        if to in _TOLD:
            tell(connection, self.new_id(), row["id"], to.value, said or {}, now)
            if row["extended"]:  # who asked was told why; the words of a person go when the request is done
                told = canonical({"due_at": row["due_at"]}).decode("utf-8")
                mine = (outbox.c.request == row["id"]) & (outbox.c.topic == "extended")
                connection.execute(outbox.update().where(mine).values(data=told))
            if to is not State.COMPLETED:
                connection.execute(bodies.delete().where(bodies.c.request == row["id"]))
        return _filed({**row, **new})

    def outbox(self) -> list[Mapping[str, Any]]:
        """What is to be told and was not sent yet, oldest first. Senders may send twice: receivers go by the id."""
        query = sa.select(outbox).where(outbox.c.sent_at.is_(None)).order_by(outbox.c.at, outbox.c.id)
        with self.database.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def sent(self, message: str) -> None:
        """A message was delivered."""
        with self.database.write() as connection:
            now = self.database.utc(connection)
            connection.execute(outbox.update().where(outbox.c.id == message).values(sent_at=now))


def tell(connection: Connection, message: str, request_id: str, topic: str, data: Mapping[str, Any], at: str) -> None:
    """Within a transaction: put a message into the outbox."""
    text = canonical(dict(data)).decode("utf-8")
    connection.execute(_INSERT_OUTBOX, {"id": message, "request": request_id, "topic": topic, "data": text, "at": at})


_BY_KEY_MAC = sa.select(requests).where(requests.c.key_mac == sa.bindparam("mac"))
_BY_KEY_MACS = sa.select(requests).where(requests.c.key_mac.in_(sa.bindparam("macs", expanding=True)))
_INSERT_OUTBOX = outbox.insert()
_SAID = ("body_mac", "due_at", "kind", "model", "received_at", "regime", "state", "key_mac")

_COLUMNS = [column.name for column in requests.columns if column.name != "seq"]
_INSERT = (
    f"INSERT INTO request (seq, {', '.join(_COLUMNS)}) "
    f"VALUES ((SELECT coalesce(max(seq), 0) + 1 FROM request), {', '.join(':' + name for name in _COLUMNS)}) "
    "ON CONFLICT (key_mac) DO NOTHING"
)
_INSERT_BODY = "INSERT INTO body (request, data) VALUES (:id, :data)"
_INSERT_WITH_BODY = f"WITH new AS ({_INSERT} RETURNING id) INSERT INTO body (request, data) SELECT id, :data FROM new"
"""Both at once, as PostgreSQL can and SQLite cannot: one answer to wait for."""
_DAY = timedelta(days=1)


@cache
def _update(names: tuple[str, ...]) -> sa.Update:
    """Sets these columns of one request that is still in one state; made once, as a run takes many such steps."""
    still = requests.c.id == sa.bindparam("its_id"), requests.c.state == sa.bindparam("its_state")
    return requests.update().where(*still).values({name: sa.bindparam(name) for name in names})


def body_of(model: str, body: bytes) -> bytes:
    """What the digest of a request is made from: the same body about another model is another request."""
    return canonical([model]) + body


def _refuse_other_body(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if earlier["model"] != now["model"]:
        raise OtherBody(f'this key was used before for a request about "{earlier["model"]}"; use a new key')
    if earlier["body_mac"] != now["body_mac"]:
        raise OtherBody(
            "this idempotency key was used before for another request; use a new key for a new request, or file "
            "the same one again"
        )


def _row_of(connection: Connection, request_id: str) -> Mapping[str, Any]:
    row = connection.execute(sa.select(requests).where(requests.c.id == request_id)).mappings().first()
    if row is None:
        raise UnknownRecord(f'there is no request "{request_id}"; list them with: expunge status')
    return dict(row)


def _filed(row: Mapping[str, Any]) -> Filed:
    values = {name: row[name] for name in Filed.__dataclass_fields__}
    return Filed(
        **{**values, "state": State(row["state"]), "extended": bool(row["extended"]), "exact": bool(row["exact"])}
    )
