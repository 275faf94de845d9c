"""Search a stream of bytes and everything packed in it, at any offset and one inside the other."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Protocol

from expunge.ledger.sweep.needles import Mark, Needles
from expunge.ledger.sweep.packed import PICTURES, Inflated, Packed, PictureFile, ZipEntry, kind_at_start, marks_in
from expunge.ledger.sweep.pictures import NotRead, frames_of, shown_in
from expunge.ledger.sweep.stretches import Numbers, Runs, Sink, classes_of

CHUNK = 1 << 20  # bytes searched at once, unless a needle is so long that it takes more
_AROUND = 24  # bytes kept round what was found, to see whether a name goes on

_NOT_OPENED = {
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"PAR1": "a Parquet file, which may be packed",
    b"ARROW1": "an Arrow file, which may be packed",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, which may be packed",
    b"%PDF-": "a PDF, whose pictures are not read",
    b"Salted__": "encrypted",
    b"age-encryption.org/": "encrypted",
    b"-----BEGIN PGP MESSAGE": "encrypted",
    b"-----BEGIN AGE ENCRYPTED": "encrypted",
    b"gAAAAA": "encrypted",
}
_CLOSED = tuple(_NOT_OPENED)
_WITH_JOINED_TEXT = (
    b"SQLite format 3\0",
    b"\x37\x7f\x06\x82",
    b"\x37\x7f\x06\x83",
    b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7",
)


class Report(Protocol):
    """Where a stream says what it found; one for each file."""

    def found(self, mark: Mark, through: tuple[str, ...], offset: int) -> None:
        """A leftover."""

    def left_out(self, why: str) -> None:
        """Something that could not be searched."""

    def spend(self, size_bytes: int) -> bool:
        """Count unpacked bytes; False when the file may unpack to no more."""


@dataclass
class Stream:
    """One stream of bytes, fed piece by piece; `close` it in the end. Memory: some MiB for each packing within.

    Attributes:
        through: the packings that it lies in, outermost first.
        depth: how many packings deeper it may still go.
        start: place in the file of what it was unpacked from; None for the file itself.
        joined: names may stand next to other letters, as in a page of a database or the name of a file.
    """

    needles: Needles
    report: Report
    depth: int
    through: tuple[str, ...] = ()
    start: int | None = None
    joined: bool = False
    _buffer: bytes = b""
    _waiting: list[bytes] = field(default_factory=list)
    _size: int = 0
    _at: int = 0  # place in the stream of the buffer's first byte
    _done: int = 0  # what ended before this place was searched
    _origins: list[tuple[int, int]] = field(default_factory=list)
    _open: list[Packed] = field(default_factory=list)
    _runs: list[Runs] = field(default_factory=list)
    _numbers: Numbers | None = None

    def feed(self, data: bytes, origin: int | None = None) -> None:
        """The next bytes; with `origin`, what was unpacked from that place of the file begins with them."""
        if origin is not None:
            self._origins.append((self._at + len(self._buffer) + self._size, origin))
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= max(CHUNK, 2 * self.needles.longest):
            self._search(last=False)

    def close(self, *, whole: bool = True) -> None:
        """Search what is left, and all that was packed in it."""
        self._search(last=True)
        for packed in self._open:
            packed.close()
        for run in self._runs:
            run.close()
        if self._numbers:
            self._numbers.close()

    def _search(self, *, last: bool) -> None:
        fresh = b"".join(self._waiting)
        data = self._buffer + fresh
        new = len(self._buffer)
        self._begin(data, new)
        for found, mark in self.needles.in_bytes(data, joined=self.joined):
            end = found.start + found.length
            if end > self._done - self._at and (last or end + _AROUND <= len(data)):
                self.report.found(mark, self.through, self._place(found.start))
        self._read_texts(fresh, self._place(new))
        self._open = [packed for packed in self._open if packed.feed(fresh)]
        for at, kind in marks_in(data, new):
            self._unpack(kind, data[at:], at)
        self._done = self._at + len(data) - _AROUND
        keep = min(len(data), self.needles.longest + 2 * _AROUND)
        self._at += len(data) - keep
        self._buffer, self._waiting, self._size = data[len(data) - keep :], [], 0

    def _begin(self, data: bytes, new: int) -> None:
        """Look at the head of all that begins in the new bytes."""
        first = bisect_left(self._origins, (self._at + new, -1))
        begins = [at - self._at for at, _ in self._origins[first:]] if self._origins else [-self._at]
        for at in begins:
            head = data[at : at + 300]
            if at < new or not head:
                continue
            self.joined = self.joined or head.startswith(_WITH_JOINED_TEXT)
            if head.startswith(_CLOSED):
                self.report.left_out(next(why for magic, why in _NOT_OPENED.items() if head.startswith(magic)))
            if head[257:262] == b"ustar":
                self.through = (*self.through, "tar")
            lzma = head[:3] == b"\x5d\0\0" and head[5:13] == b"\xff" * 8
            kind = "lzma" if lzma else kind_at_start(head)
            if kind:
                self._unpack(kind, data[at:], at)

    def _place(self, at: int) -> int:
        """Place in the file of this place of the buffer."""
        if self._origins:
            return self._origins[max(0, bisect_right(self._origins, (self._at + at, 1 << 62)) - 1)][1]
        return self._at + at if self.start is None else self.start

    def _read_texts(self, fresh: bytes, place: int) -> None:
        there = classes_of(fresh)
        if len(self.needles.texts):
            self._numbers = self._numbers or Numbers(self._numbers_found, self.needles.texts.longest)
            self._numbers.feed(fresh, there.number, place)
        if not self._runs:
            self._runs = [Runs("base64", self._child), Runs("hex", self._child)]
        self._runs[0].feed(fresh, there.base64, place)
        self._runs[1].feed(fresh, there.hex, place)

    def _numbers_found(self, data: bytes, place: int) -> None:
        for _, mark in self.needles.in_numbers(data):
            self.report.found(mark, self.through, place)

    def _child(self, kind: str, start: int) -> Sink:
        if self.depth <= 0:
            return _TooDeep(self.report, kind)
        return Stream(self.needles, self.report, self.depth - 1, (*self.through, kind), start)

    def _unpack(self, kind: str, data: bytes, at: int) -> None:
        start = self._place(at)
        certain = self._at + at == 0 or (kind == "png")
        packed: Packed
        if kind in PICTURES:
            packed = PictureFile(
                kind, lambda whole, kind: self._show(whole, kind, start, certain), self.report.left_out
            )
        elif kind == "zip":
            packed = ZipEntry(lambda method: self._inflated(method, start, ("zip",), certain), self.report.left_out)
        else:
            packed = self._inflated(kind, start, (kind,), certain and kind != "zlib")
        if packed.feed(data):
            self._open.append(packed)

    def _inflated(self, kind: str, start: int, through: tuple[str, ...], certain: bool) -> Inflated:
        return Inflated(kind, certain, self._child(through[0], start), self.report.spend, self.report.left_out)

    def _show(self, data: bytes, kind: str, start: int, certain: bool) -> None:
        try:
            lossy, frames = frames_of(data)
        except NotRead as error:
            if certain and kind != "pnm":
                self.report.left_out(str(error))
            return
        if lossy:
            self.report.left_out(f"a {kind} picture, whose format changes pixels")
        for planes in frames:
            for picture in shown_in(planes, self.needles):
                self.report.found(Mark(picture.form, picture.record), (*self.through, kind), start)


class _TooDeep:
    """Stands for a stream packed deeper than is searched, and says so if it was one."""

    def __init__(self, report: Report, kind: str) -> None:
        self._report, self._kind, self._size = report, kind, 0

    def feed(self, data: bytes, origin: int | None = None) -> None:
        self._size += len(data)

    def close(self, *, whole: bool = True) -> None:
        if whole and self._size:
            self._report.left_out(f"{self._kind} packed too deep")
