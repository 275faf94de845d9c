"""Streams packed inside others: fed from their first byte on, they feed what they unpack to a sink."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from expunge.ledger.sweep.stretches import Sink

STEP = 1 << 20  # bytes unpacked at a time
LARGEST_PICTURE = 1 << 26  # bytes of a packed picture
_FALSE_START = 4096  # a stream that breaks before it gave so many bytes was none: its mark stood there by chance

_PNG = b"\x89PNG\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_MARKS = {
    _PNG: "png",
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    _ZIP: "zip",
    b"GIF8": "gif",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"\xff\xd8\xff": "jpeg",
}
PICTURES = frozenset({"png", "gif", "tiff", "jpeg", "bmp", "pnm", "webp", "ico"})
_SECOND_OF_ZLIB = np.isin(np.arange(256), (0x01, 0x5E, 0x9C, 0xDA))
_ZIP_METHODS = {8: "deflate", 12: "bz2"}


def marks_in(data: bytes, fresh: int) -> Iterator[tuple[int, str]]:
    """(place, kind) of all that may begin a packed stream, and does not end before `fresh`."""
    for magic, kind in _MARKS.items():
        at = data.find(magic, max(0, fresh - len(magic) + 1))
        while at >= 0:
            yield at, kind
            at = data.find(magic, at + 1)
    values = np.frombuffer(data, np.uint8, offset=max(0, fresh - 1))
    begins = np.flatnonzero(values[:-1] == 0x78)
    begins = begins[_SECOND_OF_ZLIB[values[begins + 1]]]
    yield from ((int(at) + max(0, fresh - 1), "zlib") for at in begins)


def kind_at_start(data: bytes) -> str | None:
    """The kind of picture that begins here, of those whose mark is so short that it stands everywhere."""
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "bmp"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "pnm"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "ico" if data[:4] == b"\0\0\1\0" and 0 < data[4] < 32 and data[5:6] == b"\0" else None


class Packed(Protocol):
    """A packed stream that is being read."""

    def feed(self, data: bytes) -> bool:
        """The next bytes; False when it has ended and wants no more."""

    def close(self) -> None:
        """The bytes ended before the stream did."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


class Inflated:
    """A compressed stream.

    What came out before it broke is searched; that it broke is told when it certainly was a stream.
    """

    def __init__(
        self, kind: str, certain: bool, sink: Sink, spend: Callable[[int], bool], left_out: Callable[[str], None]
    ) -> None:
        self._kind, self._certain, self._sink = kind, certain, sink
        self._spend, self._left_out = spend, left_out
        self._machine = _machine(kind)
        self._given = 0

    def feed(self, data: bytes) -> bool:
        """The next bytes; False when the stream has ended."""
        try:
            while True:
                out = self._machine.decompress(data, STEP)
                self._given += len(out)
                if not self._spend(len(out)):
                    self._sink.close()
                    return False
                self._sink.feed(out)
                if self._machine.eof:
                    self._sink.close()
                    return False
                data = getattr(self._machine, "unconsumed_tail", b"")
                if not data and (len(out) < STEP or getattr(self._machine, "needs_input", False)):
                    return True
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
            self._break()
            return False

    def _break(self) -> None:
        sure = self._certain or self._given >= _FALSE_START
        self._sink.close(whole=sure)
        if sure:
            self._left_out(f"a broken {self._kind} stream")

    def close(self) -> None:
        """The bytes ended before the stream did."""
        self._break()


def _machine(kind: str) -> _Decompressor:
    if kind == "bz2":
        return bz2.BZ2Decompressor()
    if kind in ("xz", "lzma"):
        return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=1 << 28)
    return zlib.decompressobj({"gzip": 31, "zlib": 15, "deflate": -15}[kind])


class ZipEntry:
    """An entry of a zip archive, read from its own header: archives that are torn or changed can be read too.

    The bytes of a stored entry stand in the archive as they are, and are searched there.
    """

    def __init__(self, inflate: Callable[[str], Packed], left_out: Callable[[str], None]) -> None:
        self._inflate, self._left_out = inflate, left_out
        self._head = b""
        self._packed: Packed | None = None

    def feed(self, data: bytes) -> bool:
        """The next bytes; False when the entry has ended."""
        if self._packed is not None:
            return self._packed.feed(data)
        self._head += data
        if len(self._head) < 30:
            return True
        flags, method, name, extra = (
            *struct.unpack_from("<HH", self._head, 6),
            *struct.unpack_from("<HH", self._head, 26),
        )
        version = self._head[4]
        if version > 63 or len(self._head) > 1 << 17:
            return False
        if len(self._head) < 30 + name + extra:
            return True
        if flags & 1:
            self._left_out("an encrypted entry of a zip archive")
            return False
        if method not in _ZIP_METHODS:
            if method in (6, 9, 14, 93, 95, 96, 97, 98, 99):
                self._left_out(f"an entry of a zip archive packed by method {method}")
            return False
        self._packed = self._inflate(_ZIP_METHODS[method])
        return self._packed.feed(self._head[30 + name + extra :])

    def close(self) -> None:
        """The bytes ended before the entry did."""
        if self._packed is not None:
            self._packed.close()


class PictureFile:
    """A picture: its bytes are collected to the end, then shown."""

    def __init__(self, kind: str, show: Callable[[bytes, str], None], left_out: Callable[[str], None]) -> None:
        self._kind, self._show, self._left_out = kind, show, left_out
        self._parts: list[bytes] = []
        self._size = 0
        self._last = b""

    def feed(self, data: bytes) -> bool:
        """The next bytes; False when the picture has ended."""
        self._parts.append(data)
        self._size += len(data)
        ended = self._kind == "png" and b"IEND" in self._last + data
        self._last = data[-3:]
        if ended:
            self.close()
        elif self._size > LARGEST_PICTURE:
            if self._kind == "png":
                self._left_out(f"a png picture of more than {LARGEST_PICTURE:,} bytes")
            else:
                self.close()  # what follows the picture may be anything
            return False
        return not ended

    def close(self) -> None:
        """Show what there is."""
        self._show(b"".join(self._parts), self._kind)
