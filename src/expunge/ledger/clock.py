"""The legal clock of a deletion request: when an answer is due, and whether more time may still be taken.

A month is a month of the calendar and not thirty days. Nothing here reads the time of day: every instant is given.
No legal advice: a regime says how its period is counted, not whether the law behind it applies.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import MAXYEAR, UTC, date, datetime, time, timedelta, tzinfo
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from expunge.core.errors import Misuse

# fold=1: where the clocks go back over the end of a day, its last hour is the second one; where they go forward over
# it, the day ends when they do.
_DAY_ENDS = time.max.replace(fold=1)


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How one law counts its period. A period runs from the day of receipt, and is in months or in days.

    Attributes:
        name: what the regime is called.
        months: calendar months of the first period; 0 if it is counted in days.
        days: calendar days of the first period; 0 if it is counted in months.
        more_months: calendar months of the extension; 0 if it is counted in days, or if there is none.
        more_days: calendar days of the extension; 0 if it is counted in months, or if there is none.
        rolls: a last day on a Saturday, a Sunday or a holiday moves to the next working day.
        pauses: the time waited for proof of who is asking does not count.

    Raises:
        Misuse: for a first period that is not in exactly one unit, an extension in two, or a number that is no count.
    """

    name: str
    months: int = 0
    days: int = 0
    more_months: int = 0
    more_days: int = 0
    rolls: bool = False
    pauses: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise Misuse(f'a regime needs a name, got {self.name!r}; give a text such as "gdpr"')
        for unit in ("months", "days", "more_months", "more_days"):
            count = getattr(self, unit)
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise Misuse(f"{unit} must be a whole number >= 0, got {count!r}")
        for unit in ("rolls", "pauses"):
            if not isinstance(getattr(self, unit), bool):
                raise Misuse(f"{unit} must be True or False, got {getattr(self, unit)!r}")
        if bool(self.months) == bool(self.days):
            raise Misuse(f"a period is in months or in days, got {self.months} months and {self.days} days; give one")
        if self.more_months and self.more_days:
            got = f"{self.more_months} months and {self.more_days} days"
            raise Misuse(f"an extension is in months or in days, got {got}; give one")

    @property
    def extends(self) -> bool:
        """Whether the period may be extended at all."""
        return bool(self.more_months or self.more_days)


GDPR = Regime(name="gdpr", months=1, more_months=2, rolls=True, pauses=True)
"""Art. 12(3) GDPR: one month from receipt, and two further months, of which the owner is told within the first.

Counted by Regulation (EEC, Euratom) 1182/71, Art. 3: to the last hour of the day with the same date, or of the month's
last day where that date is missing, and on to the next working day. A pause for doubts about identity is the view of
the European Data Protection Board (Guidelines 01/2022); it wants the question asked without delay.
"""

CCPA = Regime(name="ccpa", days=45, more_days=45)
"""California: 45 calendar days after receipt, and once 45 more (11 CCR 7021(b), Civil Code 1798.130(a)(2)).

The days run on while identity is verified, and weekends and holidays move nothing. The day of receipt is not counted.
"""

REGIMES: Mapping[str, Regime] = MappingProxyType({regime.name: regime for regime in (GDPR, CCPA)})
"""The regimes by name."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A regime, read in one place: its days end in `zone`, and its working days leave out `holidays`.

    Saturdays and Sundays are never working days. A calendar of holidays is as good as the years that it covers: a
    holiday that is not listed is taken for a working day, which gives an earlier date, never a later one. A law that
    changes is a new regime: store a request's due date at receipt rather than working it out again. Where a zone has
    skipped a whole day, a period that ends on that day ends with the day before it.

    Attributes:
        regime: how the period is counted.
        zone: where days begin and end.
        holidays: the days, besides weekends, that are not working days; used only if the regime rolls.

    Raises:
        Misuse: if a field is not of its type, a `datetime` among the holidays included.

    Example:
        >>> berlin = Clock(regime=GDPR, zone=ZoneInfo("Europe/Berlin"), holidays=frozenset({date(2024, 5, 1)}))
        >>> received = datetime(2024, 1, 31, 9, 30, tzinfo=UTC)
        >>> print(berlin.due(received))
        2024-02-29 22:59:59.999999+00:00
        >>> print(berlin.due(received, extended=True))
        2024-04-30 21:59:59.999999+00:00
        >>> berlin.days_left(berlin.due(received), datetime(2024, 2, 26, 12, tzinfo=UTC))
        3
        >>> berlin.may_extend(received, datetime(2024, 3, 1, 12, tzinfo=UTC))
        False
    """

    regime: Regime
    zone: tzinfo = UTC
    holidays: frozenset[date] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.regime, Regime):
            raise Misuse(f'a clock needs a Regime, got {self.regime!r}; take one such as REGIMES["gdpr"]')
        if not isinstance(self.zone, tzinfo):
            raise Misuse(f'a zone must be a tzinfo, got {self.zone!r}; give one such as ZoneInfo("Europe/Berlin")')
        if not isinstance(self.holidays, frozenset):
            raise Misuse(f"holidays must be a frozenset of dates, got {type(self.holidays).__name__}")
        for day in self.holidays:
            if type(day) is not date:
                raise Misuse(f"a holiday must be a date, got {day!r}; give one such as date(2024, 12, 25)")
        if isinstance(self.zone, ZoneInfo) and self.zone.key == "UTC":
            object.__setattr__(self, "zone", UTC)  # two names for one zone would make equal clocks differ

    def due(self, received_at: datetime, *, extended: bool = False, paused: timedelta = timedelta(0)) -> datetime:
        """The last instant at which an answer is in time: the last microsecond of the period's last day.

        A pause moves the start of the period, and the whole period is then counted from there: received on 30 January
        and ten days in doubt, the month runs from 9 February to 9 March. Adding the ten days to the end of February
        would stretch a period that has no fixed length, and could end on a day that was never rolled. With no pause
        but the one at the start, this is also the view that the period begins when identity is proved.

        Args:
            received_at: when the request came in; aware.
            extended: with the extension, counted from receipt too (three months in all, not a month and then two).
            paused: elapsed time spent so far in doubt about who is asking. A regime that does not pause leaves it
                out of account: its period runs on meanwhile.

        Returns:
            An instant in UTC, later than `received_at`. Cost: one look at each day that the last day moves over.

        Raises:
            Misuse: for a naive datetime, a negative pause, an extension that the regime does not have, or a period
                that does not end before 31 December 9999.
        """
        if extended and not self.regime.extends:
            raise Misuse(f"the regime {self.regime.name} has no extension; ask for its due date without one")
        last = self._last_day(self._start(received_at, paused), extended)
        return datetime.combine(last, _DAY_ENDS, tzinfo=self.zone).astimezone(UTC)

    def may_extend(self, received_at: datetime, now: datetime, *, paused: timedelta = timedelta(0)) -> bool:
        """Whether the owner can still be told in time that the period is extended.

        True from receipt to the end of the first period, that instant included; always False if the regime has no
        extension. It does not say that there is a good reason, nor that the period was not extended before.

        Args:
            received_at: when the request came in; aware.
            now: when the owner would be told; aware.
            paused: as for `due`, up to `now`.

        Raises:
            Misuse: as `due`.
        """
        told, end = _utc("now", now), self.due(received_at, paused=paused)
        return self.regime.extends and _utc("received_at", received_at) <= told <= end

    def days_left(self, due_at: datetime, now: datetime) -> int:
        """Whole calendar days, in the clock's zone, from today to the day on which the answer is due.

        0 on the last day, for as long as the answer is in time; -1 or less once it is overdue. These are not
        working days, and not multiples of 24 hours.

        Args:
            due_at: when the answer is due; aware.
            now: the present instant; aware.

        Raises:
            Misuse: for a naive datetime, or one that its zone or the clock's cannot hold.
        """
        due_at, now = _utc("due_at", due_at), _utc("now", now)
        days = (_local(due_at, self.zone) - _local(now, self.zone)).days
        return max(days, 0) if now <= due_at else min(days, -1)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values: the regime in full, the zone by its IANA name, the holidays in order.

        Raises:
            Misuse: for a zone without an IANA name, such as a fixed offset.
        """
        name = "UTC" if self.zone == UTC else getattr(self.zone, "key", None)
        if not isinstance(name, str):
            raise Misuse(f'the zone {self.zone} has no IANA name to store; use one such as ZoneInfo("Europe/Berlin")')
        holidays = [day.isoformat() for day in sorted(self.holidays)]
        return {"regime": asdict(self.regime), "zone": name, "holidays": holidays}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Clock:
        """The clock that `to_json` wrote. Reads the zone from the machine's own time zone data.

        Raises:
            Misuse: for a key that is missing or unknown, a zone that this machine does not know, or a bad date.
        """
        _expect("a clock", data, {field.name for field in fields(cls)})
        _expect("a regime", data["regime"], {field.name for field in fields(Regime)})
        if not isinstance(data["holidays"], list):
            raise Misuse(f"holidays must be a list of ISO dates, got {type(data['holidays']).__name__}")
        holidays = frozenset(_iso_date(text) for text in data["holidays"])
        return cls(regime=Regime(**data["regime"]), zone=_named_zone(data["zone"]), holidays=holidays)

    def _start(self, received_at: datetime, paused: timedelta) -> datetime:
        """Where the period starts, in UTC."""
        received = _utc("received_at", received_at)
        if not isinstance(paused, timedelta) or paused < timedelta(0):
            raise Misuse(f"paused must be a timedelta >= 0, got {paused!r}")
        try:
            return received + paused if self.regime.pauses else received
        except OverflowError:
            raise Misuse(f"the period must end before {date.max}, got a pause of {paused}") from None

    def _last_day(self, start: datetime, extended: bool) -> date:
        """The day with whose end the period ends; it must not be the calendar's last, which has no next instant."""
        regime = self.regime
        months = regime.months + (regime.more_months if extended else 0)
        days = regime.days + (regime.more_days if extended else 0)
        try:
            day = _months_on(_local(start, self.zone), months) + timedelta(days=days)
            while regime.rolls and (day.isoweekday() > 5 or day in self.holidays):
                day += timedelta(days=1)
        except OverflowError:
            day = date.max
        if day == date.max:
            raise Misuse(f"the period must end before {date.max}, got the start {start.isoformat()}; check the receipt")
        return day


def _months_on(day: date, months: int) -> date:
    """The same date `months` later, or that month's last day; OverflowError past the last year."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    if year > MAXYEAR:
        raise OverflowError
    return date(year, month + 1, min(day.day, monthrange(year, month + 1)[1]))


def _utc(name: str, when: datetime) -> datetime:
    """The instant in UTC: datetimes of one zone are compared and added by the wall clock, and that is wrong at DST."""
    if not isinstance(when, datetime):
        raise Misuse(f"{name} must be a datetime, got {when!r}")
    if when.utcoffset() is None:
        raise Misuse(f"{name} must be aware, got the naive {when.isoformat()}; give it a zone, such as tzinfo=UTC")
    try:
        return when.astimezone(UTC)
    except OverflowError:
        raise Misuse(f"{name} must lie within the calendar in UTC, got {when.isoformat()}") from None


def _local(when: datetime, zone: tzinfo) -> date:
    """The date of the instant in the zone."""
    try:
        return when.astimezone(zone).date()
    except OverflowError:
        raise Misuse(f"an instant must lie within the calendar of {zone}, got {when.isoformat()}") from None


def _expect(what: str, data: object, known: set[str]) -> None:
    """Misuse unless `data` is a mapping with just these keys: a key that is left out could change a date unseen."""
    if not isinstance(data, Mapping):
        raise Misuse(f"{what} is read from a JSON object, got {type(data).__name__}")
    wrong = sorted(map(str, known ^ set(data)))
    if wrong:
        raise Misuse(f'{what} has the keys {", ".join(sorted(known))}; "{wrong[0]}" is missing or unknown')


def _iso_date(text: object) -> date:
    try:
        return date.fromisoformat(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise Misuse(f"a holiday must be an ISO date such as 2024-12-25, got {text!r}") from None


def _named_zone(name: object) -> tzinfo:
    if not isinstance(name, str):
        raise Misuse(f"a zone must be an IANA name, got {name!r}")
    try:
        return UTC if name == "UTC" else ZoneInfo(name)  # UTC must need no time zone data
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise Misuse(f'no time zone data for "{name}"; give an IANA name such as Europe/Berlin') from None
