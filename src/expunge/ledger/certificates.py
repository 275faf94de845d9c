"""Certificates: what a run did for a request, fixed at its commit, signed after it, bundled with all proofs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from expunge.core.errors import NotNow
from expunge.ledger import check
from expunge.ledger.commitments import Commitments
from expunge.ledger.database import Database
from expunge.ledger.failpoints import failpoint
from expunge.ledger.keys import Keys
from expunge.ledger.log import Log
from expunge.ledger.tables import certificate as certificates
from expunge.ledger.tables import entry as entries
from expunge.ledger.tables import run as runs


@dataclass(frozen=True)
class Certificate:
    """A signed statement of a deletion. `statement` reads it only after its signature is found good."""

    envelope: bytes

    def statement(self, keys: Keys) -> dict[str, Any]:
        """What it says; `check.Refused` if none of these keys signed it."""
        return check.open_envelope(check.parse(self.envelope), keys.trusted)[0]


class Certificates:
    """The certificates of one ledger."""

    def __init__(self, database: Database, log: Log, keys: Keys, commitments: Commitments) -> None:
        """Certificates of what is in the log, signed by the keys."""
        self.database, self.log, self.keys, self.commitments = database, log, keys, commitments

    def sign(self) -> int:
        """Sign every certificate that is committed and not signed yet; returns how many.

        Never within the transaction that fixes them: what is signed must not be undone. Called again after a crash it
        signs the same bytes.
        """
        query = sa.select(certificates.c.request, certificates.c.payload).where(certificates.c.envelope.is_(None))
        with self.database.read() as connection:
            waiting = connection.execute(query).all()
        envelopes = (check.canonical(self.keys.sign_statement(bytes(row.payload))) for row in waiting)
        signed = [{"of": row.request, "signed": envelope} for row, envelope in zip(waiting, envelopes, strict=True)]
        failpoint("after sign")
        if signed:
            mine = certificates.update().where(certificates.c.request == sa.bindparam("of"))
            with self.database.write() as connection:
                connection.execute(mine.values(envelope=sa.bindparam("signed")), signed)
        return len(signed)

    def get(self, request: str) -> Certificate:
        """The certificate of a request; NotNow if it is not completed."""
        envelope = self._row(request).envelope
        if envelope is None:
            self.sign()
            envelope = self._row(request).envelope
        return Certificate(bytes(envelope))

    def bundle(self, request: str) -> bytes:
        """All that is needed to check the certificate of a request offline: the file that `check.py` reads."""
        certificate, row = self.get(request), self._row(request)
        note = self.log.last_note()
        if check.open_note(note, self.keys.trusted).size <= row.idx:
            note = self.log.checkpoint()
        size = check.open_note(note, self.keys.trusted).size
        with self.database.read() as connection:
            query = sa.select(runs.c.difference).where(runs.c.id == row.run)
            difference = bytes(connection.execute(query).scalar_one())
        statement = certificate.statement(self.keys)
        anchor = statement["predicate"]["dataset"]["anchor"]
        release = self._release(statement, anchor, row.idx)
        made = {
            "format": check.BUNDLE_FORMAT,
            "certificate": check.parse(certificate.envelope),
            "entry": self._proved(row.idx, size),
            "anchor": self._proved(anchor, size),
            "release": None if release is None else self._proved(release, size),
            "checkpoint": note,
            "removed": {"commitments": check.parse(bytes(row.removed))},
            "difference": check.parse(difference),
        }
        return check.canonical(made)

    def record_keys(self, request: str) -> bytes:
        """The keys to the commitments of what was removed for a request: for its owner alone.

        NotNow if they were destroyed.
        """
        wanted = [bytes.fromhex(text) for text in check.parse(bytes(self._row(request).removed))]
        with self.database.read() as connection:
            found = self.commitments.keys_of(connection, wanted)
        if len(found) < len(wanted):
            raise NotNow(f"the keys to the records of request {request} were destroyed, and nobody can open them")
        opened = {commitment.hex(): key.hex() for commitment, key in found.items()}
        return check.canonical({"format": check.KEYS_FORMAT, "keys": opened})

    def _release(self, statement: dict[str, Any], after: int, before: int) -> int | None:
        """Where the log says that the certified model was served; None if nothing was changed."""
        subject = statement["subject"][0]
        between = (entries.c.idx > after) & (entries.c.idx < before)
        query = sa.select(entries).where(between, entries.c.kind == "switched").order_by(entries.c.idx.desc())
        with self.database.read() as connection:
            for row in connection.execute(query):
                entry = self.log.read(row)
                if (entry.body["model"], entry.body["digest"]) == (subject["name"], subject["digest"]["sha256"]):
                    return entry.index
        return None

    def _proved(self, index: int, size: int) -> dict[str, Any]:
        inclusion = [node.hex() for node in self.log.tree().inclusion(index, size)]
        return {"entry": self.log.entry(index).to_json(), "inclusion": inclusion}

    def _row(self, request: str) -> Any:
        with self.database.read() as connection:
            row = connection.execute(sa.select(certificates).where(certificates.c.request == request)).first()
        if row is None:
            raise NotNow(f"request {request} has no certificate: it is not completed; see: expunge status {request}")
        return row
