"""Who watches training: the set of records is computed from the rows that the loop really reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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

    Attributes:
        seen: for each id that was read, its owner and the digest of its bytes.
        odd: ids that were read as rows that differ.
        due: ids of all records that the result must stand on, and no others; None to leave that unchecked.
    """

    seen: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)
    due: frozenset[str] | None = None

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
            Corrupt: if a row was read that belongs to no record of the set or is not the one that was anchored, if a
                record was read as two rows, or if it was not the records that are due that training stands on.
        """
        if self.odd:
            raise Corrupt(f"training read {len(self.odd):,} records with changing content or owner; look at it")
        read = {}
        for record_id, (owner, content) in self.seen.items():
            name = keys.pseudonym(record_id)
            if name not in openings:
                raise Corrupt(f"training read a row that is not in the set of records (pseudonym {name})")
            key, anchored = openings[name]
            read[name] = check.commitment(key, owner, content.hex())
            if read[name] != anchored:
                raise Corrupt(
                    f"training read another row in the place of a record (pseudonym {name}): content or owner are not "
                    "those that were anchored; give the data that was registered"
                )
        for name in carried:
            if name not in openings:
                raise Corrupt(f"a part that was not trained anew holds a record that is not in the set ({name})")
            read.setdefault(name, openings[name][1])
        if self.due is not None:
            _refuse_others(read, {keys.pseudonym(record_id) for record_id in self.due})
        return RecordSet(read.values())


def _refuse_others(read: Collection[str], due: Collection[str]) -> None:
    extra, missing = set(read) - set(due), set(due) - set(read)
    if extra:
        raise Corrupt(
            f"training stands on {len(extra):,} records that were to be removed, first pseudonym {min(extra)}; "
            "use a method that leaves them out"
        )
    if missing:
        raise Corrupt(
            f"training left out {len(missing):,} records that were to stay, first pseudonym {min(missing)}; "
            "use a method that trains on all of them"
        )
