"""Judges screens, apart from who made them: a screen may be blind, may cry wolf, or may have seen the answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Generator

from expunge.core.coins import child, seed_of
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, proportion
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained

Name = Callable[[str], str]


class Decides(Protocol):
    """A screen, or whatever decides on a request: a calibrated screening."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Any:
        """Judgements, one a row; or a decision with `action` and `hold`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Filed:
    """A request as it was filed, and the model that it is about."""

    trained: Trained
    records: Records
    request: Request


@dataclass(frozen=True, kw_only=True)
class Exam:
    """How a screen did.

    Attributes:
        power: share of requests in bad faith that raise an alarm; over requests.
        false_alarms: the same of requests in good faith.
        rate: false alarms that the screen states.
        changed: requests on which the decision changes with who asks, and under which key and date.
        renamed: requests on which it changes when every record is called by another id.
        exchanged: requests on which it changes when owners on the two sides exchange their names.
        asked: requests in all.
    """

    power: Estimate
    false_alarms: Estimate
    rate: float
    changed: int
    renamed: int
    exchanged: int
    asked: int

    @property
    def exposed(self) -> tuple[str, ...]:
        """What is wrong with the screen, one line each; empty for one that stood the exam."""
        found = []
        if self.power.low <= max(self.rate, self.false_alarms.value):
            found.append(
                f"not shown to detect anything: alarms on {self.power:.0%} % of requests in bad faith, which is not "
                f"above {100 * max(self.rate, self.false_alarms.value):.1f} % false alarms"
            )
        if self.false_alarms.low > self.rate:
            found.append(
                f"cries wolf: alarms on {self.false_alarms:.0%} % of requests in good faith, where {100 * self.rate:g} "
                "% were stated"
            )
        if self.changed:
            found.append(
                f"reads who asks: {self.changed} of {self.asked} decisions change with the name, key or dates of the "
                "request, which say nothing of its rows"
            )
        if self.renamed:
            found.append(
                f"reads record ids: {self.renamed} of {self.asked} decisions change when the same rows go by other ids"
            )
        if self.exchanged:
            found.append(
                f"reads owners' names: {self.exchanged} of {self.asked} decisions change when the owners of the rows "
                "on the two sides exchange their names"
            )
        return tuple(found)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong that this exam can see."""
        return not self.exposed


def examine(
    decides: Decides, bad: Sequence[Filed], good: Sequence[Filed], *, rate: float = 0.05, rng: Generator
) -> Exam:
    """Try a screen on requests whose faith is known, with tags removed and exchanged, other ids, owners exchanged.

    A screen that reads who asks, who holds the rows, or which requests are the test's, is right on the first try and
    changes its mind on the others. Which rows are of one owner stays as it is, so that who may ask for what does too.

    Args:
        decides: the screen or calibrated screening.
        bad: requests of attacks. None may have served to calibrate the screen.
        good: requests in good faith, of the same sizes.
        rate: false alarms that the screen states.
        rng: names the coins, the same for each try; nothing is drawn from it.

    Raises:
        Misuse: if either side is empty.

    Not guaranteed: that a screen which passes has seen no answer: contents are part of the data, and are not exchanged
    here. The order in which methods read rows hangs on owners' names: a screen that calls one may change a decision
    near its threshold for that alone. Cost: every request is screened five times, on three looks at each model.
    """
    if not bad or not good:
        raise Misuse(f"an exam needs requests in bad faith and in good, got {len(bad)} and {len(good)}")
    every = [*bad, *good]
    tags = [_tags(one.request) for one in every]
    turned = [*tags[len(bad) :], *tags[: len(bad)]]  # each side speaks under the other's names, as far as they go
    tries = [tags, [_tags(Request(kind="remove"))] * len(every), turned]
    answers = [
        [alarmed(decides, one, _tagged(one.request, tag), child(rng, place)) for place, (one, tag) in enumerate(pairs)]
        for pairs in (list(zip(every, names, strict=True)) for names in tries)
    ]
    first = answers[0]
    renamed, exchanged = (
        sum(
            alarmed(decides, one, one.request, child(rng, place)) != first[place]
            for place, one in enumerate(map(other, every))
        )
        for other in (_Renaming(_other_name), _Renaming(lambda record_id: record_id, _exchanged(bad, good)))
    )
    changed = sum(len({said[place] for said in answers}) > 1 for place in range(len(every)))
    return Exam(
        power=proportion(sum(first[: len(bad)]), len(bad)),
        false_alarms=proportion(sum(first[len(bad) :]), len(good)),
        rate=rate,
        changed=changed,
        renamed=renamed,
        exchanged=exchanged,
        asked=len(every),
    )


class _Renaming:
    """Files the same request about the same rows where records, or owners, go by other names."""

    def __init__(self, record: Name, owner: Name | None = None) -> None:
        self._record, self._owner = record, owner
        self._known: dict[tuple[int, int], tuple[Filed, Trained, Records]] = {}

    def __call__(self, filed: Filed) -> Filed:
        key = (id(filed.trained), id(filed.records))
        if key not in self._known:  # kept with what it was made of, so that no id is given to something else
            records, trained = filed.records, filed.trained.renamed(self._record)
            owners = records.owners if self._owner is None else tuple(map(self._owner, records.owners))
            names = tuple(map(self._record, records.ids))
            alike = Records(records.x, records.y, names, owners, classes=records.classes)
            self._known[key] = (filed, trained if self._owner is None else _unsealed(trained), alike)
        _, trained, records = self._known[key]
        request = replace(filed.request, ids=tuple(map(self._record, filed.request.ids)))
        if self._owner is not None:
            owner = None if request.owner is None else self._owner(request.owner)
            request = replace(request, owner=owner, asked_by=self._owner(request.asked_by))
        return Filed(trained=trained, records=records, request=request)


def _unsealed(trained: Trained) -> Trained:
    """Without the seal, which other owners would break."""
    return replace(trained, seal=None, parts=tuple(map(_unsealed, trained.parts)))


def _other_name(record_id: str) -> str:
    return f"row-{seed_of('exam', record_id):016x}"


def _exchanged(bad: Sequence[Filed], good: Sequence[Filed]) -> Name:
    """Owners of the rows of one side get names of the other's; those of both, or that are left over, get new ones.

    A sharded model's owners keep their shard and slice, which their names decide.
    """
    cuts = list(dict.fromkeys(one.trained.recipe.sharding for one in (*bad, *good)))

    def place(owner: str) -> tuple[tuple[int, int] | None, ...]:
        return tuple(None if cut is None else (cut.shard_of(owner), cut.slice_of(owner)) for cut in cuts)

    def new(owner: str) -> str:
        names = (f"owner-{seed_of('exam', owner, number):016x}" for number in itertools.count())
        return next(name for name in names if place(name) == place(owner))

    theirs, ours = _owners(bad), _owners(good)
    other = {owner: new(owner) for owner in sorted(theirs | ours)}
    free: dict[Any, list[str]] = {}
    for owner in sorted(ours - theirs):
        free.setdefault(place(owner), []).append(owner)
    for owner in sorted(theirs - ours):
        if free.get(place(owner)):
            partner = free[place(owner)].pop()
            other[owner], other[partner] = partner, owner
    return lambda owner: other.get(owner, owner)


def _owners(side: Sequence[Filed]) -> set[str]:
    """Who holds the rows that these requests name, and who they say that they are."""
    found: set[str] = set()
    for one in side:
        request, records = one.request, one.records
        everyone = frozenset(records.owners)
        found |= {name for name in (request.owner, request.asked_by) if name in everyone}
        if request.kind == "remove_rows":
            continue
        known = [name for name in request.named(records, one.trained.gone, one.trained.ids) if name in records]
        found |= set(records.take(known).owners)
    return found


def alarmed(decides: Decides, filed: Filed, request: Request, rng: Generator) -> bool:
    """True if the request would not be carried out at once: any row is flagged, or the decision is another."""
    found = decides(filed.trained, filed.records, request, rng=rng)
    if isinstance(found, tuple):
        return any(one.flagged for one in found)
    return bool(found.hold) or found.action != "carry out"


def _tags(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("asked_by", "key", "received_at", "due_at")}


def _tagged(request: Request, tags: dict[str, Any]) -> Request:
    return replace(request, **tags)
