"""Commitments to records: what the ledger knows of a row in the row's stead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.errors import UnknownRecord
from expunge.core.records import Records
from expunge.ledger import check
from expunge.ledger.database import Database, inserting
from expunge.ledger.keys import Keys, record_keys
from expunge.ledger.recordset import RecordSet
from expunge.ledger.tables import record as records_table

_INSERT = inserting(records_table)
_GONE = records_table.c.run.is_not(None)


class Commitments:
    """For every record of every model: its pseudonym, its commitment, and, until it is destroyed, the key to that."""

    def __init__(self, database: Database, keys: Keys, draw: Callable[[], Iterator[bytes]] = record_keys) -> None:
        """`draw` gives the records' keys: fresh random bytes, unless a test wants others."""
        self.database, self.keys, self._draw = database, keys, draw()

    def add(self, connection: Connection, model: str, records: Records) -> RecordSet:
        """Commit to these rows, each under a key of its own. Cost: about 10 microseconds a row."""
        made: list[dict[str, Any]] = []
        digests = records.digests()
        for place, (record_id, owner) in enumerate(zip(records.ids, records.owners, strict=True)):
            key = next(self._draw)
            commitment = check.commitment(key, owner, digests[place].tobytes().hex())
            name = self.keys.pseudonym(record_id)
            made.append({"model": model, "name": name, "commitment": commitment, "key": key, "run": None})
        if made:
            self.database.insert(connection, _INSERT, made)
        return RecordSet(row["commitment"] for row in made)

    def present(self, connection: Connection, model: str) -> RecordSet:
        """The set that the model stands on now."""
        query = sa.select(records_table.c.commitment).where(
            records_table.c.model == model, records_table.c.run.is_(None)
        )
        return RecordSet(bytes(row.commitment) for row in connection.execute(query))

    def of(self, connection: Connection, model: str, names: Iterable[str]) -> dict[str, bytes]:
        """The commitment of each of these records, by its pseudonym; UnknownRecord if one is not committed to."""
        wanted = sorted(set(names))
        found: dict[str, bytes] = {}
        for start in range(0, len(wanted), 500):
            query = sa.select(records_table.c.name, records_table.c.commitment).where(
                records_table.c.model == model, records_table.c.name.in_(wanted[start : start + 500])
            )
            found.update({row.name: bytes(row.commitment) for row in connection.execute(query)})
        for name in wanted:
            if name not in found:
                raise UnknownRecord(
                    f'record {name} was never committed to for model "{model}"; register its data again'
                )
        return found

    def openings(self, connection: Connection, model: str) -> dict[str, tuple[bytes, bytes]]:
        """Key and commitment, by pseudonym, of every record that the model stands on."""
        query = sa.select(records_table.c.name, records_table.c.key, records_table.c.commitment).where(
            records_table.c.model == model, records_table.c.run.is_(None)
        )
        return {row.name: (bytes(row.key), bytes(row.commitment)) for row in connection.execute(query)}

    def removed(self, connection: Connection, model: str, names: Iterable[str], run: str) -> None:
        """Say that these records were removed by this run."""
        wanted = sorted(set(names))
        for start in range(0, len(wanted), 500):
            chosen = records_table.c.name.in_(wanted[start : start + 500])
            connection.execute(records_table.update().where(records_table.c.model == model, chosen).values(run=run))

    def gone(self, connection: Connection, model: str) -> frozenset[str]:
        """Pseudonyms of all records ever removed from the model."""
        query = sa.select(records_table.c.name).where(records_table.c.model == model, _GONE)
        return frozenset(connection.execute(query).scalars())

    def keys_of(self, connection: Connection, commitments: Sequence[bytes]) -> dict[bytes, bytes]:
        """The keys to these commitments, of those that are not destroyed."""
        wanted, found = set(commitments), {}
        query = sa.select(records_table.c.commitment, records_table.c.key).where(
            _GONE, records_table.c.key.is_not(None)
        )
        for row in connection.execute(query):
            if bytes(row.commitment) in wanted:
                found[bytes(row.commitment)] = bytes(row.key)
        return found

    def destroy_keys(self, connection: Connection, run: str | None = None) -> int:
        """Destroy the keys to the records that a run (None: any) removed; returns how many.

        Without its key a commitment says nothing of the record any more.
        """
        query = records_table.update().where(_GONE, records_table.c.key.is_not(None))
        changed = connection.execute(
            (query if run is None else query.where(records_table.c.run == run)).values(key=None)
        )
        return int(changed.rowcount)
