"""What somebody asks to have removed or replaced."""

from __future__ import annotations

import base64
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.core.digest import array_of
from expunge.core.errors import EmptyRetain, Misuse, NeverTrained, UnknownRecord
from expunge.core.records import Records


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A request applied to the rows that a model stands on.

    Attributes:
        forget: the rows to remove.
        retain: the rows to stand on afterwards, replacements included.
        already: how many of the requested rows were gone before.
        added: the replacements' ids.
    """

    forget: Records
    retain: Records
    already: int
    added: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A request to remove or replace rows. Make one with the class methods below.

    Attributes:
        kind: ``remove`` (by id, owner or class), ``replace`` (ids by rows), ``remove_rows`` (by content: whether the
            rows were ever used is not known to who asks).
        ids: the records meant; with `owner` or `label` instead, those are looked up when the request is carried out.
        owner: whose records; for ``remove_rows``, only this owner's copies go.
        label: the class meant.
        x: (n, ...) replacements, or the rows to look for.
        y: (n,) their labels.
        asked_by: who asked.
        key: idempotency key.
        received_at: when it came in.
        due_at: when it must be done.
    """

    kind: Literal["remove", "replace", "remove_rows"]
    ids: tuple[str, ...] = ()
    owner: str | None = None
    label: int | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    asked_by: str = ""
    key: str = ""
    received_at: datetime | None = None
    due_at: datetime | None = None

    def __post_init__(self) -> None:
        repeated = [record_id for record_id, count in Counter(self.ids).items() if count > 1]
        if repeated:
            raise Misuse(f'id "{repeated[0]}" stands more than once in the request; name each record once')
        if self.kind not in ("remove", "replace", "remove_rows"):
            raise Misuse(f'a request is remove, replace or remove_rows, got "{self.kind}"')
        ways = [name for name in ("ids", "owner", "label") if getattr(self, name) not in ((), None)]
        if len(ways) > 1:
            raise Misuse(f"a request names its records in one way, got {' and '.join(ways)}; file one request for each")
        if self.kind != "remove" and (self.x is None or self.y is None or len(self.x) != len(self.y)):
            raise Misuse(f"a {self.kind} request needs as many rows x as labels y")
        if self.kind == "replace" and len(self.ids) != len(self.x if self.x is not None else ()):
            raise Misuse(f"a replace request needs one row for each of its {len(self.ids)} ids")

    @classmethod
    def remove(cls, ids: Iterable[str], **about: object) -> Request:
        """Remove these records. `about` takes asked_by, key, received_at, due_at. Misuse for a single string."""
        if isinstance(ids, str):
            raise Misuse(f'ids must be several, got the single text "{ids}"; give a list: ["{ids}"]')
        return replace(cls(kind="remove", ids=tuple(ids)), **about)  # type: ignore[arg-type]

    @classmethod
    def remove_owner(cls, owner: str, **about: object) -> Request:
        """Remove all that this owner holds."""
        return replace(cls(kind="remove", owner=owner), **about)  # type: ignore[arg-type]

    @classmethod
    def remove_class(cls, label: int, **about: object) -> Request:
        """Remove all records of one class."""
        return replace(cls(kind="remove", label=label), **about)  # type: ignore[arg-type]

    @classmethod
    def replace_rows(cls, ids: Iterable[str], x: Tensor, y: Tensor, **about: object) -> Request:
        """Remove these records and train on `x`, `y` in their stead, under the ids ``<id>~2`` (``~3``, ...)."""
        return replace(cls(kind="replace", ids=tuple(ids), x=x, y=y), **about)  # type: ignore[arg-type]

    @classmethod
    def remove_rows(cls, owner: str, x: Tensor, y: Tensor, **about: object) -> Request:
        """Remove this owner's records that equal these rows; a row given twice removes up to two copies."""
        return replace(cls(kind="remove_rows", owner=owner, x=x, y=y), **about)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; rows as base64 of their little-endian bytes."""
        rows = {name: None if t is None else _to_text(t) for name, t in (("x", self.x), ("y", self.y))}
        times = {name: None if t is None else t.isoformat() for name, t in self._times().items()}
        plain = {name: getattr(self, name) for name in ("kind", "owner", "label", "asked_by", "key")}
        return {**plain, "ids": list(self.ids), **rows, **times}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """What `to_json` gave; Misuse for anything else."""
        try:
            rows: dict[str, Any] = {name: None if data[name] is None else _from_text(data[name]) for name in ("x", "y")}
            times: dict[str, Any] = {
                n: None if data[n] is None else datetime.fromisoformat(data[n]) for n in ("received_at", "due_at")
            }
            plain = {name: data[name] for name in ("kind", "owner", "label", "asked_by", "key")}
            return cls(ids=tuple(data["ids"]), **plain, **rows, **times)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Misuse(f"this is no request as to_json writes it ({error!r})") from None

    def _times(self) -> dict[str, datetime | None]:
        return {"received_at": self.received_at, "due_at": self.due_at}

    def named(
        self, records: Records, gone: frozenset[str] = frozenset(), ids: frozenset[str] | None = None
    ) -> tuple[str, ...]:
        """The ids that the request means, in order: those still here and those that are gone already.

        Args:
            records: the data set as registered.
            gone: what was removed before.
            ids: what the model is trained on; None: all records but the gone ones. Of equal rows that a
                ``remove_rows`` request may mean, those that the model is trained on are meant first.

        Raises:
            UnknownRecord: for an id, owner or class that was never there, or rows of which none is.
        """
        if self.kind == "remove_rows":
            return self._matched(records, gone, ids)
        if self.owner is not None:
            return records.of_owner(self.owner).ids
        if self.label is not None:
            return records.of_class(self.label).ids
        for record_id in self.ids:
            if record_id not in records and record_id not in gone:
                records.positions([record_id])
        return self.ids

    def _matched(self, records: Records, gone: frozenset[str], ids: frozenset[str] | None) -> tuple[str, ...]:
        if self.x is None or self.y is None or self.owner is None:
            raise Misuse("a remove_rows request needs an owner, rows and labels")
        wanted = Counter(row.tobytes() for row in Records(self.x, self.y, classes=records.classes).digests())
        mine = records.of_owner(self.owner)
        held = [row.tobytes() for row in mine.digests()]

        def readiness(position: int) -> int:
            record_id = mine.ids[position]
            trained_on = record_id not in gone if ids is None else record_id in ids
            return 0 if trained_on else 1 if record_id in gone else 2

        found = []
        for position in sorted(range(len(mine)), key=readiness):
            if wanted[held[position]] > 0:
                wanted[held[position]] -= 1
                found.append(position)
        if not found and len(self.x):
            raise UnknownRecord(
                f'none of the {len(self.x)} rows is held by owner "{self.owner}"; check dtype and shape'
            )
        return tuple(mine.ids[position] for position in sorted(found))

    @property
    def by_id(self) -> bool:
        """True if the request names its records one by one."""
        return self.kind != "remove_rows" and self.owner is None and self.label is None

    def split(
        self, records: Records, *, ids: frozenset[str] | None = None, gone: frozenset[str] = frozenset()
    ) -> Split:
        """Which rows go and which stay.

        Args:
            records: the data set as registered; rows that are gone may still be in it.
            ids: what the model is trained on; None: all records but the gone ones.
            gone: what was removed before.

        Raises:
            UnknownRecord: for an id, owner or class that the data set never held.
            NeverTrained: for a record named by its id that the model was not trained on; for an owner, a class or rows
                if the model was trained on none of them (what it never saw needs no removal, and is left alone).
            EmptyRetain: if nothing would be left.
        """
        ids = frozenset(records.ids) - gone if ids is None else ids
        named = self.named(records, gone, ids)
        strangers = [i for i in named if i not in ids and i not in gone]
        if strangers and (self.by_id or len(strangers) == len(named)):
            raise NeverTrained(f'the model was never trained on record "{strangers[0]}"; there is nothing to remove')
        leaving = {record_id for record_id in named if record_id in ids}
        lost = ids - frozenset(records.ids)
        if lost:
            raise UnknownRecord(
                f'the model stands on {len(lost):,} records that are not given, first "{min(lost)}"; give the whole set'
            )
        keep = np.fromiter((i in ids and i not in leaving for i in records.ids), bool, len(records))
        forget = records.select([i for i, record_id in enumerate(records.ids) if record_id in leaving])
        retain = records.select(np.flatnonzero(keep))
        already = len(named) - len(leaving) - len(strangers)
        if self.kind == "replace" and leaving:
            new = self._replacements(records, leaving, gone)
            return Split(forget=forget, retain=retain.plus(new), already=already, added=frozenset(new.ids))
        if leaving and not len(retain):
            raise EmptyRetain(
                f"removing {len(forget):,} records would leave none to train on; retire the model instead"
            )
        return Split(forget=forget, retain=retain, already=already)

    def _replacements(self, records: Records, leaving: set[str], gone: frozenset[str]) -> Records:
        rows = [index for index, record_id in enumerate(self.ids) if record_id in leaving]
        if self.x is None or self.y is None:
            raise Misuse("a replace request needs rows and labels")
        index = torch.tensor(rows)
        new_ids: list[str] = []
        for i in rows:
            new_ids.append(_next_name(self.ids[i], lambda name: name in records or name in gone or name in new_ids))
        old = records.take(self.ids[i] for i in rows)
        new = Records(self.x[index], self.y[index], new_ids, old.owners, classes=records.classes)
        same = (new.digests() == old.digests()).all(1)
        if bool(same.any()):
            which = old.ids[int(same.argmax())]
            raise Misuse(f'the replacement of record "{which}" is the record itself; to keep it, leave it out')
        return new


def refuse_contradictions(
    requests: Mapping[str, Request], records: Records, *, ids: frozenset[str] | None = None, gone: frozenset[str]
) -> None:
    """Misuse, before any work, if requests that are to be carried out together contradict each other.

    They do if one removes a row that another replaces, or if two replace it by different rows. To ask twice for the
    same is none: the second finds the row gone; nor is what is asked about rows that are gone already, as it changes
    nothing. What names nothing that is there is left to `Request.split`.

    Args:
        requests: by the names that the message calls them by, in order.
        records: the data set as registered.
        ids: what the model is trained on; None: all records but the gone ones.
        gone: what was removed before.

    Cost: a look-up a named row.
    """
    asked: dict[str, tuple[str, Request, int]] = {}
    found: Counter[tuple[str, str, bool]] = Counter()
    for name, request in requests.items() if len(requests) > 1 else ():
        try:
            named = request.ids if request.by_id else request.named(records, gone, ids)
        except UnknownRecord:
            continue
        for row, record_id in enumerate(named):
            if record_id in gone:
                continue
            first, other, place = asked.setdefault(record_id, (name, request, row))
            if first != name and not _same(other, place, request, row):
                found[first, name, other.kind == request.kind] += 1
    for (first, second, both), rows in found.items():
        how = "both replace them, by different rows" if both else "one removes them and the other replaces them"
        raise Misuse(
            f'"{first}" and "{second}" contradict each other about {rows:,} rows: {how}; file one of them, or the '
            "second once the first is done"
        )


def _same(one: Request, row: int, other: Request, other_row: int) -> bool:
    """Whether both want the same of a record: its removal, or the same row in its stead."""
    if "replace" not in (one.kind, other.kind):
        return True
    if one.kind != other.kind or one.x is None or one.y is None or other.x is None or other.y is None:
        return False
    pairs = ((one.x[row], other.x[other_row]), (one.y[row], other.y[other_row]))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _to_text(tensor: Tensor) -> dict[str, Any]:
    data = base64.b64encode(array_of(tensor).tobytes()).decode("ascii")
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


def _from_text(data: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, data["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {data['dtype']}")
    content = bytearray(base64.b64decode(data["data"], validate=True))
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(data["shape"])


def _next_name(record_id: str, taken: Callable[[str], bool]) -> str:
    stem, mark, digits = record_id.rpartition("~")
    stem, count = (stem, int(digits)) if mark and digits.isdecimal() else (record_id, 1)
    return next(name for name in (f"{stem}~{number}" for number in itertools.count(count + 1)) if not taken(name))
