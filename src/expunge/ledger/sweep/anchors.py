"""Find any of many thousand byte strings in a stream, at the speed of a few passes by numpy.

Of each string only a short window (its anchor), its length and its hash are kept. Text is read as aligned words; a
string is entered once for every way in which it can lie across the words, so that one pass sees them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

Bytes2 = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

_BLOCK = 1 << 15  # words at a time: what is computed from them stays in the cache
_BATCH = 1 << 22  # bytes of strings entered at a time
_LONG = 256
_FOLD = np.uint64(29)  # without it, the product would drop most of the high bytes
_MIX = tuple(np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93))


class _Tier(NamedTuple):
    """Windows of `width` bytes looked up at every `step`-th byte; worth it if each holds `changes` changes of byte."""

    width: int
    step: int
    changes: int


_TIERS = (
    _Tier(32, 8, 4),
    _Tier(8, 8, 3),
    _Tier(8, 4, 3),
    _Tier(8, 1, 2),
    _Tier(4, 4, 1),
    _Tier(8, 1, 1),
    _Tier(4, 1, 1),
    _Tier(8, 1, 0),
    _Tier(4, 1, 0),
    _Tier(2, 1, 0),
)


class Found(NamedTuple):
    """A string found: its place, its length in bytes, and the marks that were entered with it."""

    start: int
    length: int
    marks: tuple[int, ...]


class Anchors:
    """An index of byte strings of at least 2 bytes; strings are entered, then the index is sealed, then asked."""

    def __init__(self, *, numbers: bool = False) -> None:
        """Empty; `numbers` if the strings are numbers in decimal, of which "0,0," and "0.0," tell nothing."""
        self.longest = 0
        self._backs = (1, 2, 4) if numbers else (1,)
        self._marks: dict[bytes, list[int]] = defaultdict(list)
        self._entries: dict[tuple[int, int], list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._tables: list[tuple[int, int, _Table]] = []

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, rows: Bytes2, marks: Sequence[int]) -> None:
        """Enter the (n, length) strings, each with its mark. Cost: a few passes over them."""
        size = max(1, _BATCH // max(1, rows.shape[1]))
        for start in range(0, len(rows), size):
            some = np.ascontiguousarray(rows[start : start + size])
            lengths = np.full(len(some), rows.shape[1])
            self._add(some, lengths, list(map(_name, some)), marks[start : start + size])

    def add_texts(self, texts: Sequence[bytes], marks: Sequence[int]) -> None:
        """Enter strings of differing lengths, each with its mark."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, text in enumerate(texts):  # long ones by their beginnings, so that many are entered in one go
            by_length[len(text) if len(text) < _LONG else len(text) // _LONG * _LONG].append(place)
        for length, places in by_length.items():
            size = max(1, _BATCH // length)
            for start in range(0, len(places), size):
                some = places[start : start + size]
                rows = np.frombuffer(b"".join(texts[i][:length] for i in some), np.uint8).reshape(-1, length)
                lengths = np.array([len(texts[i]) for i in some])
                self._add(rows, lengths, [_name(texts[i]) for i in some], [marks[i] for i in some])

    def _add(self, rows: Bytes2, lengths: np.ndarray[Any, Any], names: Sequence[bytes], marks: Sequence[int]) -> None:
        """Enter strings of these lengths and names by windows within `rows`, which are, or begin, them."""
        length = rows.shape[1]
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        fresh = []
        for place, (name, mark) in enumerate(zip(names, marks, strict=True)):
            known = self._marks[name]
            if not known:
                fresh.append(place)
            if mark not in known:
                known.append(mark)
        left, lengths = rows[fresh], lengths[fresh]
        changes = np.zeros((len(left), length + 1), np.int32)
        np.cumsum(_new(left, self._backs), axis=1, out=changes[:, 2:])
        for tier in _TIERS:
            if not len(left) or length < tier.width + tier.step - 1:
                continue
            places, fewest = _best_windows(changes, tier)
            good = fewest >= tier.changes
            self._enter(tier, left[good], places[good], lengths[good])
            left, lengths, changes = left[~good], lengths[~good], changes[~good]

    def _enter(self, tier: _Tier, rows: Bytes2, places: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        each = np.arange(len(rows))[:, None]
        for shift in range(tier.step if len(rows) else 0):
            at = places[:, None] + shift + np.arange(tier.width)
            windows = np.ascontiguousarray(rows[each, at])
            words = windows.view(f"<u{min(tier.width, 8)}").astype(np.uint64)
            entry = np.empty((len(rows), 3), np.uint64)
            words ^= words >> _FOLD
            entry[:, 0] = sum(words[:, i] * _MIX[i] for i in range(words.shape[1]))
            entry[:, 1], entry[:, 2] = places + shift, lengths
            self._entries[tier.width, tier.step].append(entry)

    def seal(self) -> Anchors:
        """Make the tables; after this, `find` may be called."""
        self._tables = [
            (width, step, _Table(np.unique(np.concatenate(entries), axis=0)))
            for (width, step), entries in sorted(self._entries.items())
        ]
        self._entries.clear()
        return self

    def find(self, data: bytes) -> Iterator[Found]:
        """All entered strings that stand in the data, at any place."""
        seen: set[tuple[int, int]] = set()
        view = memoryview(data)
        for width, step, table in self._tables:
            for start, length in _candidates(data, width, step, table):
                if (start, length) in seen:
                    continue
                seen.add((start, length))
                marks = self._marks.get(_name(view[start : start + length]))
                if marks:
                    yield Found(start, length, tuple(marks))


class _Table:
    """Hashed windows, sorted, each with the place in its string and the length of that; and a filter before them."""

    def __init__(self, entries: Words) -> None:
        self.keys = np.ascontiguousarray(entries[:, 0])
        self.places = entries[:, 1].astype(np.int64)
        self.lengths = entries[:, 2].astype(np.int64)
        self.bits = np.uint64(64 - min(24, max(14, 6 + len(entries).bit_length())))
        self.filter = np.zeros(1 << (64 - int(self.bits)), np.bool_)
        self.filter[(self.keys >> self.bits).astype(np.intp)] = True

    def look(self, keys: Words, starts: slice, step: int, size: int) -> Iterator[tuple[int, int]]:
        """(start, length) of every string that a window of these keys may belong to."""
        near = np.flatnonzero(self.filter.take((keys >> self.bits).view(np.int64)))
        if not len(near):
            return
        wanted = keys[near]
        low = np.searchsorted(self.keys, wanted, "left")
        many = np.searchsorted(self.keys, wanted, "right") - low
        where = np.repeat(near, many)
        if not len(where):
            return
        first = np.repeat(low - (np.cumsum(many) - many), many) + np.arange(len(where))
        begin = starts.start + where * step - self.places[first]
        length = self.lengths[first]
        whole = (begin >= 0) & (begin + length <= size)
        yield from zip(begin[whole].tolist(), length[whole].tolist(), strict=True)


def _candidates(data: bytes, width: int, step: int, table: _Table) -> Iterator[tuple[int, int]]:
    word = min(width, 8)
    ahead = width // word - 1
    for shift in range(0, word, step):
        count = (len(data) - shift) // word
        if count <= ahead:
            continue
        words = np.frombuffer(data, f"<u{word}", count, shift)
        for at in range(0, count - ahead, _BLOCK):
            size = min(_BLOCK, count - ahead - at)
            some = words[at : at + ahead + size].astype(np.uint64)
            some ^= some >> _FOLD
            keys = some[:size] * _MIX[0]
            for i in range(1, ahead + 1):
                keys += some[i : i + size] * _MIX[i]
            yield from table.look(keys, slice(shift + at * word, None), word, len(data))


def _new(rows: Bytes2, backs: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n, length - 1): whether each byte but the first is another than each of those so far before it."""
    new: np.ndarray[Any, np.dtype[np.bool_]] = rows[:, 1:] != rows[:, :-1]
    for back in backs[1:]:
        new[:, back - 1 :] &= rows[:, back:] != rows[:, :-back]
    return new


def _best_windows(
    changes: np.ndarray[Any, Any], tier: _Tier
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, Any]]:
    """Per string, the place whose windows (one for each shift) all hold many changes, and the fewest of these.

    `changes[:, j]` counts the places before j whose byte differs from the one before it.
    """
    length = changes.shape[1] - 1
    inside = changes[:, tier.width :] - changes[:, 1 : length - tier.width + 2]
    last = inside.shape[1] - tier.step + 1
    fewest = inside[:, :last]
    for shift in range(1, tier.step):
        fewest = np.minimum(fewest, inside[:, shift : shift + last])
    places = fewest.argmax(axis=1)
    return places, fewest[np.arange(len(places)), places]


def _name(data: Any) -> bytes:
    return blake2b(data, digest_size=16).digest()
