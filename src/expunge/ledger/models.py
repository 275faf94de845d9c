"""Which version of each model is served, and which set of records it stands on: anchored in the log."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.errors import Corrupt, Misuse, UnknownRecord
from expunge.core.records import Records
from expunge.ledger.commitments import Commitments
from expunge.ledger.database import Database
from expunge.ledger.jobs import Run, Runs
from expunge.ledger.log import Entry, Log
from expunge.ledger.recordset import RecordSet, SetRoot
from expunge.ledger.tables import entry as entries
from expunge.ledger.tables import model as models


@dataclass(frozen=True, kw_only=True)
class Served:
    """The version of a model that is served: its digest, and the folder below the workspace that holds it."""

    name: str
    version: int
    digest: str
    folder: str


class Models:
    """The models of one ledger."""

    def __init__(self, database: Database, log: Log, commitments: Commitments, runs: Runs) -> None:
        """Models whose records are committed to in `commitments` and whose switches belong to `runs`."""
        self.database, self.log, self.commitments, self.runs = database, log, commitments, runs

    def register(self, name: str, digest: str, folder: str, records: Records) -> SetRoot:
        """Begin to serve a model that stands on these records: commits to each, and anchors the set in the log.

        Raises:
            Misuse: if the name is taken.
        """
        with self.database.write() as connection:
            if _served(connection, name) is not None:
                raise Misuse(f'there is a model "{name}" already; choose another name')
            connection.execute(models.insert().values(name=name, version=1, digest=digest, folder=folder))
            root = self.commitments.add(connection, name, records).root()
            self._anchor(connection, "registered", Served(name=name, version=1, digest=digest, folder=folder), root)
        return root

    def served(self, name: str) -> Served:
        """What is served under this name; UnknownRecord if nothing is."""
        with self.database.read() as connection:
            found = _served(connection, name)
        if found is None:
            known = ", ".join(one.name for one in self.all()) or "none"
            raise UnknownRecord(f'there is no model "{name}"; there are: {known}')
        return found

    def all(self) -> list[Served]:
        """All models, by name."""
        with self.database.read() as connection:
            return [_of(row) for row in connection.execute(sa.select(models).order_by(models.c.name))]

    def anchored(self, connection: Connection, name: str) -> Entry:
        """The log entry that last anchored the model's set of records."""
        query = sa.select(entries).where(entries.c.request == "", entries.c.kind.in_(("registered", "switched")))
        for row in connection.execute(query.order_by(entries.c.idx.desc())):
            found = self.log.read(row)
            if found.body["model"] == name:
                return found
        raise UnknownRecord(f'model "{name}" was never anchored in the log; register it')

    def standing_on(self, connection: Connection, name: str) -> RecordSet:
        """The set of records that the model stands on.

        Raises:
            Corrupt: if it is not the set that was anchored: a record was put in or taken out behind the log's back.
        """
        found = self.commitments.present(connection, name)
        said = self.anchored(connection, name).body["set"]
        if said != found.root().to_json():
            raise Corrupt(
                f'model "{name}" stands on {len(found):,} records with another root than the {said["count"]:,} '
                "that were anchored; a record was put in or taken out since: restore the database"
            )
        return found

    def switch(self, run: Run, served: Served, removed: frozenset[str]) -> Run:
        """In one transaction of a run: serve this version from now on, and anchor the set that it stands on.

        Args:
            run: who does it; Overtaken if it was lost.
            served: the new version.
            removed: pseudonyms of the records that were removed.
        """
        with self.database.write() as connection:
            self.runs.hold(connection, run, step="switched")
            now = _served(connection, served.name)
            if now is None or now.version + 1 != served.version:
                raise Corrupt(f"run {run.id} wanted to serve version {served.version} after {now}; run it again")
            self.commitments.removed(connection, served.name, removed, run.id)
            values = {"version": served.version, "digest": served.digest, "folder": served.folder}
            connection.execute(models.update().where(models.c.name == served.name).values(**values))
            root = self.commitments.present(connection, served.name).root()
            self._anchor(connection, "switched", served, root)
        return replace(run, step="switched")

    def _anchor(self, connection: Connection, kind: str, served: Served, root: SetRoot) -> None:
        said = {
            "model": served.name,
            "version": served.version,
            "digest": served.digest,
            "set": root.to_json(),
        }
        self.log.append(connection, [(kind, "", said)], self.database.utc(connection))


def _served(connection: Connection, name: str) -> Served | None:
    row = connection.execute(sa.select(models).where(models.c.name == name)).first()
    return None if row is None else _of(row)


def _of(row: Any) -> Served:
    return Served(name=row.name, version=row.version, digest=row.digest, folder=row.folder)
