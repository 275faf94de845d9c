"""What a request asks, as screens see it: the rows that the model was trained on, and those that it never was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained

NEVER = "the model was never trained on it"


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """The rows that a request is about. Records that are gone already are not among them: nothing is left to do.

    Attributes:
        kind: of the request.
        ids: the requested records that the model is trained on, in the order of the records.
        places: (k,) their positions in the records.
        new: what each of them is to be replaced by; None unless the request replaces.
        strangers: requested rows that the model was never trained on, in the order asked; None if there are none.
        why: of each of them, how that is known.
        asked_by: who asked.
    """

    kind: Literal["remove", "replace", "remove_rows"]
    ids: tuple[str, ...]
    places: Tensor
    new: Records | None = None
    strangers: Records | None = None
    why: tuple[str, ...] = ()
    asked_by: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """What each row is called: the trained ones by their ids, then the strangers."""
        return self.ids + (() if self.strangers is None else self.strangers.ids)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def trained(self) -> Asked:
        """The same without the strangers."""
        return replace(self, strangers=None, why=())

    def request(self) -> Request:
        """A request for the trained rows alone, removed or replaced by id."""
        if self.new is None:
            return Request.remove(self.ids, asked_by=self.asked_by)
        return Request.replace_rows(self.ids, self.new.x, self.new.y, asked_by=self.asked_by)

    @classmethod
    def of(cls, records: Records, places: Sequence[int] | Tensor, new: Records | None = None) -> Asked:
        """A request for trained records at these positions, in whatever order; `new` in the order of `places`."""
        index = torch.as_tensor(places, dtype=torch.int64).reshape(-1)
        index, order = index.sort()
        given = None if new is None else new.select(order)
        ids = tuple(records.ids[place] for place in index.tolist())
        return cls(kind="remove" if new is None else "replace", ids=ids, places=index, new=given)


def understand(trained: Trained, records: Records, request: Request) -> Asked:
    """Which of the requested rows the model was trained on. An empty request asks for nothing, and that is no error.

    Cost: one look-up a requested record; for rows given by content, digests of the owner's records.

    Raises:
        UnknownRecord: for an id, owner or class that the records never held.
        Misuse: for rows of another shape or dtype than the records'.
    """
    _refuse_other_rows(records, request)
    if request.kind == "remove_rows":
        return _by_content(trained, records, request)
    if request.by_id:
        unknown = [one for one in request.ids if one not in records and one not in trained.gone]
        records.positions(unknown[:1])
        named = [one for one in request.ids if one in records]
    else:
        named = list(request.named(records, trained.gone, trained.ids))
    held = [one for one in named if one in trained.ids]
    others = [one for one in named if one not in trained.ids and one not in trained.gone]
    if not request.by_id and len(others) < len(named):
        others = []  # somebody who asks for all that is theirs need not know which of it was used
    new = None
    if request.kind == "replace" and held:
        rows = {record: row for row, record in enumerate(request.ids)}
        index = torch.tensor([rows[one] for one in held])
        x, y = _rows(request)
        new = Records(x[index], y[index], held, classes=records.classes)
    asked = replace(Asked.of(records, records.positions(held), new), kind=request.kind, asked_by=request.asked_by)
    if not others:
        return asked
    return replace(asked, strangers=records.take(others), why=(NEVER,) * len(others))


def _by_content(trained: Trained, records: Records, request: Request) -> Asked:
    x, y = _rows(request)
    given = Records(x, y, [f"asked-{row}" for row in range(len(x))], classes=records.classes)
    contents = [row.tobytes() for row in given.digests()]
    mine = records.where(lambda _, owner: owner == request.owner)
    left, found = Counter(contents), Counter[bytes]()
    held: list[str] = []
    for record, content in zip(mine.ids, (row.tobytes() for row in mine.digests()), strict=True):
        if record in trained.ids and left[content]:
            left[content] -= 1
            found[content] += 1
            held.append(record)
    for record, content in zip(mine.ids, (row.tobytes() for row in mine.digests()), strict=True):
        if record in trained.gone and left[content]:
            left[content] -= 1
            found[content] += 1
    others = []
    for row, content in enumerate(contents):
        if found[content]:
            found[content] -= 1
        else:
            others.append(row)
    asked = replace(
        Asked.of(records, records.positions(held)), kind="remove_rows", asked_by=request.asked_by or request.owner or ""
    )
    if not others:
        return asked
    strangers = given.select(others)
    return replace(asked, strangers=strangers, why=_why(trained, records, strangers, request.owner or ""))


def _why(trained: Trained, records: Records, strangers: Records, owner: str) -> tuple[str, ...]:
    theirs = {
        content.tobytes()
        for record, whose, content in zip(records.ids, records.owners, records.digests(), strict=True)
        if record in trained.ids and whose != owner
    }
    said = {True: f'"{owner}" holds no such row that is trained on; another owner does', False: NEVER}
    return tuple(said[row.tobytes() in theirs] for row in strangers.digests())


def _rows(request: Request) -> tuple[Tensor, Tensor]:
    if request.x is None or request.y is None:
        raise Misuse(f"a {request.kind} request needs as many rows x as labels y")
    return request.x, request.y


def _refuse_other_rows(records: Records, request: Request) -> None:
    if request.x is None or not len(request.x):
        return
    example = next(records.batches([torch.tensor([0])]))[0]
    if tuple(request.x.shape[1:]) != records.shape or request.x.dtype != example.dtype:
        wanted, got = (records.shape, example.dtype), (tuple(request.x.shape[1:]), request.x.dtype)
        raise Misuse(f"the request's rows must be of shape and dtype {wanted}, as the records are, got {got}")
