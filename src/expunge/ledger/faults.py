"""Full verification: the tables against the log, the log against its signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.digest import sha256_hex
from expunge.core.errors import Corrupt
from expunge.ledger import check
from expunge.ledger.database import Database
from expunge.ledger.keys import Keys
from expunge.ledger.log import Log, fault_of
from expunge.ledger.recordset import RecordSet
from expunge.ledger.requests import body_of
from expunge.ledger.tables import body, certificate, checkpoint, entry, model, outbox, record, request, run
from expunge.ledger.tree import Tree

_TOLD = ("completed", "denied", "cancelled", "expired", "extended")
_OVER = _TOLD[:-1]
_ANCHORS = ("registered", "switched")


@dataclass
class _Story:
    """What the log tells of one request: the last it said of each thing, and when which event was."""

    rank: int
    said: dict[str, Any] = field(default_factory=dict)
    at: dict[str, str] = field(default_factory=dict)
    updated_at: str = ""
    first_state: str | None = None
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    completed: int | None = None

    def go_on(self, row: Any, said: Mapping[str, Any]) -> None:
        """The next event."""
        if not self.said:
            self.first_state = said.get("state")
        self.said.update(said)
        self.at[row.kind] = self.updated_at = row.at
        if row.kind == "released":
            self.said["run"] = None
        if row.kind in _TOLD:
            self.told[row.kind] = {name: said[name] for name in said if name != "state"}
        if row.kind == "completed":
            self.completed = row.idx


_Stories = dict[str, _Story]


def faults(database: Database, log: Log, keys: Keys) -> Iterator[str]:
    """What is wrong, one line each: the table, the row, what does not fit.

    What it cannot see: whoever can write the database can add entries after the last checkpoint, or change those; and
    nothing in the log covers leases, notes on why a request is held, folders of models, when a message was sent,
    records' names and keys, or that a checkpoint before the last was deleted.
    """
    with database.read() as connection:
        tree = Tree()
        stories: _Stories = {}
        anchored: dict[str, Mapping[str, Any]] = {}
        yield from _whole("entry", _entries(connection, tree, stories, anchored))
        yield from _whole("checkpoint", _checkpoints(connection, tree, keys, log))
        yield from _whole("request", _requests(connection, stories))
        yield from _whole("outbox", _outbox(connection, stories))
        yield from _whole("body", _bodies(connection, stories, keys))
        yield from _whole("run", _runs(connection, stories))
        yield from _whole("certificate", _certificates(connection, stories, keys))
        yield from _whole("model", _models(connection, anchored))
        yield from _whole("record", _records(connection, anchored))


def _whole(table: str, found: Iterator[str]) -> Iterator[str]:
    """The same; values of another kind than the table's are a fault too, and end the search of that table."""
    try:
        yield from found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield f"{table}: a value is not of its column's kind ({reason}), so the rest was not read"


def _entries(
    connection: Connection, tree: Tree, stories: _Stories, anchored: dict[str, Mapping[str, Any]]
) -> Iterator[str]:
    for row in connection.execute(sa.select(entry).order_by(entry.c.idx)):
        if row.idx != len(tree):
            yield f"entry {len(tree)}: missing"
            return
        fault = fault_of(row)
        tree.append(bytes(row.leaf))
        if fault is not None:
            yield fault
            continue
        said = check.parse(row.body.encode("utf-8"))
        if row.request:
            stories.setdefault(row.request, _Story(rank=len(stories))).go_on(row, said)
        elif row.kind in _ANCHORS:
            anchored[said["model"]] = said


def _checkpoints(connection: Connection, tree: Tree, keys: Keys, log: Log) -> Iterator[str]:
    for row in connection.execute(sa.select(checkpoint).order_by(checkpoint.c.size)):
        try:
            signed = check.open_note(row.note, keys.trusted)
        except (check.Refused, AttributeError) as error:
            yield f"checkpoint {row.size}: {error}"
            continue
        if (signed.size, signed.origin) != (row.size, log.origin):
            yield f"checkpoint {row.size}: it is signed for {signed.size} entries of {signed.origin}"
        else:
            yield from _against(signed, tree, f"checkpoint {row.size}")
    try:
        outside = log.last_checkpoint()
    except Corrupt as error:
        yield f"checkpoint outside: {error}"
        return
    if outside is not None:
        yield from _against(outside, tree, "checkpoint outside")


def _against(signed: check.Checkpoint, tree: Tree, name: str) -> Iterator[str]:
    if signed.size > len(tree):
        yield f"{name}: {signed.size} entries were signed, and entry {len(tree)} and all after it are missing"
    elif tree.root(signed.size) != signed.root:
        yield f"{name}: the first {signed.size} entries are not those that were signed"


_COMMITTED = ("key_mac", "body_mac", "model", "kind", "regime", "received_at", "due_at", "state")


def _requests(connection: Connection, stories: _Stories) -> Iterator[str]:
    found = set()
    for row in map(dict, connection.execute(sa.select(request)).mappings()):
        found.add(row["id"])
        story = stories.get(row["id"])
        if story is None:
            yield f"request {row['id']}: the log does not know it"
            continue
        for name, wanted in _columns(story, row).items():
            if row[name] != wanted:
                yield f"request {row['id']}: {name} is {row[name]!r} and the log says {wanted!r}"
    for name in sorted(set(stories) - found):
        yield f"request {name}: missing, though the log knows it"


def _columns(story: _Story, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns of a request must hold."""
    said = story.said
    unsure = story.first_state == "identity_unverified"
    wanted: dict[str, Any] = {name: said.get(name) for name in _COMMITTED}
    wanted |= {
        "seq": story.rank + 1,
        "extended": "extended" in story.at,
        "exact": said.get("exact", False),
        "run": said.get("run"),
        "paused_at": said["received_at"] if unsure and "identified" not in story.at else None,
        "paused_s": said.get("paused_s", 0),
        "updated_at": story.updated_at,
        "why": said.get("reason") if "denied" in story.at else row["why"],
    }
    return wanted


def _outbox(connection: Connection, stories: _Stories) -> Iterator[str]:
    found = set()
    for row in connection.execute(sa.select(outbox)):
        found.add((row.request, row.topic))
        story = stories.get(row.request)
        told = None if story is None else story.told.get(row.topic)
        if story is None or told is None:
            yield f"outbox {row.id}: {row.topic} of request {row.request}, which the log does not know of"
            continue
        said = check.parse(row.data.encode("utf-8"))
        if row.topic == "extended":  # why, and the instant before the event's, are in the outbox alone
            said.pop("why", None)
        elif row.at != story.at[row.topic]:
            yield f"outbox {row.id}: at is {row.at!r} and request {row.request} was {row.topic} at another time"
        if said != told:
            yield f"outbox {row.id}: it does not tell what the log says of request {row.request}, {row.topic}"
    for name, story in sorted(stories.items()):
        for topic in sorted(story.told):
            if (name, topic) not in found:
                yield f"outbox: request {name} was {topic}, and no message says so"


def _bodies(connection: Connection, stories: _Stories, keys: Keys) -> Iterator[str]:
    found = set()
    for row in connection.execute(sa.select(body)):
        found.add(row.request)
        story = stories.get(row.request)
        if story is None or story.said.get("state") in _OVER:
            yield f"body {row.request}: {'the log does not know its request' if story is None else 'was not erased'}"
        elif keys.mac(body_of(str(story.said.get("model")), bytes(row.data))) != story.said.get("body_mac"):
            yield f"body {row.request}: it is not what was asked"
    for name, story in sorted(stories.items()):
        # Within the last steps of a run, while it is verifying, the body may be erased already.
        if story.said.get("state") not in {*_OVER, "verifying"} and name not in found:
            yield f"body {name}: missing, though its request is not done"


def _runs(connection: Connection, stories: _Stories) -> Iterator[str]:
    found = {row.id: row for row in connection.execute(sa.select(run))}
    for name, story in sorted(stories.items()):
        said = story.said
        if said.get("run") is None:
            continue
        row = found.get(said["run"])
        if row is None:
            yield f"run {said['run']}: missing, though the log says that it carries out request {name}"
        elif row.model != said.get("model"):
            yield f"run {row.id}: model is {row.model!r} and its request is about {said.get('model')!r}"
        elif said.get("state") in ("running", "verifying") and row.exact != said.get("exact", False):
            yield f"run {row.id}: exact is {row.exact} and the log says {said.get('exact', False)}"
        elif (row.state == "done") != (said.get("state") == "completed"):
            yield f"run {row.id}: state is {row.state!r} and its request {name} is {said.get('state')}"
    for unknown in sorted(set(found) - {story.said.get("run") for story in stories.values()}):
        if found[unknown].state in ("active", "done"):
            yield f"run {unknown}: {found[unknown].state}, and the log knows no request that it carries out"


def _certificates(connection: Connection, stories: _Stories, keys: Keys) -> Iterator[str]:
    found = set()
    differences = {row.id: row.difference for row in connection.execute(sa.select(run.c.id, run.c.difference))}
    for row in connection.execute(sa.select(certificate)):
        found.add(row.request)
        story = stories.get(row.request)
        said = {} if story is None else story.said
        if story is None or (row.idx, row.run) != (story.completed, said.get("run")):
            yield f"certificate {row.request}: its entry or run is not the one that the log names"
        elif sha256_hex(bytes(row.payload)) != said.get("certificate"):
            yield f"certificate {row.request}: it is not the one that the log names"
        elif row.envelope is None:
            yield f"certificate {row.request}: it is not signed yet"
        else:
            fault = _certificate(row, differences.get(row.run), keys)
            if fault is not None:
                yield f"certificate {row.request} of run {row.run}: {fault}"
    for name, story in sorted(stories.items()):
        if story.completed is not None and name not in found:
            yield f"certificate {name}: missing"


def _certificate(row: Any, difference: bytes | None, keys: Keys) -> str | None:
    try:
        statement, payload = check.open_envelope(check.parse(bytes(row.envelope)), keys.trusted)
        bundle = {
            "removed": {"commitments": check.parse(bytes(row.removed))},
            "difference": check.parse(bytes(difference or b"")),
        }
        check.check_form(statement)
        check.check_removed(bundle, statement)
        check.check_difference(bundle, statement)
    except check.Refused as error:
        return str(error)
    return None if payload == bytes(row.payload) else "what is signed is not what was committed"


def _models(connection: Connection, anchored: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    found = set()
    for row in connection.execute(sa.select(model)):
        found.add(row.name)
        said = anchored.get(row.name)
        if said is None or (row.version, row.digest) != (said["version"], said["digest"]):
            yield f"model {row.name}: version or digest is not the one that the log names"
    for name in sorted(set(anchored) - found):
        yield f"model {name}: missing, though the log anchors it"


def _records(connection: Connection, anchored: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    present: dict[str, list[bytes]] = {name: [] for name in anchored}
    gone: dict[tuple[str, str], list[bytes]] = {}
    for row in connection.execute(sa.select(record.c.model, record.c.commitment, record.c.run)):
        of = present.setdefault(row.model, []) if row.run is None else gone.setdefault((row.run, row.model), [])
        of.append(bytes(row.commitment))
    for name, members in sorted(present.items()):
        if name not in anchored or RecordSet(members).root().to_json() != anchored[name]["set"]:
            yield f"record: those that model {name} stands on are not those that the log anchors"
    known = {(row.id, row.model): row.difference for row in connection.execute(sa.select(run))}
    for name, of_model in sorted(set(gone) - set(known)):
        yield f"record: some of model {of_model} were removed by run {name}, and it has no such run"
    for (name, of_model), difference in sorted(known.items()):
        if difference is None:
            continue
        try:
            removed = {bytes.fromhex(text) for text in check.parse(bytes(difference))["removed"]}
        except (KeyError, TypeError, ValueError):
            yield f"run {name}: its difference cannot be read"
            continue
        if set(gone.get((name, of_model), ())) != removed:
            yield f"record: those of model {of_model} that run {name} removed are not those of its difference"
