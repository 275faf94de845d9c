"""What is to be forgotten in a study: drawn once a seed, and the same for every method and sparsity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from expunge.core.coins import seed_of
from expunge.core.errors import BadRecords, EmptyRetain, Misuse
from expunge.core.records import Records
from expunge.core.request import Request

_KINDS = "class:3, random:0.1 or owner:NAME; for ids, Scenario.of_ids, or ids:FILE on the command line"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One way of forgetting. Make one with `parse`, or with `of_ids` for records named one by one.

    Attributes:
        name: what it is called in tables; unique in a study.
        label: the class that goes.
        share: the share of all rows that goes, drawn anew for each seed.
        owner: the owner who goes.
        ids: the records that go.
    """

    name: str
    label: int | None = None
    share: float | None = None
    owner: str | None = None
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ways = [self.label is not None, self.share is not None, self.owner is not None, bool(self.ids)]
        if sum(ways) != 1:
            raise Misuse(f'scenario "{self.name}" must say in one way what goes: label, share, owner or ids')
        if self.share is not None and not 0 < self.share < 1:
            raise Misuse(f'the share of scenario "{self.name}" must be > 0 and < 1, got {self.share}')

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """The scenario of a text: ``class:3``, ``random:0.1`` (a share of the rows) or ``owner:NAME``."""
        kind, _, value = text.partition(":")
        if kind in ("class", "random"):
            try:
                number = int(value) if kind == "class" else float(value)
            except ValueError:
                raise Misuse(f'scenario "{text}" needs a number after the colon; give {_KINDS}') from None
            return cls(name=text, label=int(number)) if kind == "class" else cls(name=text, share=number)
        if kind != "owner" or not value:
            raise Misuse(f'unknown scenario "{text}"; give {_KINDS}')
        return cls(name=text, owner=value)

    @classmethod
    def of_ids(cls, name: str, ids: Iterable[str]) -> Scenario:
        """These records, under a name of your own; Misuse without any."""
        named = tuple(ids)
        if not named:
            raise Misuse(f'scenario "{name}" names no record, got 0 ids; give at least one, in a file one a line')
        return cls(name=name, ids=named)

    def request(self, records: Records, seed: int) -> Request:
        """What is asked for in the replica of this seed: a function of the seed and of the records' ids.

        Raises:
            UnknownRecord: for a class, owner or id that the records do not hold.
            EmptyRetain: if nothing would be left.
            BadRecords: if a share is of less than one row.
        """
        if self.share is not None:
            drawn = sorted(records.ids, key=lambda one: (seed_of("scenario", self.name, seed, one), one))
            ids = tuple(drawn[: round(self.share * len(records))])
            if not ids:
                raise BadRecords(f'scenario "{self.name}" is of no row: there are {len(records)}; give a larger share')
        elif self.label is not None:
            ids = records.of_class(self.label).ids
        elif self.owner is not None:
            ids = records.of_owner(self.owner).ids
        else:
            ids = records.take(self.ids).ids
        if len(ids) >= len(records):
            raise EmptyRetain(f'scenario "{self.name}" leaves no row to retrain on; make it smaller')
        return Request.remove(ids)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {
            "name": self.name,
            "label": self.label,
            "share": self.share,
            "owner": self.owner,
            "ids": list(self.ids),
        }
