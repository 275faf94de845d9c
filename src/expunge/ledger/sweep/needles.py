"""What a sweep looks for: the removed rows in all their forms, their digests, their ids and their owners' names."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from expunge.core.records import Records
from expunge.ledger.sweep.anchors import Anchors, Found
from expunge.ledger.sweep.forms import FEW, byte_forms, pictures, raw, short_texts, texts

Array = np.ndarray[Any, np.dtype[Any]]

_AT_A_TIME = 256
_SHORTEST_CONTENT = 8  # bytes: anything shorter stands everywhere by chance
_SHORTEST_NAME = 4  # characters
_FILE_ENDINGS = frozenset(
    b"bin bmp bz2 csv db gif gz html jpeg jpg json jsonl log md npy npz onnx parquet part pdf png pt pth safetensors "
    b"sqlite tar tif tiff tmp toml tsv txt webp xml xz yaml yml zip".split()
)


class Mark(NamedTuple):
    """What a string is: the form, the pseudonym to show, and whether it is a name (an id or an owner)."""

    form: str
    record: str
    name: bytes = b""


class Picture(NamedTuple):
    """A removed row as a (planes, height, width) picture, and which of its lines is looked for."""

    form: str
    record: str
    pixels: Array
    line: int


class Needles:
    """What to look for, built once and used for many sweeps.

    Holds hashes of the rows, a few bytes of each, and their pictures: keep it as safe as the rows, and drop it after.

    Attributes:
        count: number of removed rows.
        shared: how many of them have values that a row which stays also has: not searched by values.
        not_searched_by_content: how many are too short (under 8 bytes) or one value over and over: such bytes stand
            everywhere, so these rows are searched by digest and name only.
        not_searched_as_text: how many rows hold so few digits that their decimal text stands everywhere by chance.
        not_searched_by_id: how many ids and owners are shorter than 4 characters or plain numbers: these are
            searched as quoted strings only.
        longest: bytes of the longest string that is searched for.
    """

    def __init__(self) -> None:
        self.count = self.shared = self.not_searched_by_content = self.not_searched_by_id = self.longest = 0
        self.not_searched_as_text = 0
        self.marks: list[Mark] = []
        self.pictures: list[Picture] = []
        self.bytes, self.texts, self.lines = Anchors(), Anchors(numbers=True), Anchors()
        self._pseudonyms: dict[str, str] = {}
        self._longer: dict[bytes, set[tuple[bytes, bytes]]] = defaultdict(set)

    @classmethod
    def of(cls, forget: Records, *, beside: Records | None = None, names: Mapping[str, str] | None = None) -> Needles:
        """Needles for these removed rows.

        Args:
            forget: the removed rows.
            beside: the rows that stay. Values, digests and owners that one of these shares are not searched for.
            names: id or owner -> pseudonym shown instead; otherwise they are numbered in the order given.

        Cost: about a millisecond a row of 784 pixels, and one pass over `beside`.
        """
        self = cls()
        self.count = len(forget)
        self._name_all(forget, names or {})
        removed = {bytes(row) for rows in _chunks(forget) for row in raw(rows)}
        kept_values = {data for rows in _chunks(beside) for data in map(bytes, raw(rows)) if data in removed}
        kept_digests = set() if beside is None else set(map(bytes, beside.digests()))
        start = 0
        for rows in _chunks(forget):
            self._add_rows(rows, forget.ids[start : start + len(rows)], kept_values)
            start += len(rows)
        self._add_lines()
        self._add_digests(forget, kept_digests)
        self._add_names(forget, set() if beside is None else {*beside.ids, *beside.owners})
        for anchors in (self.bytes, self.texts, self.lines):
            anchors.seal()
        self.longest = max(self.bytes.longest, self.texts.longest)
        return self

    def _name_all(self, forget: Records, names: Mapping[str, str]) -> None:
        for kind, all_names in (("record", forget.ids), ("owner", forget.owners)):
            for number, name in enumerate(dict.fromkeys(all_names), 1):
                self._pseudonyms.setdefault(name, names.get(name, f"{kind} {number}"))

    def _mark(self, form: str, record: str, name: bytes = b"") -> int:
        self.marks.append(Mark(form, self._pseudonyms[record], name))
        return len(self.marks) - 1

    def _add_rows(self, rows: Tensor, ids: Sequence[str], kept: set[bytes]) -> None:
        stored = raw(rows)
        width = rows.element_size()
        items = stored.reshape(len(rows), -1, width)
        plain = (items == items[:, :1]).all(axis=(1, 2)) | (stored.shape[1] < _SHORTEST_CONTENT)
        shared = np.array([bytes(row) in kept for row in stored])
        self.shared += int(shared.sum())
        self.not_searched_by_content += int((plain & ~shared).sum())
        chosen = np.flatnonzero(~plain & ~shared)
        if len(chosen):
            rows = rows[torch.from_numpy(chosen)].cpu()
            self._add_content(rows, [ids[i] for i in chosen.tolist()])

    def _add_content(self, rows: Tensor, ids: Sequence[str]) -> None:
        for form, data in byte_forms(rows):
            if data.shape[1] >= _SHORTEST_CONTENT:
                varied = np.flatnonzero((data != data[:, :1]).any(axis=1))
                self.bytes.add(data[varied], [self._mark(form, ids[i]) for i in varied.tolist()])
        for form, lines in texts(rows):
            long = [i for i, line in enumerate(lines) if line]
            self.texts.add_texts([lines[i] for i in long], [self._mark(form, ids[i]) for i in long])
        self._add_short(rows, ids)
        shown = pictures(rows)
        for place, pixels in enumerate([] if shown is None else shown):
            for form, values in (("picture", pixels), ("picture inverted", 255 - pixels)):
                self._add_picture(form, ids[place % len(ids)], values)

    def _add_short(self, rows: Tensor, ids: Sequence[str]) -> None:
        """Rows of few numbers, in decimal; counts those that no decimal text is searched for."""
        written: list[tuple[bytes, int]] = []
        if rows[0].numel() > FEW:
            return
        all_texts = [lines for _, lines in texts(rows)]
        for place, forms in enumerate(short_texts(rows)):
            written += [(text, self._mark("decimal text", ids[place])) for text in sorted(forms)]
            if not forms and not any(lines[place] for lines in all_texts):
                self.not_searched_as_text += 1
        self._add_all(written)

    def _add_picture(self, form: str, record: str, pixels: Array) -> None:
        """Note the line with the most changes: it finds the picture, and then all lines are compared."""
        changes = (pixels[0, :, 1:] != pixels[0, :, :-1]).sum(axis=1)
        line = int(changes.argmax())
        if changes[line]:
            self.pictures.append(Picture(form, self._pseudonyms[record], pixels, line))

    def _add_lines(self) -> None:
        lines = [np.ascontiguousarray(one.pixels[0, one.line]).tobytes() for one in self.pictures]
        self.lines.add_texts(lines, range(len(lines)))

    def _add_digests(self, forget: Records, kept: set[bytes]) -> None:
        written: list[tuple[bytes, int]] = []
        for record, row in zip(forget.ids, forget.digests(), strict=True):
            digest = bytes(row)
            if digest not in kept:
                wide = base64.b64encode(digest)
                strings = {digest, digest.hex().encode(), digest.hex().upper().encode(), wide}
                strings |= {base64.urlsafe_b64encode(digest), wide.rstrip(b"=")}
                mark = self._mark("content digest", record)
                written += [(one, mark) for one in sorted(strings)]
        self._add_all(written)

    def _add_names(self, forget: Records, kept: set[str]) -> None:
        owners = set(forget.owners) - set(forget.ids)
        searched = [("id", name) for name in forget.ids] + [("owner", name) for name in sorted(owners)]
        written: list[tuple[bytes, int]] = []
        for form, name in searched:
            if name in kept or not name:
                continue
            if len(name) < _SHORTEST_NAME or name.replace(".", "", 1).isdecimal():
                self.not_searched_by_id += 1
                written += [(text.encode(), self._mark(form, name)) for text in (f'"{name}"', f"'{name}'")]
                continue
            forms = sorted({name.encode(), name.encode("utf-16-le"), _escaped(name)})
            written += [(one, self._mark(form, name, one)) for one in forms]
        self._add_all(written)
        self._know_longer(sorted(kept | set(forget.ids) | set(forget.owners)))

    def _add_all(self, written: Sequence[tuple[bytes, int]]) -> None:
        self.bytes.add_texts([text for text, _ in written], [mark for _, mark in written])

    def _know_longer(self, names: Sequence[str]) -> None:
        """Note which known names hold a searched one, so that those that stay are never taken for it."""
        tokens = Anchors()
        searched = sorted({mark.name for mark in self.marks if mark.name})
        tokens.add_texts(searched, range(len(searched)))
        tokens.seal()
        for encoding in ("utf-8", "utf-16-le"):
            for start in range(0, len(names), 4096):
                some = [name.encode(encoding) for name in names[start : start + 4096]]
                ends = np.cumsum([len(name) + 1 for name in some])
                for found in tokens.find(b"\n".join(some)):
                    at = int(np.searchsorted(ends, found.start, "right"))
                    begin = found.start - int(ends[at] - len(some[at]) - 1)
                    before, after = some[at][:begin], some[at][begin + found.length :]
                    if before or after:
                        self._longer[searched[found.marks[0]]].add((before, after))

    def in_bytes(self, data: bytes, *, joined: bool = False) -> Iterator[tuple[Found, Mark]]:
        """All strings but decimal texts in the data; `joined` says that names may stand next to other letters."""
        for found in self.bytes.find(data):
            for number in found.marks:
                mark = self.marks[number]
                if not mark.name or self._stands_alone(data, found, mark.name, joined):
                    yield found, mark

    def in_numbers(self, data: bytes) -> Iterator[tuple[Found, Mark]]:
        """All decimal texts in numbers that are parted by single commas."""
        for found in self.texts.find(data):
            yield from ((found, self.marks[number]) for number in found.marks)

    def in_lines(self, data: bytes) -> Iterator[tuple[int, Picture]]:
        """(place, picture) for all lines of pixels that are one of a removed picture."""
        for found in self.lines.find(data):
            yield from ((found.start, self.pictures[number]) for number in found.marks)

    def _stands_alone(self, data: bytes, found: Found, name: bytes, joined: bool) -> bool:
        end = found.start + found.length
        for before, after in self._longer.get(name, ()):
            if data.endswith(before, 0, found.start) and data.startswith(after, end):
                return False
        if joined:
            return True
        wide = 2 if name[1:2] == b"\0" else 1
        head = data[max(0, found.start - 2 * wide) : found.start]
        return not (_goes_on(head[::-1][wide - 1 :: wide], False) or _goes_on(data[end : end + 10 * wide : wide], True))

    def hide(self, text: str) -> str:
        """The text with every id and owner's name in it replaced by its pseudonym."""
        for name in sorted(self._pseudonyms, key=len, reverse=True):
            if len(name) >= _SHORTEST_NAME and name in text:
                text = text.replace(name, f"<{self._pseudonyms[name]}>")
        return text


def _goes_on(text: bytes, file_endings: bool) -> bool:
    """Whether a name goes on in this text beside it; a full stop, or the ending of a file, ends it."""
    first, rest = text[:1], text[1:]
    if not first or not (_of_word(first) or first in b"-."):
        return False
    if first == b"." and file_endings and bytes(_leading_word(rest)).lower() in _FILE_ENDINGS:
        return False
    return _of_word(first) or _of_word(rest[:1])


def _leading_word(text: bytes) -> bytes:
    for place in range(len(text)):
        if not _of_word(text[place : place + 1]):
            return text[:place]
    return text


def _of_word(character: bytes) -> bool:
    return character.isalnum() or character == b"_"


def _escaped(name: str) -> bytes:
    """As JSON writes it in ASCII."""
    return name.encode("ascii", "backslashreplace").replace(b"\\x", b"\\u00")


def _chunks(records: Records | None) -> Iterator[Tensor]:
    if records is not None:
        positions = torch.arange(len(records)).split(_AT_A_TIME)
        yield from (x for x, _ in records.batches(positions))
