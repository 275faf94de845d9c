"""Commitments to rows as transcripts and public coins know them: one salted hash of each row's owner and content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from expunge.core.digest import sha256_hex
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.ledger.check import commitment
from expunge.ledger.recordset import RecordSet

Names = np.ndarray[Any, np.dtype[np.uint8]]


def row_commitments(records: Records, salt: str) -> list[bytes]:
    """HMAC-SHA256 under the salt of each row's owner and content digest, in the records' order; ids play no part.

    Rows alike in owner and content share their commitment. Whoever knows the salt can test whether a row and an owner
    that it can guess are committed to; without the salt a commitment says nothing.
    Cost: about 10 microseconds a row.

    Raises:
        Misuse: for a salt that is not at least 32 hexadecimal digits.
    """
    key = salt_bytes(salt)
    digests = records.digests()
    return [commitment(key, owner, digests[place].tobytes().hex()) for place, owner in enumerate(records.owners)]


def salt_bytes(salt: str) -> bytes:
    """The salt's bytes; Misuse unless it is at least 16 of them, as lower-case hexadecimal digits."""
    try:
        key = bytes.fromhex(salt)
    except (TypeError, ValueError):
        key = b""
    if len(key) < 16 or key.hex() != salt:
        raise Misuse(f"a salt is at least 32 lower-case hexadecimal digits, got {str(salt)[:20]!r}; leave it out")
    return key


def numbered(names: Iterable[bytes], held: Counter[bytes] | None = None) -> list[bytes]:
    """Distinct members for a multiset of commitments: the k-th copy of one becomes a hash of it and k.

    Args:
        names: the commitments, with repetitions.
        held: the multiset that these are taken out of; the last copies in it are taken. None: they are the first.

    Raises:
        Misuse: if more copies are taken than are held.
    """
    members = []
    for name, count in Counter(names).items():
        first = 0 if held is None else held[name] - count
        if first < 0:
            raise Misuse(f"{count} rows with commitment {name.hex()[:16]}... are taken, but {held and held[name]} held")
        members += [bytes.fromhex(sha256_hex(name + copy.to_bytes(8, "big"))) for copy in range(first, first + count)]
    return members


def root_of(members: Iterable[bytes]) -> str:
    """``count:root`` of the sparse Merkle tree over distinct members, whatever their order."""
    root = RecordSet(members).root()
    return f"{root.count}:{root.root.hex()}"


def data_root(records: Records, salt: str) -> str:
    """``count:root`` that commits to these rows with their owners, as a multiset. Cost: about 15 microseconds a row."""
    return root_of(numbered(row_commitments(records, salt)))
