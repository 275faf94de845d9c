"""Who watches training: the set of records is computed from the rows that the loop really reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from expunge.core.digest import array_of, digest_rows
from expunge.core.errors import Corrupt
from expunge.core.records import Records
from expunge.learn.loop import Tally
from expunge.ledger import check
from expunge.ledger.keys import Keys
from expunge.ledger.recordset import RecordSet


@dataclass
class Witness(Tally):
    """Counts work, and notes of every row that a step is made on: its id, its owner, and the digest of its bytes.

    What it sees are the bytes that were read, not what the data set says of itself. A program that goes round the
    training loop is not seen; a certificate says so.

    Cost: one SHA-256 of each row each time that it is read, about 2 microseconds for an image of MNIST.
    """

    seen: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)

    def saw(self, records: Records, positions: Tensor, x: Tensor, y: Tensor) -> None:
        """Note the rows of a step."""
        super().saw(records, positions, x, y)
        content = digest_rows(array_of(x), array_of(y)).tobytes()
        for place, position in enumerate(positions.tolist()):
            row = (records.owners[position], content[32 * place : 32 * place + 32])
            if self.seen.setdefault(records.ids[position], row) != row:
                self.odd.add(records.ids[position])

    def commitments(
        self, keys: Keys, openings: Mapping[str, tuple[bytes, bytes]], carried: Iterable[str] = ()
    ) -> RecordSet:
        """The set of the rows that training read, each committed to under the key of the record that it was read as.

        Args:
            keys: make the records' pseudonyms.
            openings: key and commitment of each record that may be read, by pseudonym.
            carried: pseudonyms of the records of parts that were not trained anew: as their last training had them.

        Raises:
            Corrupt: if a row was read that belongs to no record of the set, or a record was read as two rows.
        """
        if self.odd:
            raise Corrupt(f"training read {len(self.odd):,} records with changing content or owner; look at it")
        read = {}
        for record_id, (owner, content) in self.seen.items():
            name = keys.pseudonym(record_id)
            if name not in openings:
                raise Corrupt(f"training read a row that is not in the set of records (pseudonym {name})")
            read[name] = check.commitment(openings[name][0], owner, content.hex())
        for name in carried:
            read.setdefault(name, openings[name][1])
        return RecordSet(read.values())
