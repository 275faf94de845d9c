"""Stretches of text in a stream that stand for other bytes: base64, hexadecimal digits, decimal numbers."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

_EDGE = 64  # bytes at both ends of a piece that are read even if it looks like no text at all
_SHORTEST = 40  # characters of a run worth decoding
_LONG = 1 << 20  # characters after which a run is decoded while it goes on
_GAP = bytes(8)

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_=\r\n\\"
_HEX = b"0123456789abcdefABCDEF\r\n"
_NUMBER = b"0123456789+-.eE"
_BETWEEN = b" \t\r\n,;:[](){}|\"'"
_CHARACTERS = {"base64": _BASE64, "hex": _HEX}
_PHASES = {"base64": 4, "hex": 2}
_WORD = 0x0101010101010101

_CLASSES = bytes((byte in _NUMBER + _BETWEEN) | (byte in _BASE64) << 1 | (byte in _HEX) << 2 for byte in range(256))
_COMMAS = bytes(byte if byte in _NUMBER else ord(",") for byte in range(256))
_STANDARD = bytes.maketrans(b"-_", b"+/")


class Sink(Protocol):
    """What takes the bytes of an unpacked stream."""

    def feed(self, data: bytes, origin: int | None = None) -> None:
        """The next bytes, and the place in the file that they come from."""

    def close(self, *, whole: bool = True) -> None:
        """There are no more; not `whole` if the packing broke."""


class Classes(NamedTuple):
    """Whether a piece of a stream may hold decimal numbers, base64 or hexadecimal digits in rows."""

    number: bool
    base64: bool
    hex: bool


def classes_of(data: bytes) -> Classes:
    """What the piece may hold: is there a row of 4 aligned words (2 for numbers) of such characters only?"""
    if len(data) <= 2 * _EDGE:
        return Classes(True, True, True)
    words = np.frombuffer(data.translate(_CLASSES), "<u8", len(data) // 8)
    return Classes(_in_a_row(words, 0, 2), _in_a_row(words, 1, 4), _in_a_row(words, 2, 4))


def _in_a_row(words: np.ndarray[tuple[int], np.dtype[np.uint64]], bit: int, many: int) -> bool:
    mask = np.uint64(_WORD << bit)
    there = (words & mask) == mask
    if int(np.count_nonzero(there)) < many:
        return False
    end = len(there) - many + 1
    together = there[:end].copy()
    for shift in range(1, many):
        together &= there[shift : shift + end]
    return bool(together.any())


def _pieces(data: bytes, there: bool) -> list[bytes | None]:
    return [data] if there or len(data) <= 2 * _EDGE else [data[:_EDGE], None, data[-_EDGE:]]


class Runs:
    """Decodes every run of at least 40 characters of one alphabet, wherever in it the packed bytes begin."""

    def __init__(self, kind: str, child: Callable[[str, int], Sink]) -> None:
        self._kind, self._child = kind, child
        self._characters = _CHARACTERS[kind]
        self._run = re.compile(b"[" + re.escape(self._characters) + b"]{%d,}" % _SHORTEST)
        self._sinks: list[Sink] = []
        self._rest: list[bytes] | None = None
        self._held, self._open = b"", False

    def feed(self, data: bytes, there: bool, place: int) -> None:
        """The next bytes of the stream; `there` says whether `classes_of` saw a run."""
        for piece in _pieces(data, there):
            if piece is None:
                self._end_held(place)
            else:
                self._read(self._held + piece, place)

    def _read(self, text: bytes, place: int) -> None:
        self._held = b""
        if self._open:
            rest = text.lstrip(self._characters)
            self._decode(text[: len(text) - len(rest)], place, more=not rest)
            if not rest:
                return
            self._open, text = False, rest
        body = text.rstrip(self._characters)
        for run in self._run.finditer(body):
            self._decode(run.group(), place, more=False)
        tail = text[len(body) :]
        if len(tail) > _LONG:
            self._open = True
            self._decode(tail, place, more=True)
        else:
            self._held = tail

    def _end_held(self, place: int) -> None:
        if self._open or len(self._held) >= _SHORTEST:
            self._decode(self._held, place, more=False)
        self._held, self._open = b"", False

    def close(self) -> None:
        """Decode what is left."""
        self._end_held(0)
        for sink in self._sinks:
            sink.close()

    def _decode(self, text: bytes, place: int, *, more: bool) -> None:
        if more and text.endswith(b"\\"):
            self._held, text = b"\\", text[:-1]
        for gone in (b"\\n", b"\\r", b"\\", b"\r", b"\n"):
            text = text.replace(gone, b"")
        if self._kind == "base64" and not more and self._rest is None and not text.strip(_HEX):
            return  # hexadecimal digits and nothing else: read as such
        parts = re.split(b"=+", text)
        for number, part in enumerate(parts):
            self._feed(part, place, last=not more or number < len(parts) - 1)

    def _feed(self, text: bytes, place: int, *, last: bool) -> None:
        phases = _PHASES[self._kind]
        if not self._sinks:
            self._sinks = [self._child(self._kind, place) for _ in range(phases)]
        fresh = self._rest is None
        if self._rest is None:
            if len(text) < phases:
                return
            self._rest = [b""] * phases
        for phase, sink in enumerate(self._sinks):
            packed = self._rest[phase] + (text[phase:] if fresh else text)
            size = len(packed) if last else len(packed) // phases * phases
            sink.feed(_decoded(self._kind, packed[:size]) + _GAP * last, place if fresh else None)
            self._rest[phase] = packed[size:]
        if last:
            self._rest = None


def _decoded(kind: str, text: bytes) -> bytes:
    if kind == "hex":
        return binascii.unhexlify(text[: len(text) // 2 * 2])
    text = text[: len(text) - (len(text) % 4 == 1)]
    return base64.b64decode(text.translate(_STANDARD) + b"=" * (-len(text) % 4))


class Numbers:
    """Reads the decimal numbers in a stream as one line of numbers parted by single commas."""

    def __init__(self, found: Callable[[bytes, int], None], longest: int) -> None:
        self._found, self._longest = found, longest
        self._kept = b","
        self._waiting: list[bytes] = []
        self._size = 0
        self._place = 0

    def feed(self, data: bytes, there: bool, place: int) -> None:
        """The next bytes of the stream; `there` says whether `classes_of` saw numbers."""
        if not self._size:
            self._place = place
        for piece in _pieces(data, there):
            text = b"," if piece is None else _single_commas(piece)
            self._waiting.append(text)
            self._size += len(text)
        if self._size > max(_LONG, 2 * self._longest):
            self._look()

    def _look(self) -> None:
        text = _single_commas(self._kept + b"".join(self._waiting))
        self._found(text, self._place)
        self._kept, self._waiting, self._size = text[-self._longest :], [], 0

    def close(self) -> None:
        """Look at what is left."""
        self._waiting.append(b",")
        self._look()


def _single_commas(data: bytes) -> bytes:
    text = np.frombuffer(data.translate(_COMMAS), np.uint8)
    comma = text == ord(",")
    keep = np.ones(len(text), np.bool_)
    keep[1:] = ~(comma[1:] & comma[:-1])
    return text[keep].tobytes()
