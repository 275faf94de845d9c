"""What happened, as immutable values. An event's meaning never changes; new meanings get new events."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a model. Holds counts and digests, never rows, ids or owners."""

    def to_json(self) -> dict[str, Any]:
        """The event's name and fields as plain JSON values."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Removed(Event):
    """`rows` rows were removed by `method`, which claims `claim`."""

    method: str
    claim: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Replaced(Event):
    """`rows` rows were replaced by as many others."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class Retrained(Event):
    """Part `part` (-1: the whole model) was trained again on `rows` rows, from slice `from_slice` on."""

    part: int
    rows: int
    from_slice: int = 0


@dataclass(frozen=True, kw_only=True)
class AlreadyRemoved(Event):
    """`rows` of the requested rows were gone before; nothing was left to do for them."""

    rows: int
