"""The append-only Merkle tree of RFC 6962: grows at one end, and proves what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expunge.core.errors import Misuse
from expunge.ledger.check import leaf_hash, node_hash, tree_root


class Tree:
    """Leaf hashes, and the hashes of all complete subtrees, level by level.

    Cost: 32 bytes and two hashes a leaf; a proof reads about log2(size) hashes.
    """

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        """A tree of these leaf hashes."""
        self._levels: list[list[bytes]] = [[]]
        for leaf in leaves:
            self.append(leaf)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, leaf: bytes) -> None:
        """Put one more leaf hash (see `leaf_hash`) at the end."""
        node, level = leaf, 0
        self._levels[0].append(node)
        while len(self._levels[level]) % 2 == 0:
            node = node_hash(self._levels[level][-2], node)
            level += 1
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(node)

    def leaf(self, index: int) -> bytes:
        """The leaf hash at this place."""
        return self._levels[0][index]

    def root(self, size: int | None = None) -> bytes:
        """Root over the first `size` leaves (all, if None)."""
        size = len(self) if size is None else size
        self._refuse_size(size, least=0)
        return tree_root([]) if size == 0 else self._hash(0, size)

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """Proof that the leaf at `index` is among the first `size` (RFC 9162, 2.1.3.1)."""
        size = len(self) if size is None else size
        self._refuse_size(size, least=1)
        if not 0 <= index < size:
            raise Misuse(f"the log has entries 0 to {size - 1} at that size, got {index}")
        proof: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                proof.append(self._hash(middle, end))
                end = middle
            else:
                proof.append(self._hash(start, middle))
                start = middle
        return proof[::-1]

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """Proof that the first `old` leaves are the beginning of the first `new` (RFC 9162, 2.1.4.1)."""
        new = len(self) if new is None else new
        self._refuse_size(new, least=1)
        if not 0 < old <= new:
            raise Misuse(f"a consistency proof goes from 1 to {new} entries, got {old}")
        proof: list[bytes] = []
        start, end, whole = 0, new, True
        while end != old:
            middle = start + _split(end - start)
            if old <= middle:
                proof.append(self._hash(middle, end))
                end = middle
            else:
                proof.append(self._hash(start, middle))
                start, whole = middle, False
        if not whole:
            proof.append(self._hash(start, end))
        return proof[::-1]

    def _hash(self, start: int, end: int) -> bytes:
        """Root over a range of leaves that begins where a subtree of its size may begin."""
        size = end - start
        if size & (size - 1) == 0:
            level = size.bit_length() - 1
            return self._levels[level][start >> level]
        middle = start + _split(size)
        return node_hash(self._hash(start, middle), self._hash(middle, end))

    def _refuse_size(self, size: int, least: int) -> None:
        if not least <= size <= len(self):
            raise Misuse(f"the log has {len(self)} entries, got a size of {size}")


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)


def set_of_leaves(members: Sequence[bytes]) -> bytes:
    """Root of the Merkle tree over these members in sorted order."""
    return tree_root([leaf_hash(member) for member in sorted(members)])
