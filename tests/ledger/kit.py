"""A ledger whose time, ids and keys a test sets, and a worker that carries a run through, step by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from expunge.core.records import Records
from expunge.ledger import check
from expunge.ledger.jobs import Run, Runs, Statement
from expunge.ledger.keys import Keys
from expunge.ledger.ledger import Ledger
from expunge.ledger.models import Served
from expunge.ledger.recordset import RecordSet
from expunge.ledger.requests import Filed, Submission
from expunge.ledger.tables import metadata

__all__ = ["Run", "Runs", "Statement"]

KEYS = Keys(Ed25519PrivateKey.from_private_bytes(b"1" * 32), b"2" * 32)
DAY_S = 86_400.0
START_S = 1_800_000_000.0


@dataclass
class Time:
    """What the ledger takes for the present instant, in seconds since 1970; it stands still until it is set."""

    at_s: float = START_S

    def __call__(self) -> float:
        return self.at_s


def counted(prefix: str) -> Callable[[], str]:
    """Ids that repeat."""
    numbers = count(1)
    return lambda: f"{prefix}-{next(numbers):06d}"


def record_keys() -> Iterator[bytes]:
    """Keys of records that repeat."""
    return (hashlib.sha256(b"%d" % number).digest() for number in count())


def opened(url: str, **given: Any) -> Ledger:
    """The ledger at this URL, with fixed keys."""
    return Ledger(url, KEYS, **{"now": Time(), **given})


def emptied(url: str) -> str:
    """The same database with all rows of a ledger deleted, if it holds one."""
    engine = sa.create_engine(url)
    if sa.inspect(engine).has_table("meta"):
        with engine.begin() as connection:
            for table in metadata.sorted_tables:
                connection.execute(table.delete())
    engine.dispose()
    return url


def rows(many: int) -> Records:
    """Records r-0, r-1, ... of three owners."""
    x = torch.arange(many * 4, dtype=torch.uint8).reshape(many, 4)
    names = [f"r-{i}" for i in range(many)]
    return Records(x, torch.arange(many) % 2, names, [f"o-{i % 3}" for i in range(many)])


def register(ledger: Ledger, many: int = 24, model: str = "m") -> None:
    """Serve a model that stands on so many rows."""
    ledger.models.register(model, "a" * 64, "f1", rows(many))


def asking(*names: str) -> bytes:
    """The body of a request to remove these records."""
    return json.dumps(names).encode()


def file(ledger: Ledger, name: str, model: str = "m", **given: Any) -> Filed:
    """A request to remove one record, filed under a key of the record's name."""
    return ledger.requests.submit(
        Submission(**{"model": model, "kind": "remove", "body": asking(name), "key": f"key of {name}", **given})
    )[0]


def ready(ledger: Ledger, *names: str, exact: bool = False, model: str = "m") -> list[str]:
    """File a request for each record and take it through the screen; their ids."""
    ids = [file(ledger, name, model).id for name in names]
    for one in ids:
        ledger.requests.screening(one)
        ledger.requests.screened(one, held=None, exact=exact)
    return ids


def advance(ledger: Ledger, run: Run) -> Run | None:
    """Do the next step of a run, whoever did those before; None if that was the last."""
    if run.step == "claimed":
        return ledger.runs.record(run, "unlearned", **plan(ledger, run, _named(ledger, run)))
    if run.step == "unlearned":
        ledger.runs.verifying(run)
        version = ledger.models.served(run.model).version + 1
        served = Served(name=run.model, version=version, digest=run.detail["after"], folder=f"f{version}")
        names = frozenset(name for names in run.detail["names"].values() for name in names)
        return ledger.models.switch(run, served, names)
    ledger.runs.complete(run, statements(run), check.canonical(run.detail["difference"]))
    return None


def finish(ledger: Ledger, run: Run | None) -> None:
    """All steps of a run, from where it stands."""
    while run is not None:
        run = advance(ledger, run)


def carry_out(ledger: Ledger, worker: str = "w", model: str = "m") -> None:
    """Run after run until nothing is pending, then sign."""
    while (run := ledger.runs.claim(model, worker)) is not None:
        finish(ledger, run)
    ledger.certificates.sign()
    ledger.log.checkpoint()


def _named(ledger: Ledger, run: Run) -> dict[str, list[str]]:
    return {one: [KEYS.pseudonym(name) for name in json.loads(ledger.requests.body(one))] for one in run.requests}


def plan(ledger: Ledger, run: Run, names: dict[str, list[str]]) -> dict[str, Any]:
    """What the run will remove, and all that its certificates need, so that any worker can go on from here."""
    with ledger.database.read() as connection:
        before = ledger.models.standing_on(connection, run.model)
        anchor = ledger.models.anchored(connection, run.model).index
        removed = {one: ledger.commitments.of(connection, run.model, names[one]).values() for one in names}
    gone = sorted(member for members in removed.values() for member in members)
    after = RecordSet(set(before._members) - set(gone))
    return {
        "before": ledger.models.served(run.model).digest,
        "after": hashlib.sha256(repr(gone).encode()).hexdigest(),
        "names": names,
        "removed": {one: sorted(member.hex() for member in members) for one, members in removed.items()},
        "dataset": {
            "anchor": anchor,
            "before": before.root().to_json(),
            "after": after.root().to_json(),
            "rowsRead": after.root().to_json(),
        },
        "difference": {
            "removed": [member.hex() for member in gone],
            "removal": before.removal(gone),
            "added": [],
            "addition": [],
        },
    }


def statements(run: Run) -> dict[str, Statement]:
    """What is certified of each request of a run that has been planned."""
    return {one: _statement(run, one) for one in run.requests}


def _statement(run: Run, request: str) -> Statement:
    members = [bytes.fromhex(text) for text in run.detail["removed"][request]]
    predicate = {
        "request": {"id": request},
        "modelBefore": {"digest": {"sha256": run.detail["before"]}},
        "removed": {
            "count": len(members),
            "commitmentRoot": check.tree_root([check.leaf_hash(member) for member in members]).hex(),
        },
        "dataset": run.detail["dataset"],
        "claim": {"level": "exact", "caveat": "x"},
        "stages": [],
        "outside": [],
    }
    payload = {
        "_type": check.STATEMENT_TYPE,
        "subject": [{"name": run.model, "digest": {"sha256": run.detail["after"]}}],
        "predicateType": check.PREDICATE_TYPE,
        "predicate": predicate,
    }
    return Statement(payload=check.canonical(payload), removed=members)


def tables(ledger: Ledger) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that the ledger holds."""
    with ledger.database.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for table in metadata.sorted_tables
        }


def kinds(ledger: Ledger, request: str) -> list[str]:
    """The events of a request, in order."""
    return [entry.kind for entry in ledger.log.entries(request)]


def faults(ledger: Ledger) -> list[str]:
    """What is wrong once all is signed; entries without a gap and one completion, certificate and message each."""
    ledger.certificates.sign()
    found = ledger.verify()
    held = tables(ledger)
    if [row[0] for row in held["entry"]] != list(range(len(held["entry"]))):
        found.append("the entries have a gap")
    done = sorted(filed.id for filed in ledger.requests.find() if filed.state == "completed")
    told = {
        "events": sorted(row[1] for row in held["entry"] if row[2] == "completed"),
        "certificates": sorted(row[0] for row in held["certificate"]),
        "messages": sorted(row[1] for row in held["outbox"] if row[2] == "completed"),
    }
    found += [f"{what}: {has} for {done}" for what, has in told.items() if has != done]
    return found


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What these give, each done in a thread of its own; what the first of them raised is raised."""
    with ThreadPoolExecutor(len(works)) as threads:
        return [done.result() for done in [threads.submit(work) for work in works]]


def files_of(url: str) -> list[Path]:
    """The files of a SQLite database that are there now."""
    path = Path(url.removeprefix("sqlite:///"))
    return [found for end in ("", "-wal", "-shm", "-journal") if (found := Path(f"{path}{end}")).exists()]
