"""Full verification: the tables against the log, the log against its signatures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.digest import sha256_hex
from expunge.core.errors import Corrupt
from expunge.ledger import check
from expunge.ledger.database import Database
from expunge.ledger.keys import Keys
from expunge.ledger.log import Log, fault_of
from expunge.ledger.tables import body, certificate, checkpoint, entry, model, outbox, record, request, run
from expunge.ledger.tree import Tree


def faults(database: Database, log: Log, keys: Keys) -> Iterator[str]:
    """What is wrong, one line each: the table, the row, what does not fit."""
    with database.read() as connection:
        tree, last, anchored = Tree(), {}, {}  # type: ignore[var-annotated]
        for row in connection.execute(sa.select(entry).order_by(entry.c.idx)):
            if row.idx != len(tree):
                yield f"entry {len(tree)}: missing"
                return
            fault = fault_of(row)
            if fault is not None:
                yield fault
            tree.append(bytes(row.leaf))
            if fault is None:
                said = check.parse(row.body.encode("utf-8"))
                if row.request:
                    _replay(last.setdefault(row.request, {}), row, said)
                else:
                    anchored[said["model"]] = said
        yield from _checkpoints(connection, tree, keys, log)
        yield from _requests(connection, last)
        yield from _outbox(connection, last)
        yield from _certificates(connection, last, keys, tree)
        yield from _models(connection, anchored)


def _replay(known: dict[str, Any], row: Any, said: Mapping[str, Any]) -> None:
    """What the events so far say of a request."""
    known.update({name: said[name] for name in said})
    known["updated_at"] = row.at
    known["events"] = {*known.get("events", ()), row.kind}
    if row.kind == "completed":
        known["completed_at"] = row.idx


def _checkpoints(connection: Connection, tree: Tree, keys: Keys, log: Log) -> Iterator[str]:
    for row in connection.execute(sa.select(checkpoint).order_by(checkpoint.c.size)):
        try:
            signed = check.open_note(row.note, keys.trusted)
        except check.Refused as error:
            yield f"checkpoint {row.size}: {error.why}"
            continue
        if (signed.size, signed.origin) != (row.size, log.origin):
            yield f"checkpoint {row.size}: it is signed for {signed.size} entries of {signed.origin}"
        elif signed.size > len(tree) or tree.root(signed.size) != signed.root:
            yield f"checkpoint {row.size}: the log does not hold what was signed"
    try:
        outside = log.last_checkpoint()
    except Corrupt as error:
        yield f"checkpoint outside: {error}"
        return
    if outside is not None and (outside.size > len(tree) or tree.root(outside.size) != outside.root):
        yield f"checkpoint outside: the log does not hold the {outside.size} entries that were signed"


_COMMITTED = ("key_mac", "body_mac", "model", "kind", "regime", "received_at", "due_at", "state", "updated_at")


def _requests(connection: Connection, last: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    found = set()
    for row in connection.execute(sa.select(request)).mappings():
        found.add(row["id"])
        said = last.get(row["id"])
        if said is None:
            yield f"request {row['id']}: the log does not know it"
            continue
        for name in _COMMITTED:
            if row[name] != said.get(name):
                yield f"request {row['id']}: {name} is {row[name]!r} and the log says {said.get(name)!r}"
        if bool(row["exact"]) != said.get("exact", False) or bool(row["extended"]) != ("extended" in said["events"]):
            yield f"request {row['id']}: exact or extended is not as the log says"
        if row["run"] != said.get("run"):
            yield f"request {row['id']}: run is {row['run']!r} and the log says {said.get('run')!r}"
    for name in sorted(set(last) - found):
        yield f"request {name}: missing, though the log knows it"


def _outbox(connection: Connection, last: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    told = {(row.request, row.topic) for row in connection.execute(sa.select(outbox))}
    for name, said in sorted(last.items()):
        for topic in ("completed", "denied", "cancelled", "expired", "extended"):
            if (topic in said["events"]) != ((name, topic) in told):
                yield f"outbox: request {name} was {topic}, or not, and the outbox says otherwise"
    for name, topic in sorted(told):
        if name not in last:
            yield f"outbox: {topic} of request {name}, which the log does not know"
    kept = set(connection.execute(sa.select(body.c.request)).scalars())
    for name, said in sorted(last.items()):
        over = said.get("state") in ("completed", "denied", "cancelled", "expired")
        if over == (name in kept):
            yield f"body: that of request {name} {'was not erased' if over else 'is missing'}"


def _certificates(
    connection: Connection, last: Mapping[str, Mapping[str, Any]], keys: Keys, tree: Tree
) -> Iterator[str]:
    found = set()
    differences = dict(connection.execute(sa.select(run.c.id, run.c.difference)).tuples().all())
    for row in connection.execute(sa.select(certificate)):
        found.add(row.request)
        said = last.get(row.request, {})
        if (sha256_hex(bytes(row.payload)), row.idx) != (said.get("certificate"), said.get("completed_at")):
            yield f"certificate {row.request}: it is not the one that the log names"
            continue
        if row.envelope is None:
            yield f"certificate {row.request}: it is not signed yet"
            continue
        try:
            statement, payload = check.open_envelope(check.parse(bytes(row.envelope)), keys.trusted)
            bundle = {
                "removed": {"commitments": check.parse(bytes(row.removed))},
                "difference": check.parse(bytes(differences.get(row.run) or b"")),
            }
            check.check_removed(bundle, statement)
            check.check_difference(bundle, statement)
            if payload != bytes(row.payload):
                raise check.Refused("certificate", "what is signed is not what was committed")
        except check.Refused as error:
            yield f"certificate {row.request}: {error}"
    for name, said in sorted(last.items()):
        if ("completed" in said["events"]) and name not in found:
            yield f"certificate {name}: missing"


def _models(connection: Connection, anchored: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    from expunge.ledger.recordset import RecordSet

    for row in connection.execute(sa.select(model)):
        said = anchored.get(row.name)
        if said is None or (row.version, row.digest) != (said["version"], said["digest"]):
            yield f"model {row.name}: version or digest is not the one that the log names"
            continue
        members = connection.execute(
            sa.select(record.c.commitment).where(record.c.model == row.name, record.c.run.is_(None))
        )
        if RecordSet(bytes(one.commitment) for one in members).root().to_json() != said["set"]:
            yield f"record: those that model {row.name} stands on are not those that the log anchors"
