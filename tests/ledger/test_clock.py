"""The legal clock against numpy's calendar, against dates worked out by hand, and against clocks that count wrongly."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expunge.core.errors import Misuse
from expunge.ledger.clock import CCPA, GDPR, REGIMES, Clock, Regime

BERLIN, NUUK, BEIRUT = ZoneInfo("Europe/Berlin"), ZoneInfo("America/Nuuk"), ZoneInfo("Asia/Beirut")
# Their clocks change at 1:00 and 2:00, at midnight forwards and backwards, and a minute past midnight.
ZONES = [UTC, BERLIN, NUUK, BEIRUT] + [
    ZoneInfo(name)
    for name in ("America/Los_Angeles", "America/St_Johns", "America/Havana", "Asia/Kathmandu", "Australia/Lord_Howe")
]
MICROSECOND = timedelta(microseconds=1)
LAST = time.max  # 23:59:59.999999

# Received, due, due when extended; all without holidays, in UTC.
GDPR_DATES = [
    ("2024-01-31", "2024-02-29", "2024-04-30"),  # no 31 February, in a leap year
    ("2023-01-31", "2023-02-28", "2023-05-01"),  # nor in a common one; 30 April 2023 was a Sunday
    ("1999-01-29", "1999-03-01", "1999-04-29"),  # 28 February 1999 was a Sunday
    ("2000-01-30", "2000-02-29", "2000-05-01"),  # 2000 was a leap year; 30 April was a Sunday
    ("2024-02-29", "2024-03-29", "2024-05-29"),
    ("2024-03-05", "2024-04-05", "2024-06-05"),  # from 5 March until and with 5 April
    ("2022-08-31", "2022-09-30", "2022-11-30"),  # three months on from 31 August: the last day of November
    ("2023-08-31", "2023-10-02", "2023-11-30"),  # 30 September 2023 was a Saturday
    ("2024-10-31", "2024-12-02", "2025-01-31"),  # 30 November 2024 was a Saturday
    ("2024-12-31", "2025-01-31", "2025-03-31"),
    ("2021-12-01", "2022-01-03", "2022-03-01"),  # 1 January 2022 was a Saturday
]
CCPA_DATES = [
    ("2024-01-01", "2024-02-15", "2024-03-31"),  # a Sunday, and it stays one
    ("2023-01-01", "2023-02-15", "2023-04-01"),  # a day later than in a leap year
    ("2023-12-31", "2024-02-14", "2024-03-30"),
    ("2024-02-29", "2024-04-14", "2024-05-29"),
]
DATES = [(GDPR, *row) for row in GDPR_DATES] + [(CCPA, *row) for row in CCPA_DATES]


def noon(day: str, zone: tzinfo = UTC) -> datetime:
    return datetime.combine(date.fromisoformat(day), time(12), tzinfo=zone)


AWARE = noon("2024-01-31")


def end_of(day: str) -> datetime:
    return datetime.combine(date.fromisoformat(day), LAST, tzinfo=UTC)


def thirty_days(received: datetime, extended: bool = False) -> date:
    """What many a tool does."""
    return (received + timedelta(days=90 if extended else 30)).date()


def numpy_date(clock: Clock, received: datetime, extended: bool) -> date:
    """The last day by numpy's months and working days; the time of day and the zone come from elsewhere."""
    instant = received.astimezone(UTC)  # an hour that clocks leave out is another hour, maybe of another day
    start = np.datetime64(instant.astimezone(clock.zone).date())
    regime = clock.regime
    months = regime.months + regime.more_months * extended
    days = regime.days + regime.more_days * extended
    month = start.astype("M8[M]")
    date_in_month = start - month.astype("M8[D]")
    longest = (month + months + 1).astype("M8[D]") - np.timedelta64(1, "D")
    last = min((month + months).astype("M8[D]") + date_in_month, longest) + days
    if regime.rolls:
        last = np.busday_offset(last, 0, roll="forward", holidays=sorted(clock.holidays))
    return last.astype(date)


aware = st.datetimes(
    AWARE.replace(year=1990, tzinfo=None), AWARE.replace(year=2060, tzinfo=None), timezones=st.sampled_from(ZONES)
)
first_week_of_april = [date(2024, 4, day) for day in range(1, 8)]
clocks = st.builds(
    Clock,
    regime=st.sampled_from([GDPR, CCPA, Regime(name="week", days=7, more_days=7, rolls=True, pauses=True)]),
    zone=st.sampled_from(ZONES),
    holidays=st.frozensets(
        st.one_of(
            st.dates(date(1990, 1, 1), date(2060, 1, 1)),
            st.sampled_from(first_week_of_april),
            st.builds(date, st.integers(1990, 2060), st.sampled_from([1, 12]), st.sampled_from([1, 24, 25, 26, 31])),
        ),
        max_size=20,
    ),
)
sampled = settings(max_examples=200, deadline=None, print_blob=True)
pauses = st.timedeltas(timedelta(0), timedelta(days=400))


@pytest.mark.parametrize(("regime", "received", "due", "later"), DATES)
def test_dates_worked_out_by_hand(regime: Regime, received: str, due: str, later: str) -> None:
    clock = Clock(regime=regime)
    assert clock.due(noon(received)) == end_of(due)
    assert clock.due(noon(received), extended=True) == end_of(later)
    assert clock.due(noon(received)).tzinfo is UTC


@pytest.mark.parametrize(("regime", "received", "due", "later"), DATES)
def test_thirty_and_ninety_days_miss_every_row_of_the_table(
    regime: Regime, received: str, due: str, later: str
) -> None:
    naive = [str(thirty_days(noon(received), extended)) for extended in (False, True)]
    assert naive != [due, later]


def test_thirty_days_miss_most_receipts_and_both_ways() -> None:
    received = [noon("2023-01-01") + timedelta(days=day) for day in range(365)]
    gaps = [(Clock(regime=GDPR).due(at).date() - thirty_days(at)).days for at in received]
    assert sum(gap != 0 for gap in gaps) > len(gaps) / 2
    assert min(gaps) < 0 < max(gaps)


@sampled
@given(clocks, aware, st.booleans())
@example(Clock(regime=GDPR), noon("2024-01-31"), False)
@example(Clock(regime=GDPR), noon("2023-08-31"), True)
@example(Clock(regime=GDPR, holidays=frozenset(first_week_of_april)), noon("2024-03-01"), False)
@example(Clock(regime=GDPR, zone=BEIRUT), datetime(2000, 3, 26, fold=1, tzinfo=BEIRUT), False)
def test_the_last_day_is_numpys(clock: Clock, received: datetime, extended: bool) -> None:
    due = clock.due(received, extended=extended)
    assert due.astimezone(clock.zone).date() == numpy_date(clock, received, extended)


@sampled
@given(clocks, aware, pauses, st.booleans())
def test_the_period_ends_with_the_last_instant_of_its_day(
    clock: Clock, received: datetime, paused: timedelta, extended: bool
) -> None:
    due = clock.due(received, paused=paused, extended=extended)
    assert due.astimezone(clock.zone).date() < (due + MICROSECOND).astimezone(clock.zone).date()


@sampled
@given(clocks, aware, aware, pauses)
def test_due_is_later_than_receipt_and_never_falls(
    clock: Clock, one: datetime, other: datetime, paused: timedelta
) -> None:
    one, other = sorted([one, other], key=datetime.timestamp)
    for extended in (False, True):
        due = clock.due(one, extended=extended)
        assert due > one.astimezone(UTC)
        assert due <= clock.due(other, extended=extended)
        assert due <= clock.due(one, extended=extended, paused=paused)
    assert clock.due(one) <= clock.due(one, extended=True)


@sampled
@given(clocks.filter(lambda clock: clock.regime != CCPA), aware, pauses, st.booleans())
def test_the_last_day_is_a_working_day(clock: Clock, received: datetime, paused: timedelta, extended: bool) -> None:
    last = clock.due(received, paused=paused, extended=extended).astimezone(clock.zone).date()
    assert last.isoweekday() <= 5
    assert last not in clock.holidays


@sampled
@given(aware, st.sampled_from(ZONES), st.sampled_from([GDPR, CCPA]))
def test_an_extension_gives_more_time(received: datetime, zone: tzinfo, regime: Regime) -> None:
    clock = Clock(regime=regime, zone=zone)
    assert clock.due(received, extended=True) - clock.due(received) > timedelta(days=40)


def test_an_extension_counts_from_receipt_and_not_from_the_rolled_end() -> None:
    clock = Clock(regime=GDPR)
    received = noon("2023-08-31")
    assert clock.due(received) == end_of("2023-10-02")
    assert clock.due(received, extended=True) == end_of("2023-11-30")  # two months after 2 October: 2 December


# Oracles that never fail prove nothing: each of these counts wrongly in one way, and one check above must notice.


def no_clamp(day: date) -> date:
    """The date in the next month, running over where it is missing."""
    first = date(day.year + day.month // 12, day.month % 12 + 1, 1)
    return first + timedelta(days=day.day - 1)


LIARS: dict[str, Callable[[date], date]] = {
    "thirty days": lambda day: day + timedelta(days=30),
    "four weeks": lambda day: day + timedelta(weeks=4),
    "runs over the month's end": no_clamp,
    "never rolls": lambda day: numpy_date(Clock(regime=replace(GDPR, rolls=False)), noon(str(day)), False),
    "rolls by one day": lambda day: (
        (last := LIARS["never rolls"](day)) + timedelta(days=1 if last.isoweekday() > 5 else 0)
    ),
    "rolls back": lambda day: (last := LIARS["never rolls"](day)) - timedelta(days=max(last.isoweekday() - 5, 0)),
    "runs from the day after receipt": lambda day: Clock(regime=GDPR).due(noon(str(day + timedelta(days=1)))).date(),
}


@pytest.mark.parametrize("liar", LIARS)
def test_the_table_notices_who_counts_wrongly(liar: str) -> None:
    wrong = [
        received
        for received, due, _ in GDPR_DATES
        if LIARS[liar](date.fromisoformat(received)) != date.fromisoformat(due)
    ]
    assert wrong


@pytest.mark.parametrize(
    ("received", "due", "holidays"),
    [
        ("2024-11-25", "2024-12-27", "2024-12-25 2024-12-26"),
        ("2026-03-03", "2026-04-07", "2026-04-03 2026-04-06"),  # Good Friday, a weekend, Easter Monday
        ("2023-11-30", "2024-01-02", "2024-01-01"),  # over a weekend and into the next year
        ("2024-02-05", "2024-03-06", "2024-03-05"),
        ("2024-02-05", "2024-03-05", "2024-03-04 2024-03-06"),  # holidays before and after the last day move nothing
        ("2024-03-01", "2024-04-08", " ".join(map(str, first_week_of_april))),
    ],
)
def test_holidays_move_the_last_day(received: str, due: str, holidays: str) -> None:
    days = frozenset(map(date.fromisoformat, holidays.split()))
    assert Clock(regime=GDPR, holidays=days).due(noon(received)) == end_of(due)
    unmoved = noon(received) + timedelta(days=45)
    assert Clock(regime=CCPA, holidays=days | {unmoved.date()}).due(noon(received)).date() == unmoved.date()


def test_a_run_of_holidays_over_both_ends_moves_both_to_the_same_day() -> None:
    days = frozenset(date(2024, 3, 1) + timedelta(days=n) for n in range(100))
    clock = Clock(regime=GDPR, holidays=days)
    assert clock.due(noon("2024-02-15")) == clock.due(noon("2024-02-15"), extended=True) == end_of("2024-06-10")


@pytest.mark.parametrize(
    ("regime", "zone", "received", "due"),
    [
        (GDPR, BERLIN, "2024-03-15T12:00+00:00", "2024-04-15T21:59:59.999999+00:00"),  # winter to summer
        (GDPR, BERLIN, "2024-10-15T12:00+00:00", "2024-11-15T22:59:59.999999+00:00"),  # and back
        (GDPR, BERLIN, "2024-01-31T22:59+00:00", "2024-02-29T22:59:59.999999+00:00"),
        (GDPR, BERLIN, "2024-01-31T23:00+00:00", "2024-03-01T22:59:59.999999+00:00"),  # 1 February in Berlin
        (GDPR, UTC, "2024-01-31T23:00+00:00", "2024-02-29T23:59:59.999999+00:00"),
        (GDPR, UTC, "2024-02-01T00:30+02:00", "2024-02-29T23:59:59.999999+00:00"),  # 31 January in UTC
        (GDPR, BERLIN, "2024-12-31T23:30+00:00", "2025-02-03T22:59:59.999999+00:00"),  # next year, and a Saturday
        (CCPA, ZoneInfo("America/Los_Angeles"), "2024-03-02T01:00+00:00", "2024-04-16T06:59:59.999999+00:00"),
        (CCPA, NUUK, "2024-02-14T12:00+00:00", "2024-03-31T00:59:59.999999+00:00"),  # a day without its last hour
        (CCPA, NUUK, "2024-09-12T12:00+00:00", "2024-10-28T01:59:59.999999+00:00"),  # the day after a doubled hour
        (CCPA, NUUK, "2024-09-11T12:00+00:00", "2024-10-27T01:59:59.999999+00:00"),  # the second of two last hours
        (CCPA, BEIRUT, "2024-09-11T12:00+00:00", "2024-10-26T21:59:59.999999+00:00"),
    ],
)
def test_days_end_in_the_clocks_zone(regime: Regime, zone: tzinfo, received: str, due: str) -> None:
    assert Clock(regime=regime, zone=zone).due(datetime.fromisoformat(received)).isoformat() == due


@pytest.mark.parametrize(("zone", "received"), [(NUUK, "2024-02-14"), (NUUK, "2024-09-11"), (BEIRUT, "2024-09-11")])
def test_the_first_of_two_last_hours_would_be_wrong(zone: tzinfo, received: str) -> None:
    due = Clock(regime=CCPA, zone=zone).due(noon(received))
    naive = datetime.combine(due.astimezone(zone).date(), LAST, tzinfo=zone).astimezone(UTC)
    assert abs(due - naive) == timedelta(hours=1)


def test_a_day_that_a_zone_skipped_ends_with_the_day_before() -> None:
    clock = Clock(regime=CCPA, zone=ZoneInfo("Pacific/Apia"))  # went from 29 to 31 December 2011
    due = clock.due(noon("2011-11-15", clock.zone))
    assert due.astimezone(clock.zone).date() == date(2011, 12, 29)
    assert (due + MICROSECOND).astimezone(clock.zone).date() == date(2011, 12, 31)


@pytest.mark.parametrize(
    ("received", "paused", "due"),
    [
        ("2023-01-30", timedelta(days=10), "2023-03-09"),  # a month from 9 February, not 28 February and ten days
        ("2023-01-31", timedelta(days=1), "2023-03-01"),
        ("2024-03-04", timedelta(hours=11, minutes=59), "2024-04-04"),
        ("2024-03-04", timedelta(hours=12), "2024-04-05"),  # the next day has begun
        ("2024-03-05", timedelta(days=3), "2024-04-08"),
    ],
)
def test_a_pause_moves_the_start(received: str, paused: timedelta, due: str) -> None:
    assert Clock(regime=GDPR).due(noon(received), paused=paused) == end_of(due)


def test_a_pause_added_to_the_end_would_give_another_date() -> None:
    clock, paused = Clock(regime=GDPR), timedelta(days=10)
    assert clock.due(noon("2023-01-30"), paused=paused) != clock.due(noon("2023-01-30")) + paused


def test_a_pause_is_elapsed_time_and_not_wall_clock_time() -> None:
    clock = Clock(regime=GDPR, zone=BERLIN)
    received = datetime(2024, 3, 30, 23, 30, tzinfo=BERLIN)  # the night that lost an hour
    by_the_wall = received + timedelta(hours=24)
    assert by_the_wall.date() == date(2024, 3, 31)  # so the liar's month would run to 30 April
    assert clock.due(received, paused=timedelta(hours=24)) == clock.due(datetime(2024, 4, 1, tzinfo=BERLIN))
    assert clock.due(received, paused=timedelta(hours=24)) != clock.due(by_the_wall)


@sampled
@given(aware, pauses, st.booleans())
def test_days_run_on_during_a_pause_in_california(received: datetime, paused: timedelta, extended: bool) -> None:
    clock = Clock(regime=CCPA)
    assert clock.due(received, paused=paused, extended=extended) == clock.due(received, extended=extended)


@pytest.mark.parametrize("clock", [Clock(regime=GDPR, zone=BERLIN), Clock(regime=CCPA, zone=BERLIN)])
def test_an_extension_is_open_until_the_end_of_the_first_period(clock: Clock) -> None:
    received = noon("2024-01-31")
    end = clock.due(received)
    assert clock.may_extend(received, received)
    assert clock.may_extend(received, end)
    assert clock.may_extend(received, end.astimezone(BERLIN))
    assert not clock.may_extend(received, end + MICROSECOND)
    assert not clock.may_extend(received, received - MICROSECOND)
    assert not clock.may_extend(received, clock.due(received, extended=True))


def test_a_pause_keeps_the_extension_open_longer_where_it_counts() -> None:
    received, now = noon("2024-02-05"), noon("2024-03-06")
    assert not Clock(regime=GDPR).may_extend(received, now)
    assert Clock(regime=GDPR).may_extend(received, now, paused=timedelta(days=1))
    assert not Clock(regime=CCPA).may_extend(received, noon("2024-03-22"), paused=timedelta(days=1))


def test_a_regime_without_extension_never_extends() -> None:
    clock = Clock(regime=Regime(name="once", days=30))
    assert clock.due(noon("2024-03-04")) == end_of("2024-04-03")
    assert not clock.may_extend(noon("2024-03-04"), noon("2024-03-04"))
    with pytest.raises(Misuse, match="once has no extension"):
        clock.due(noon("2024-03-04"), extended=True)


@pytest.mark.parametrize(
    ("now", "left"),
    [
        ("2024-02-26T12:00+01:00", 3),
        ("2024-02-28T23:59+01:00", 1),
        ("2024-02-29T00:00+01:00", 0),
        ("2024-02-29T23:59:59.999999+01:00", 0),
        ("2024-03-01T00:00+01:00", -1),
        ("2024-02-29T23:00+00:00", -1),  # already March in Berlin
        ("2024-03-31T12:00+02:00", -31),
        ("2023-12-31T12:00+01:00", 60),
    ],
)
def test_days_left_are_days_of_the_calendar(now: str, left: int) -> None:
    clock = Clock(regime=GDPR, zone=BERLIN)
    assert clock.days_left(clock.due(noon("2024-01-31")), datetime.fromisoformat(now)) == left


def test_days_left_are_not_multiples_of_24_hours() -> None:
    clock = Clock(regime=GDPR, zone=BERLIN)
    due, now = clock.due(noon("2024-03-02")), datetime(2024, 3, 30, 23, 30, tzinfo=BERLIN)
    assert due == datetime(2024, 4, 2, 21, 59, 59, 999999, tzinfo=UTC)
    assert clock.days_left(due, now) == 3
    late = datetime(2024, 4, 2, 23, 30, tzinfo=BERLIN)
    assert clock.days_left(due, late) == 0
    assert (due - late.astimezone(UTC)).days == 0
    assert (due - now.astimezone(UTC)) < timedelta(days=3)  # so the liar who divides by 24 hours says 2


@sampled
@given(clocks, aware, aware)
@example(Clock(regime=GDPR), datetime(2024, 3, 1, 9, tzinfo=UTC), datetime(2024, 3, 1, 17, tzinfo=UTC))
@example(
    Clock(regime=GDPR, zone=ZoneInfo("America/St_Johns")),
    datetime(2005, 10, 30, 3, 29, 59, 999999, tzinfo=UTC),
    datetime(2005, 10, 30, 2, 30, 30, tzinfo=UTC),  # Sunday for a minute, then Saturday's last hour again
)
def test_days_left_are_negative_just_when_overdue(clock: Clock, due: datetime, now: datetime) -> None:
    assert (clock.days_left(due, now) < 0) == (now.timestamp() > due.timestamp())


@sampled
@given(clocks)
@example(Clock(regime=GDPR, zone=ZoneInfo("UTC")))
@example(Clock(regime=GDPR, zone=ZoneInfo.no_cache("UTC")))
@example(Clock(regime=GDPR, zone=BERLIN, holidays=frozenset({date(2024, 12, 25), date(2024, 5, 1)})))
def test_json_gives_the_same_clock_back(clock: Clock) -> None:
    text = json.dumps(clock.to_json())
    again = Clock.from_json(json.loads(text))
    assert again == clock
    assert hash(again) == hash(clock)
    assert json.dumps(again.to_json()) == text


def test_json_says_what_it_means() -> None:
    clock = Clock(regime=GDPR, zone=BERLIN, holidays=frozenset({date(2024, 12, 25), date(2024, 5, 1)}))
    assert clock.to_json() == {
        "regime": {
            "name": "gdpr",
            "months": 1,
            "days": 0,
            "more_months": 2,
            "more_days": 0,
            "rolls": True,
            "pauses": True,
        },
        "zone": "Europe/Berlin",
        "holidays": ["2024-05-01", "2024-12-25"],
    }
    with pytest.raises(Misuse, match="no IANA name"):
        Clock(regime=GDPR, zone=timezone(timedelta(hours=2))).to_json()


GOOD = Clock(regime=GDPR, zone=BERLIN, holidays=frozenset({date(2024, 5, 1)})).to_json()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zone": "Europe/Atlantis"}, "no time zone data"),
        ({"zone": "Europe"}, "no time zone data"),
        ({"zone": "../etc/passwd"}, "no time zone data"),
        ({"zone": 3}, "IANA name"),
        ({"holidays": ["2024-02-30"]}, "ISO date"),
        ({"holidays": [20240501]}, "ISO date"),
        ({"holidays": "2024-05-01"}, "a list of ISO dates"),
        ({"colour": "red"}, '"colour" is missing or unknown'),
        ({"regime": "gdpr"}, "JSON object, got str"),
        ({"regime": {"name": "gdpr", "months": 1}}, '"days" is missing or unknown'),
        ({"regime": {**GOOD["regime"], "weeks": 1}}, '"weeks" is missing or unknown'),
        ({"regime": {**GOOD["regime"], "months": "1"}}, "months must be a whole number"),
    ],
)
def test_json_that_is_no_clock_is_refused(change: dict, said: str) -> None:
    assert Clock.from_json(GOOD).to_json() == GOOD
    with pytest.raises(Misuse, match=said):
        Clock.from_json({**GOOD, **change})


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_json_with_a_part_missing_is_refused(missing: str) -> None:
    with pytest.raises(Misuse, match=f'"{missing}" is missing'):
        Clock.from_json({key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize("when", [AWARE.replace(tzinfo=None), date(2024, 1, 31), "2024-01-31"])
def test_what_is_no_aware_datetime_is_refused(when: object) -> None:
    clock = Clock(regime=GDPR)
    calls: list[Callable[[object], object]] = [
        clock.due,
        lambda when: clock.may_extend(when, AWARE),
        lambda when: clock.may_extend(AWARE, when),
        lambda when: clock.days_left(when, AWARE),
        lambda when: clock.days_left(AWARE, when),
    ]
    for call in calls:
        call(AWARE)
        with pytest.raises(Misuse, match=r"must be (aware|a datetime)"):
            call(when)


@pytest.mark.parametrize("paused", [timedelta(microseconds=-1), 3, None])
def test_a_pause_that_is_none_is_refused(paused: object) -> None:
    for regime in REGIMES.values():
        with pytest.raises(Misuse, match="paused must be a timedelta >= 0"):
            Clock(regime=regime).due(AWARE, paused=paused)


def test_the_calendar_has_an_end() -> None:
    clock = Clock(regime=CCPA)
    assert clock.due(noon("9999-11-15")) == end_of("9999-12-30")
    for received in ("9999-11-16", "9999-12-01", "9999-12-31"):  # the first of them: to the very end
        with pytest.raises(Misuse, match="must end before 9999-12-31"):
            clock.due(noon(received))
    assert Clock(regime=GDPR).due(noon("9999-11-30")) == end_of("9999-12-30")
    for received in ("9999-12-01", "9999-12-31"):
        with pytest.raises(Misuse, match="must end before"):
            Clock(regime=GDPR).due(noon(received))


def test_holidays_to_the_end_of_the_calendar_are_refused() -> None:
    holidays = frozenset(date(9999, 12, day) for day in range(20, 32))
    with pytest.raises(Misuse, match="must end before"):
        Clock(regime=GDPR, holidays=holidays).due(noon("9999-11-25"))


@pytest.mark.parametrize("zone", ZONES + [timezone(timedelta(hours=hours)) for hours in (-23, 23)])
@pytest.mark.parametrize("regime", [GDPR, CCPA])
def test_the_ends_of_the_calendar_raise_nothing_but_misuse(regime: Regime, zone: tzinfo) -> None:
    clock = Clock(regime=regime, zone=zone)
    for edge in (datetime.max.replace(tzinfo=UTC), datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))):
        with pytest.raises(Misuse):
            clock.due(edge)
    with pytest.raises(Misuse):
        clock.due(datetime.min.replace(tzinfo=timezone(timedelta(hours=5))))
    with pytest.raises(Misuse):
        Clock(regime=GDPR, zone=zone).due(AWARE, paused=timedelta.max)
    last_start = noon("9999-11-14") if regime == CCPA else noon("9999-11-28")
    assert clock.due(last_start).tzinfo is UTC


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "none"},
        {"name": "both", "months": 1, "days": 1},
        {"name": "both", "months": 1, "more_months": 1, "more_days": 1},
        {"name": "less", "days": -1},
        {"name": "half", "days": 1.5},
        {"name": "true", "months": True},
        {"name": "text", "months": 1, "rolls": "no"},
    ],
)
def test_a_regime_that_counts_nothing_is_refused(fields: dict) -> None:
    with pytest.raises(Misuse):
        Regime(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"regime": "gdpr"},
        {"regime": GDPR, "zone": "Europe/Berlin"},
        {"regime": GDPR, "holidays": {date(2024, 5, 1)}},
        {"regime": GDPR, "holidays": frozenset({AWARE})},  # equal to no date, so it would move nothing
        {"regime": GDPR, "holidays": frozenset({"2024-05-01"})},
    ],
)
def test_a_clock_of_wrong_parts_is_refused(fields: dict) -> None:
    with pytest.raises(Misuse):
        Clock(**fields)


def test_regimes_are_found_by_name_and_nothing_can_be_changed() -> None:
    assert dict(REGIMES) == {"gdpr": GDPR, "ccpa": CCPA}
    with pytest.raises(TypeError):
        REGIMES["gdpr"] = CCPA
    with pytest.raises(FrozenInstanceError):
        GDPR.months = 2
    with pytest.raises(FrozenInstanceError):
        Clock(regime=GDPR).zone = BERLIN
