"""SQLite cuts a long value over pages that lie anywhere; this puts values together again, deleted ones too."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_DATABASE = b"SQLite format 3\0"
_LOGS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
PAGED = (_DATABASE, *_LOGS)

_WITH_CELLS = (0x02, 0x0A, 0x0D)  # index and leaf pages: the kinds whose cells hold values
_TOO_MANY = 64  # places for each page that look like a pointer


class _Pages:
    """All versions of all pages, in the database and in its log."""

    def __init__(self) -> None:
        self.size = 0
        self.places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.cells: list[tuple[int, int]] = []
        self.next: dict[int, set[int]] = defaultdict(set)  # of pages that look like the rest of a value

    def read(self, handle: int, at: int) -> bytes:
        return os.pread(handle, self.size, at)

    def add(self, handle: int, number: int, at: int) -> None:
        self.places[number].append((handle, at))
        page = self.read(handle, at)
        if (page[:1] and page[0] in _WITH_CELLS) or number == 1:
            self.cells.append((handle, at))
        elif page[:1] == b"\0" and page[4:].strip(b"\0"):
            self.next[number].add(int.from_bytes(page[:4], "big"))

    def add_database(self, handle: int) -> None:
        stated = int.from_bytes(os.pread(handle, 2, 16), "big")
        self.size = 65536 if stated == 1 else stated
        if self.size >= 512:
            for at in range(0, os.fstat(handle).st_size, self.size):
                self.add(handle, at // self.size + 1, at)

    def add_log(self, handle: int) -> None:
        self.size = int.from_bytes(os.pread(handle, 4, 8), "big")
        if self.size >= 512:
            for at in range(32, os.fstat(handle).st_size, self.size + 24):
                number = int.from_bytes(os.pread(handle, 4, at), "big")
                self.add(handle, number, at + 24)

    def heads(self) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Pages with which the rest of a value begins: no other such page points to them."""
        known = set(self.places)
        likely = {number for number, after in self.next.items() if any(one == 0 or one in known for one in after)}
        inner = {one for number in likely for one in self.next[number]}
        return np.array(sorted(likely - inner), np.uint32)

    def rest(self, number: int) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of the rest of a value, from this page on; of a page written twice, both versions."""
        seen: set[int] = set()
        while number and number not in seen and number in self.next:
            seen.add(number)
            after = 0
            for handle, at in self.places[number]:
                page = self.read(handle, at)
                if page[:1] == b"\0":
                    after = int.from_bytes(page[:4], "big")
                    yield at, page[4:]
            number = after


def splices(path: str, file: Any, left_out: Callable[[str], None]) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) pieces to be searched one after the other, each value that spans pages in its order.

    A page with cells is joined, at each place that could be a pointer, to the rest that it points to: so a deleted
    value is put together too, as long as its pages are there. Not found: a value whose first page was itself
    overwritten, and one whose pages were written more than once with different bytes.
    """
    pages = _Pages()
    log = os.pread(file.fileno(), 4, 0) in _LOGS
    database = Path(path.removesuffix("-wal"))
    if log:
        pages.add_log(file.fileno())
    if not log or not database.is_file() or database.is_symlink() or str(database) == path:
        if not log:
            pages.add_database(file.fileno())
        yield from _joined(pages, left_out)
        return
    with database.open("rb") as beside:
        size = pages.size
        pages.add_database(beside.fileno())
        if pages.size == size:
            yield from _joined(pages, left_out)
        else:
            left_out("a log whose pages are not those of its database")


def _joined(pages: _Pages, left_out: Callable[[str], None]) -> Iterator[tuple[int, bytes]]:
    heads = pages.heads()
    for head in heads.tolist():
        yield from pages.rest(head)
    budget = _TOO_MANY * (len(pages.cells) + 16)
    for handle, at in pages.cells if len(heads) else ():
        page = pages.read(handle, at)
        bytes_ = np.frombuffer(page, np.uint8).astype(np.uint32)
        words = bytes_[:-3] << 24 | bytes_[1:-2] << 16 | bytes_[2:-1] << 8 | bytes_[3:]
        for place in np.flatnonzero(np.isin(words, heads)).tolist():
            budget -= 1
            if budget < 0:
                left_out("too many places in its pages look like pointers")
                return
            yield at, page[:place]
            yield from pages.rest(int(words[place]))
