"""The ledger: requests, runs, log and certificates of one workspace, over one database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa

from expunge.core.errors import Misuse
from expunge.ledger.certificates import Certificates
from expunge.ledger.clock import GDPR, Clock
from expunge.ledger.commitments import Commitments
from expunge.ledger.database import Database, Now
from expunge.ledger.faults import faults
from expunge.ledger.jobs import Runs
from expunge.ledger.keys import Keys, record_keys
from expunge.ledger.log import Log
from expunge.ledger.models import Models
from expunge.ledger.requests import Requests
from expunge.ledger.tables import meta


class Ledger:
    """Everything that must never be lost, and that nobody may change unseen.

    Attributes:
        requests: what was asked, and where it stands.
        runs: what is being done, by whom.
        models: what is served, and what it stands on.
        commitments: salted commitments to records, and their keys.
        certificates: what was done, signed.
        log: every event, in a Merkle tree.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        origin: str = "expunge/ledger",
        anchor: str | Path | None = None,
        clock: Clock | None = None,
        now: Now | None = None,
        new_id: Callable[[], str] | None = None,
        replace_anchor: bool = False,
        draw_keys: Callable[[], Iterator[bytes]] = record_keys,
    ) -> None:
        """Open the ledger, bringing an older one up to this release's form, and refuse one that went back in time.

        Args:
            url: ``sqlite:///path`` or ``postgresql://...``.
            keys: what signs.
            origin: the log's name, on every checkpoint; fixed when the ledger is made.
            anchor: file that holds the last checkpoint, outside the database; None keeps none, and then an old backup
                in the database's place is not noticed.
            replace_anchor: write the checkpoint anew if it is lost: from then on this database counts as the newest.
            clock: when requests are due; GDPR if None.
            now, new_id, draw_keys: time, ids and record keys, for tests that must repeat.

        Raises:
            Corrupt: if the database does not hold what was signed before.
            Unwritable: if it cannot be opened.
            Unsupported: if a newer release wrote it.
        """
        self.database = Database(url, now=now)
        self.database.upgrade()
        self.keys = keys
        self.log = Log(self.database, keys, self._origin(origin), None if anchor is None else Path(anchor))
        self.requests = Requests(self.database, self.log, keys, clock or Clock(regime=GDPR), new_id)
        self.runs = Runs(self.database, self.log, self.requests, new_id)
        self.commitments = Commitments(self.database, keys, draw_keys)
        self.models = Models(self.database, self.log, self.commitments, self.runs)
        self.certificates = Certificates(self.database, self.log, keys, self.commitments)
        if replace_anchor and self.log.last_checkpoint() is None:
            self.log.checkpoint()
        self.log.refuse_rollback()

    def _origin(self, origin: str) -> str:
        with self.database.write() as connection:
            known = connection.execute(sa.select(meta.c.value).where(meta.c.name == "origin")).scalar()
            if known is None:
                connection.execute(meta.insert().values(name="origin", value=origin))
        if known is not None and known != origin:
            raise Misuse(
                f'this database holds the ledger "{known}", and "{origin}" was asked for: two workspaces cannot '
                "share one, so give each a database of its own"
            )
        return origin

    def verify(self) -> list[str]:
        """Check everything against everything; what is wrong, one line each, none if all is well.

        Cost: one pass over the tables, about 1 s for 20,000 entries.
        """
        return list(faults(self.database, self.log, self.keys))

    def destroy_keys(self, run: str) -> int:
        """Destroy the keys to the records that a run removed, and log it; returns how many.

        From then on nobody, this ledger included, can tell what their commitments commit to.
        """
        with self.database.write() as connection:
            count = self.commitments.destroy_keys(connection, run)
            if count:
                said = {"run": run, "keys": count}
                self.log.append(connection, [("keys destroyed", "", said)], self.database.utc(connection))
        if count:
            self.database.forget_pages()
        return count

    def close(self) -> None:
        """Let go of the database."""
        self.database.close()
