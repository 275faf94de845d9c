"""The append-only log: every event is a leaf of one Merkle tree, whose root is signed after the commit."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.errors import Corrupt, Misuse, UnknownRecord, Unwritable
from expunge.core.store import write_atomically
from expunge.ledger import check
from expunge.ledger.database import Database, inserting
from expunge.ledger.keys import Keys
from expunge.ledger.tables import checkpoint as checkpoints
from expunge.ledger.tables import entry as entries
from expunge.ledger.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One event. `request` is empty for events of a model; `body` holds counts, digests and reasons, never names."""

    index: int
    kind: str
    request: str
    at: str
    body: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; what the leaf is the hash of."""
        return {"index": self.index, "kind": self.kind, "request": self.request, "at": self.at, "body": self.body}

    def leaf(self) -> bytes:
        """Hash of the entry in the log's tree."""
        return check.leaf_hash(check.canonical(self.to_json()))


class Log:
    """The log of one ledger.

    Proofs are made from a tree in memory that follows the table: the first proof of a process reads all leaf hashes
    (0.2 s for 100,000), later ones only what is new.
    """

    def __init__(self, database: Database, keys: Keys, origin: str, anchor: Path | None) -> None:
        """The log called `origin`; `anchor` is the file, outside the database, that holds the last checkpoint."""
        self.database, self.keys, self.origin, self.anchor = database, keys, origin, anchor
        self._tree, self._growing = Tree(), threading.RLock()

    def append(
        self, connection: Connection, events: Sequence[tuple[str, str, Mapping[str, Any]]], at: str
    ) -> list[Entry]:
        """Append (kind, request, body) events within the connection's transaction; no other appends until it ends."""
        self.database.lock_appends(connection)
        size = connection.execute(SIZE).scalar_one()
        made = [
            Entry(index=size + i, kind=kind, request=request, at=at, body=body)
            for i, (kind, request, body) in enumerate(events)
        ]
        rows = [
            {
                "idx": entry.index,
                "request": entry.request,
                "kind": entry.kind,
                "at": entry.at,
                "body": check.canonical(entry.body).decode("utf-8"),
                "leaf": entry.leaf(),
            }
            for entry in made
        ]
        if rows:
            self.database.insert(connection, _INSERT, rows)
        return made

    def __len__(self) -> int:
        with self.database.read() as connection:
            return int(connection.execute(SIZE).scalar_one())

    def entry(self, index: int) -> Entry:
        """The entry at this place; UnknownRecord if there is none, Corrupt if it is not what was written."""
        with self.database.read() as connection:
            row = connection.execute(_ONE, {"index": index}).first()
        if row is None:
            raise UnknownRecord(f"the log has no entry {index}; it has {len(self)}")
        return self.read(row)

    def read(self, row: Any) -> Entry:
        """The entry in a row of the table; Corrupt if its columns do not give its leaf hash."""
        fault = fault_of(row)
        if fault is not None:
            raise Corrupt(f"{fault}; somebody changed the database: restore it from a backup")
        return _entry(row)

    def entries(self, request: str | None = None, *, start: int = 0) -> Iterator[Entry]:
        """All entries, or those of one request, in order."""
        query = sa.select(entries).where(entries.c.idx >= start).order_by(entries.c.idx)
        with self.database.read() as connection:
            for row in connection.execute(query if request is None else query.where(entries.c.request == request)):
                yield self.read(row)

    def tree(self) -> Tree:
        """The tree over all entries committed so far. It grows: give sizes, as other threads may have it grow."""
        with self._growing, self.database.read() as connection:
            for row in connection.execute(_SINCE, {"start": len(self._tree)}):
                if row.idx != len(self._tree):
                    raise Corrupt(f"entry {len(self._tree)} is missing from the log; restore it from a backup")
                self._tree.append(bytes(row.leaf))
        return self._tree

    def _root(self) -> check.Checkpoint:
        """Size and root of one moment."""
        with self._growing:
            tree = self.tree()
            return check.Checkpoint(self.origin, len(tree), tree.root())

    def checkpoint(self) -> str:
        """Sign the log as it is committed now; kept in the database and, first, outside of it. Returns the note.

        Never called within a transaction: what is signed must not be undone.

        Raises:
            Corrupt: if the log no longer holds what was signed before.
            Unwritable: if the disk is full or read-only; the last checkpoint stands.
        """
        with self._anchored() as before:
            self._refuse_other_history(before)
            here = self._root()
            note = self.keys.sign_checkpoint(here)
            if self.anchor is not None:
                write_atomically(self.anchor, note.encode("utf-8"))
        with self.database.write() as connection:
            if connection.execute(sa.select(checkpoints.c.size).where(checkpoints.c.size == here.size)).first() is None:
                connection.execute(checkpoints.insert().values(size=here.size, note=note))
        return note

    def last_checkpoint(self) -> check.Checkpoint | None:
        """The last checkpoint kept outside the database; None if there is none yet."""
        if self.anchor is None or not self.anchor.exists():
            return None
        try:
            return check.open_note(self.anchor.read_text(encoding="utf-8"), self.keys.trusted)
        except (check.Refused, UnicodeDecodeError) as error:
            raise Corrupt(f"the checkpoint in {self.anchor} is not one of this ledger ({error}); restore it") from None

    def last_note(self) -> str:
        """The last checkpoint in the database, as it was signed; signs one if there is none yet."""
        query = sa.select(checkpoints.c.note).order_by(checkpoints.c.size.desc()).limit(1)
        with self.database.read() as connection:
            note: str | None = connection.execute(query).scalar()
        return self.checkpoint() if note is None else note

    def refuse_rollback(self) -> None:
        """Refuse a database that holds less, or other, than was signed: an old backup was put in its place.

        Raises:
            Corrupt: if it does, or if the checkpoint outside is missing, so that nobody can tell.
        """
        signed = self.last_checkpoint()
        if signed is None and self.anchor is not None and self._has_signed():
            raise Corrupt(
                f"the last checkpoint is missing from {self.anchor}, so that an old backup could not be told from the "
                "newest ledger: mount or restore it; if it is lost for good, and you know that this ledger is the "
                "newest, write it anew with: expunge log --replace-checkpoint"
            )
        self._refuse_other_history(signed)

    def _has_signed(self) -> bool:
        with self.database.read() as connection:
            return connection.execute(sa.select(checkpoints.c.size).limit(1)).first() is not None

    def _refuse_other_history(self, signed: check.Checkpoint | None) -> None:
        if signed is None:
            return
        tree = self.tree()
        size = len(tree)
        if signed.origin != self.origin:
            raise Corrupt(f'the checkpoint outside is of log "{signed.origin}", and this is "{self.origin}"')
        if size < signed.size:
            raise Corrupt(
                f"the ledger was rolled back: it has {size} entries and {signed.size} were signed; an old "
                "backup was restored, so put the newest in its place"
            )
        if tree.root(signed.size) != signed.root:
            raise Corrupt(f"history was rewritten: the first {signed.size} entries are not those that were signed")

    @contextmanager
    def _anchored(self) -> Iterator[check.Checkpoint | None]:
        """Within: no other process signs, so that the checkpoint outside never goes back."""
        if self.anchor is None:
            yield None
            return
        try:
            self.anchor.parent.mkdir(parents=True, exist_ok=True)
            with self.anchor.with_name(self.anchor.name + ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self.last_checkpoint()
        except OSError as error:
            raise Unwritable(
                f"the checkpoint at {self.anchor} could not be written ({error}); the last one stands: make room, or "
                "make its folder writable, and run again"
            ) from error

    def consistency(self, old: int, new: int | None = None) -> bytes:
        """A file that proves that the log of a later checkpoint begins with that of an earlier one.

        Args:
            old: size of a checkpoint that was signed.
            new: size of a later one; the last if None.
        """
        with self.database.read() as connection:
            signed = connection.execute(sa.select(checkpoints.c.size, checkpoints.c.note))
            notes: dict[int, str] = {row.size: row.note for row in signed}
        new = max(notes, default=0) if new is None else new
        for size in (old, new):
            if size not in notes:
                raise Misuse(f"no checkpoint of size {size} was signed; there are {', '.join(map(str, sorted(notes)))}")
        proof = [node.hex() for node in self.tree().consistency(old, new)]
        made = {"format": check.CONSISTENCY_FORMAT, "old": notes[old], "new": notes[new], "proof": proof}
        return check.canonical(made)


SIZE = sa.select(sa.func.coalesce(sa.func.max(entries.c.idx), -1) + 1)
_INSERT = inserting(entries)
_ONE = sa.select(entries).where(entries.c.idx == sa.bindparam("index"))
_SINCE = sa.select(entries.c.idx, entries.c.leaf).where(entries.c.idx >= sa.bindparam("start")).order_by(entries.c.idx)


def _entry(row: Any) -> Entry:
    return Entry(
        index=row.idx, kind=row.kind, request=row.request, at=row.at, body=check.parse(row.body.encode("utf-8"))
    )


def fault_of(row: Any) -> str | None:
    """What is wrong with a row of the table, if its columns do not give its leaf hash."""
    try:
        good = _entry(row).leaf() == bytes(row.leaf)
    except (check.Refused, UnicodeEncodeError, AttributeError, TypeError):
        good = False
    return None if good else f"entry {row.idx}: its columns do not give its leaf hash"
