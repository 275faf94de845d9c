"""A small worked ledger, the same at every call; and bundles made by hand, as by a provider who may lie."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from expunge.core.records import Records
from expunge.ledger import check
from expunge.ledger.jobs import Run, Statement
from expunge.ledger.keys import Keys
from expunge.ledger.ledger import Ledger
from expunge.ledger.models import Served
from expunge.ledger.recordset import RecordSet
from expunge.ledger.requests import Submission
from expunge.ledger.tree import Tree

MODEL = "digits"
ROWS, OWNERS = 40, 8
START = datetime(2026, 3, 2, 9, tzinfo=UTC).timestamp()


def keys(seed: str = "provider") -> Keys:
    """Keys that are the same each time."""
    return Keys(Ed25519PrivateKey.from_private_bytes(drawn(seed, "signing")), drawn(seed, "pepper"))


def drawn(*words: object) -> bytes:
    """32 bytes that look random and are the same each time."""
    return hashlib.sha256(repr(words).encode()).digest()


def records() -> Records:
    """40 rows of 8 owners, row i of owner i modulo 8, each row in it once."""
    x = torch.arange(ROWS * 6, dtype=torch.float32).reshape(ROWS, 6)
    return Records(
        x, torch.arange(ROWS) % 3, [f"r-{i}" for i in range(ROWS)], [f"owner-{i % OWNERS}" for i in range(ROWS)]
    )


def content(row: int) -> str:
    """SHA-256 of a row's content, as its owner knows it."""
    return str(records().digests()[row].tobytes().hex())


@dataclass
class Worked:
    """The ledger, and how to go on with it. Its clock goes on by a second whenever it is looked at."""

    folder: Path
    keys: Keys = field(default_factory=keys)
    seconds: float = START
    ledger: Ledger = field(init=False)
    completed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = itertools.count(int(self.seconds - START))  # never again an id that a copy holds
        self._keys = (drawn("record key", i) for i in itertools.count())
        self.open()

    def open(self, *, replace_anchor: bool = False) -> Ledger:
        """Open the ledger, again perhaps."""
        self.ledger = Ledger(
            self.url,
            self.keys,
            anchor=self.folder / "anchor",
            replace_anchor=replace_anchor,
            now=self.now,
            new_id=lambda: f"id-{next(self._ids):04d}",
            draw_keys=self._draw,
        )
        return self.ledger

    def _draw(self) -> Iterator[bytes]:
        return self._keys

    def now(self) -> float:
        """The time, a second later each time."""
        self.seconds += 1
        return self.seconds

    @property
    def path(self) -> Path:
        """The database file."""
        return self.folder / "ledger.db"

    @property
    def url(self) -> str:
        """The database as SQLAlchemy has it."""
        return f"sqlite:///{self.path}"

    def sql(self, statement: str, *values: Any) -> list[Any]:
        """What anybody can do who can write the file."""
        with sqlite3.connect(self.path) as raw:
            raw.execute("PRAGMA synchronous=OFF")
            got = raw.execute(statement, values).fetchall()
        raw.close()
        return got

    def file(self, key: str, **how: Any) -> str:
        """File a request; its id."""
        one = Submission(model=MODEL, kind="remove", body=f"please: {key}".encode(), key=key, **how)
        return self.ledger.requests.submit(one)[0].id

    def screen(self, *requests: str, exact: bool = False) -> None:
        """Screen these requests and let them go on."""
        for request in requests:
            self.ledger.requests.screening(request)
            self.ledger.requests.screened(request, held=None, exact=exact)

    def claim(self, *requests: str) -> Run:
        """Begin a run, which must be with these requests."""
        run = self.ledger.runs.claim(MODEL, "worker")
        assert run is not None
        assert run.requests == requests
        return run

    def remove(self, rows_of: dict[str, Sequence[int]]) -> None:
        """Carry out pending requests, each for some rows, in one run, and sign what was done."""
        ledger = self.ledger
        run = self.claim(*rows_of)
        ledger.runs.verifying(run)
        names = {one: [self.keys.pseudonym(f"r-{row}") for row in rows] for one, rows in rows_of.items()}
        with ledger.database.read() as connection:
            before, anchor = ledger.models.standing_on(connection, MODEL), ledger.models.anchored(connection, MODEL)
            gone = {one: sorted(ledger.commitments.of(connection, MODEL, of).values()) for one, of in names.items()}
        old = ledger.models.served(MODEL)
        new = Served(
            name=MODEL,
            version=old.version + 1,
            digest=drawn("weights", old.version + 1).hex(),
            folder=f"f{old.version}",
        )
        run = ledger.models.switch(run, new, frozenset(itertools.chain(*names.values())))
        with ledger.database.read() as connection:
            after = ledger.models.standing_on(connection, MODEL)
        case = Case(before=before, gone=sorted(itertools.chain(*gone.values())), after=after)
        statements = {
            one: Statement(
                payload=check.canonical(
                    case.statement(one, mine, anchor.index, old.digest, new.digest),
                ),
                removed=mine,
            )
            for one, mine in gone.items()
        }
        ledger.runs.complete(run, statements, check.canonical(case.difference()))
        ledger.certificates.sign()
        ledger.log.checkpoint()
        self.completed += rows_of


@dataclass
class Case:
    """Sets of records before and after a run, and what is said of them: by default the truth."""

    before: RecordSet
    gone: Sequence[bytes]
    after: RecordSet
    added: Sequence[bytes] = ()
    read: RecordSet | None = None
    witnessed: bool = True

    def difference(self) -> dict[str, Any]:
        """The proof of the set difference."""
        return {
            "removed": [one.hex() for one in self.gone],
            "removal": self.before.removal(self.gone) if self.gone else [],
            "added": [one.hex() for one in self.added],
            "addition": self.after.removal(self.added) if self.added else [],
        }

    def statement(self, request: str, mine: Sequence[bytes], anchor: int, old: str, new: str) -> dict[str, Any]:
        """The statement of one request."""
        read = None if not self.witnessed else (self.read or self.after).root().to_json()
        return {
            "_type": check.STATEMENT_TYPE,
            "subject": [{"name": MODEL, "digest": {"sha256": new}}],
            "predicateType": check.PREDICATE_TYPE,
            "predicate": {
                "request": {"id": request},
                "modelBefore": {"digest": {"sha256": old}},
                "removed": {
                    "count": len(mine),
                    "commitmentRoot": check.tree_root([check.leaf_hash(one) for one in sorted(mine)]).hex(),
                },
                "dataset": {
                    "anchor": anchor,
                    "before": self.before.root().to_json(),
                    "after": self.after.root().to_json(),
                    "rowsRead": read,
                },
                "claim": {"level": "exact", "caveat": "as far as the trainer is deterministic"},
                "stages": [
                    {"name": "retrain", "outcome": "passed"},
                    {"name": "backups", "outcome": "left out", "why": "they expire in 30 days"},
                ],
                "outside": ["copies that others made"],
            },
        }


Change = Callable[[dict[str, Any]], object]


def by_hand(
    case: Case,
    mine: Sequence[bytes] | None = None,
    *,
    signer: Keys | None = None,
    of_statement: Change | None = None,
    of_entry: Change | None = None,
    of_anchor: Change | None = None,
    of_release: Change | None = None,
    of_bundle: Change | None = None,
) -> bytes:
    """A bundle that is right in all but what the changes make of it: everything is hashed and signed after them."""
    signer = signer or keys()
    mine = sorted(case.gone if mine is None else mine)
    body = {"model": MODEL, "version": 1, "digest": drawn("old").hex(), "set": case.before.root().to_json()}
    anchor = {"index": 1, "kind": "registered", "request": "", "at": "2026-01-01", "body": body}
    statement = case.statement("id-1", mine, 1, drawn("old").hex(), drawn("new").hex())
    _change(statement, of_statement)
    payload = check.canonical(statement)
    body = {"certificate": hashlib.sha256(payload).hexdigest(), "run": "run-1", "state": "completed"}
    entry = {"index": 4, "kind": "completed", "request": "id-1", "at": "2026-01-02", "body": body}
    body = {"model": MODEL, "version": 2, "digest": drawn("new").hex(), "set": case.after.root().to_json()}
    release = {"index": 3, "kind": "switched", "request": "", "at": "2026-01-02", "body": body}
    _change(release, of_release)
    _change(anchor, of_anchor)
    _change(entry, of_entry)
    tree = Tree(check.leaf_hash(f"another entry {i}".encode()) for i in range(6))
    leaves = [tree.leaf(i) for i in range(6)]
    for one in (release, anchor, entry):
        if type(one["index"]) is int and 0 <= one["index"] < 6:
            leaves[one["index"]] = check.leaf_hash(check.canonical(one))
    tree = Tree(leaves)
    place = {id(one): one["index"] if one["index"] in range(6) else 0 for one in (release, anchor, entry)}
    bundle = {
        "format": check.BUNDLE_FORMAT,
        "certificate": signer.sign_statement(payload),
        "entry": {"entry": entry, "inclusion": [one.hex() for one in tree.inclusion(place[id(entry)])]},
        "anchor": {"entry": anchor, "inclusion": [one.hex() for one in tree.inclusion(place[id(anchor)])]},
        "release": {"entry": release, "inclusion": [one.hex() for one in tree.inclusion(place[id(release)])]},
        "checkpoint": signer.sign_checkpoint(check.Checkpoint("expunge/ledger", len(tree), tree.root())),
        "removed": {"commitments": [one.hex() for one in mine]},
        "difference": case.difference(),
    }
    _change(bundle, of_bundle)
    return check.canonical(bundle)


def _change(value: dict[str, Any], change: Change | None) -> None:
    if change is not None:
        change(value)


def members(count: int, seed: str = "member") -> list[bytes]:
    """So many commitments, sorted."""
    return sorted(hmac.digest(drawn(seed), str(i).encode(), "sha256") for i in range(count))


def case(count: int = 12, gone: int = 3, added: int = 0) -> Case:
    """An honest run that removes the first few of some records and adds a few new ones."""
    there, new = members(count), members(added, "new")
    return Case(RecordSet(there), there[:gone], RecordSet(there[gone:] + new), new)


def build(folder: Path) -> Worked:
    """Requests in every state that a ledger knows, two runs that completed and one that failed, all signed."""
    worked = Worked(folder)
    ledger = worked.ledger
    ledger.models.register(MODEL, drawn("weights", 1).hex(), "f0", records())
    first, second = worked.file("first"), worked.file("second")
    worked.screen(first, second)
    worked.remove({first: [0, 8], second: [1]})
    failed, again = worked.file("failed"), worked.file("again")
    worked.screen(failed, again, exact=True)
    ledger.runs.fail(worked.claim(failed, again), "the disk was full")
    ledger.requests.release(again)
    worked.remove({again: [2, 10, 18]})
    _in_other_states(worked)
    running = worked.file("running")
    worked.screen(running, exact=True)
    worked.claim(running)
    ledger.log.checkpoint()
    return worked


def reopened(worked: Worked, folder: Path) -> Worked:
    """A copy of the ledger, opened in another folder."""
    worked.ledger.close()
    shutil.copytree(worked.folder, folder, dirs_exist_ok=True)
    return Worked(folder, worked.keys, worked.seconds, completed=list(worked.completed))


def _in_other_states(worked: Worked) -> None:
    requests = worked.ledger.requests
    requests.deny(worked.file("denied"), "no_match")
    requests.cancel(worked.file("cancelled"))
    held = worked.file("held")
    requests.screening(held)
    requests.screened(held, held="it looks odd")
    worked.file("unverified", identified=False)
    requests.verify_identity(worked.file("identified", identified=False))
    requests.extend(worked.file("extended"), "there are many")
    worked.file("received")
