"""Content-addressed artefacts with lineage: everything that derives from a record can be found, and erased.

Layout below the root: ``objects/ab/<digest>`` holds bytes, ``about/<digest>.json`` what they are and which lineage
they have, ``lineage/<digest>.json`` a set of record ids, shared by all artefacts that derive from the same records.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from expunge.core.digest import canonical_json, sha256_hex
from expunge.core.errors import Corrupt, UnknownRecord

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Artefact:
    """What is known of some stored bytes.

    Attributes:
        digest: SHA-256 of the bytes; their name.
        kind: what they are, e.g. ``checkpoint``.
        size_bytes: how many.
        lineage: name of the set of record ids that they derive from.
        parents: artefacts that they were made from; the lineage holds the parents' too.
    """

    digest: str
    kind: str
    size_bytes: int
    lineage: str
    parents: tuple[str, ...] = ()


class Store:
    """A folder of artefacts. Writes are atomic and durable; digests are checked at every read."""

    def __init__(self, root: str | Path) -> None:
        """Open or create the store below `root`."""
        self.root = Path(root)
        for name in ("objects", "about", "lineage"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, kind: str, *, records: Iterable[str] = (), parents: Iterable[str] = ()) -> Artefact:
        """Store bytes that derive from these records and from these artefacts (whose lineage is inherited).

        Storing the same bytes again joins both lineages, and all that was made from them inherits the joined one.

        Raises:
            UnknownRecord: for a parent that is not here.
        """
        digest, ancestors = sha256_hex(data), set(parents)
        ids = set(records).union(*(self.records_of(parent) for parent in ancestors))
        known = self.about(digest) if (self.root / "about" / f"{digest}.json").exists() else None
        if known is not None:
            ids |= self.records_of(digest)
            ancestors |= set(known.parents)
        artefact = Artefact(digest, kind, len(data), self._put_lineage(ids), tuple(sorted(ancestors)))
        self._put_about(artefact)  # before the bytes: at no time do bytes lie here that no lineage finds
        write_atomically(self._path(digest), data)
        if known is not None and known.lineage != artefact.lineage:
            self._bequeath(digest, ids)
            self._drop_unused_lineages()
        return artefact

    def get(self, digest: str) -> bytes:
        """The bytes of this name.

        Raises:
            UnknownRecord: if there are none.
            Corrupt: if they are not those that were written.
        """
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise UnknownRecord(f"no artefact {digest} in {self.root}; list them with Store.artefacts()") from None
        if sha256_hex(data) != digest:
            raise Corrupt(f"artefact {digest} in {self.root} holds other bytes than were written; restore or delete it")
        return data

    def about(self, digest: str) -> Artefact:
        """What is known of the artefact.

        Raises:
            UnknownRecord: if it is not here.
            Corrupt: if what was written of it cannot be read.
        """
        _refuse_path(digest)
        try:
            data = json.loads((self.root / "about" / f"{digest}.json").read_bytes())
            return Artefact(**{**data, "parents": tuple(data["parents"])})
        except FileNotFoundError:
            raise UnknownRecord(f"no artefact {digest} in {self.root}; list them with Store.artefacts()") from None
        except (ValueError, TypeError, KeyError):
            raise Corrupt(f"what {self.root} knows of artefact {digest} cannot be read; restore the folder") from None

    def artefacts(self) -> Iterator[Artefact]:
        """All artefacts, by digest."""
        for path in sorted((self.root / "about").glob("*.json")):
            yield self.about(path.stem)

    def records_of(self, digest: str) -> frozenset[str]:
        """Ids of all records that the artefact derives from, its ancestors' included.

        Raises:
            UnknownRecord: if it is not here.
            Corrupt: if its lineage is lost or changed, so that nobody can say what must be erased with a record.
        """
        lineage = self.about(digest).lineage
        try:
            data = (self.root / "lineage" / f"{lineage}.json").read_bytes()
        except FileNotFoundError:
            data = b""
        if sha256_hex(data) != lineage:
            raise Corrupt(f"the lineage of artefact {digest} in {self.root} is lost or changed; restore the folder")
        return frozenset(json.loads(data))

    def derived_from(self, ids: Iterable[str]) -> list[Artefact]:
        """All artefacts that derive from any of these records. Cost: one read of each distinct lineage."""
        wanted, answer = frozenset(ids), []
        hit: dict[str, bool] = {}
        for artefact in self.artefacts():
            if artefact.lineage not in hit:
                hit[artefact.lineage] = not wanted.isdisjoint(self.records_of(artefact.digest))
            if hit[artefact.lineage]:
                answer.append(artefact)
        return answer

    def delete(self, *digests: str) -> None:
        """Remove the bytes, what is known of them, and every lineage that nothing else shares.

        Nothing is removed if one of them is not here (UnknownRecord). Cost: one read of all that is known, so give
        all at once.
        """
        for digest in digests:
            self.about(digest)
        for digest in digests:
            self._path(digest).unlink(missing_ok=True)
            (self.root / "about" / f"{digest}.json").unlink(missing_ok=True)
        self._drop_unused_lineages()

    def _put_about(self, artefact: Artefact) -> None:
        write_atomically(self.root / "about" / f"{artefact.digest}.json", canonical_json(asdict(artefact)))

    def _bequeath(self, digest: str, ids: set[str]) -> None:
        """Add these records to the lineage of all that was made from the artefact."""
        for artefact in self.artefacts():
            held = self.records_of(artefact.digest)
            if digest in artefact.parents and not held >= ids:
                self._put_about(replace(artefact, lineage=self._put_lineage(ids | held)))
                self._bequeath(artefact.digest, ids)

    def _put_lineage(self, ids: set[str]) -> str:
        data = canonical_json(sorted(ids))
        name = sha256_hex(data)
        write_atomically(self.root / "lineage" / f"{name}.json", data)
        return name

    def _drop_unused_lineages(self) -> None:
        used = {artefact.lineage for artefact in self.artefacts()}
        for path in (self.root / "lineage").glob("*.json"):
            if path.stem not in used:
                path.unlink()

    def _path(self, digest: str) -> Path:
        _refuse_path(digest)
        return self.root / "objects" / digest[:2] / digest


def write_atomically(path: Path, data: bytes) -> None:
    """Write the file whole or not at all, and durably: temporary file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refuse_path(digest: str) -> None:
    if len(digest) != 64 or not set(digest) <= _HEX:
        raise UnknownRecord(f'an artefact is named by 64 hexadecimal digits, got "{digest[:80]}"')
