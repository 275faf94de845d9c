"""Judges screens, apart from who made them: a screen may be blind, may cry wolf, or may have seen the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Generator

from expunge.core.coins import child, seed_of
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, proportion
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained


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
        asked: requests in all.
    """

    power: Estimate
    false_alarms: Estimate
    rate: float
    changed: int
    renamed: int
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
        return tuple(found)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong that this exam can see."""
        return not self.exposed


def examine(
    decides: Decides, bad: Sequence[Filed], good: Sequence[Filed], *, rate: float = 0.05, rng: Generator
) -> Exam:
    """Try a screen on requests whose faith is known, again with all tags removed and exchanged, and under other ids.

    A screen that reads who asks, or which requests are the test's, is right on the first try and changes its mind on
    the others.

    Args:
        decides: the screen or calibrated screening.
        bad: requests of attacks. None may have served to calibrate the screen.
        good: requests in good faith, of the same sizes.
        rate: false alarms that the screen states.
        rng: names the coins, the same for each try; nothing is drawn from it.

    Raises:
        Misuse: if either side is empty.

    Not guaranteed: that a screen which passes has seen no answer: owners and contents are part of the data, and are not
    exchanged here. Cost: every request is screened four times, on two looks at each model.
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
    first, other = answers[0], _Renaming()
    renamed = [
        alarmed(decides, one, one.request, child(rng, place)) for place, one in enumerate(other(one) for one in every)
    ]
    changed = sum(len({said[place] for said in answers}) > 1 for place in range(len(every)))
    return Exam(
        power=proportion(sum(first[: len(bad)]), len(bad)),
        false_alarms=proportion(sum(first[len(bad) :]), len(good)),
        rate=rate,
        changed=changed,
        renamed=sum(one != two for one, two in zip(first, renamed, strict=True)),
        asked=len(every),
    )


class _Renaming:
    """Files the same request about the same rows under other ids; owners stay, as the coins of reading hang on them."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Filed, Trained, Records]] = {}

    def __call__(self, filed: Filed) -> Filed:
        key = (id(filed.trained), id(filed.records))
        if key not in self._known:  # kept with what it was made of, so that no id is given to something else
            records = filed.records
            alike = Records(
                records.x, records.y, tuple(map(_other_name, records.ids)), records.owners, classes=records.classes
            )
            self._known[key] = (filed, filed.trained.renamed(_other_name), alike)
        _, trained, records = self._known[key]
        ids = tuple(map(_other_name, filed.request.ids))
        return Filed(trained=trained, records=records, request=replace(filed.request, ids=ids))


def _other_name(record_id: str) -> str:
    return f"row-{seed_of('exam', record_id):016x}"


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
