"""The tables of red-teaming: what attacks did, what was refused, and what screens leave of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from expunge.attack.measured import Measured
from expunge.report.page import Grid
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_response import NO_SCREEN, Response, response

_NONE = ""
_ASKED = {
    "asked": "rows that its requests ask for on average, and its controls too.",
    "hit": "share of targets, in percent, of which the attacker has what it wants after the attack's requests, "
    "through the unlearner; hit, retrained: under exact retraining; hit, random: after as many random rows. "
    "Intervals are exact binomial over targets.",
    "margin": "by how much the target's margin lies above that of the control that it is nearest to (random rows, "
    "nearest neighbours, noise, the model before, the model without the attacker's rows), through the unlearner; "
    "margin, retrained: the same under exact retraining; in units of the outputs, mean over targets with Student's t "
    "interval; above 0 with all of the interval: the attack works. no more than neighbours: it moves targets further "
    "than random rows, but not shown so of nearest neighbours.",
    "work": "row gradients that it takes the unlearner, over those of random rows; blank where not shown to be more.",
    "accuracy": "in percent, of all other test rows, after the attack through the unlearner.",
}
_LEFT = {
    "caught": "attempts that are not carried out at once, in percent of targets.",
    "hit": "hit, gain: what is left in the end, where a flagged erasure goes to exact retraining, a flagged "
    "replacement loses both rows, a refused request changes nothing and all else goes through the unlearner; gain: the "
    "target's margin above that of the model before.",
    "at equal": "the same gain where each policy alarms on at most the stated share of requests in good faith.",
    "delayed": "requests in good faith of the same sizes and kinds that raise an alarm, in percent of {benign} that no "
    "calibration saw; of an attempt of several requests each has its chance of an alarm, and so have those.",
    "work": "row gradients that such a request costs more on average, as alarms are retrained.",
    "area": "below the ROC curve.",
}


def attack_grid(found: Redteam) -> Grid:
    """A line for each attack and budget that came to anything, and was not refused altogether."""
    rows = [
        _attack_row(name, rows, at)
        for (name, rows), at in found.measured.items()
        if at.done and (name, rows) not in found.refused
    ]
    return _known(
        Grid(
            caption=f"Attacks on {len(found.targets)} targets; the model stands on {found.about['rows']:,} rows",
            headers=(
                *("attack", "budget", "is it", "asked", "hit", "hit, retrained", "hit, random"),
                *("margin", "margin, retrained", "work", "accuracy"),
            ),
            rows=tuple(rows),
            words=3,
        ),
        _ASKED,
        lambda cell: cell == _NONE,
    )


def _attack_row(name: str, rows: int, at: Measured) -> tuple[str, ...]:
    hits = [at.hits("through", "attack"), at.hits("retrain", "attack"), at.hits("through", "random")]
    least = [f"{at.least(world):.2f}" for world in ("through", "retrain")]
    work = at.work("through")
    return (
        name,
        f"{rows:,}",
        "no more than neighbours" if at.answer == "neither shown" and _harmed(at) else at.answer,
        f"{sum(one.rows for one in at.done) / len(at.done):,.0f}",
        *(f"{one:.0%}" for one in hits),
        *least,
        f"{work:.2f}" if work is not None and work.low > 1 else _NONE,
        f"{at.mean('through', 'attack', 'accuracy'):.1%}",
    )


def _harmed(at: Measured) -> bool:
    return at.harms("through") or at.harms("retrain")


def _known(grid: Grid, notes: Mapping[str, str], empty: Callable[[str], bool]) -> Grid:
    """The grid without columns of figures in which nothing is known, and with notes on those that are left."""
    left = [
        place
        for place in range(len(grid.headers))
        if place < grid.words or not all(empty(row[place]) for row in grid.rows)
    ]
    headers = tuple(grid.headers[place] for place in left)
    return Grid(
        caption=grid.caption,
        headers=headers,
        rows=tuple(tuple(row[place] for place in left) for row in grid.rows),
        words=grid.words,
        notes=" ".join(f"{name}: {text}" for name, text in notes.items() if name in headers).replace("hit: hit", "hit"),
    )


def transfer_grid(found: Redteam) -> tuple[Grid, ...]:
    """What each attack does through other unlearners, at the largest budget; no grid if none was named."""
    rows = [
        (name, other, f"{at.hits(other, 'attack'):.0%}", f"{at.least(other):.2f}")
        for name in found.about["attacks"]
        for other in found.about["others"]
        if (at := found.at_most(name)).done and (name, found.largest) not in found.refused
    ]
    grid = Grid(
        caption=f"The same requests of {found.largest:,} rows through other unlearners",
        headers=("attack", "unlearner", "hit", "margin"),
        rows=tuple(rows),
        notes="The requests were made for the unlearner under attack. hit and margin as above.",
    )
    return (grid,) if rows else ()


def refused_grid(found: Redteam) -> tuple[Grid, ...]:
    """Requests that the unlearner refused, and what one that takes them on trust would have had; or no grid."""
    rows = []
    for (name, budget), at in found.measured.items():
        some = [out.refused for one in at.done for out in one.of("through", "attack") if out.refused]
        if some:
            what = "all" if (name, budget) in found.refused else f"some, of {len(some)} of {len(at.done)} targets"
            trusted = [f"{at.hits('naive', 'attack'):.0%}", f"{above_before(at):+.2f}"] if _naive(at) else [_NONE] * 2
            reasons = list(dict.fromkeys(why.partition(": ")[2] for refused in some for why in refused))
            more = f" (and {len(reasons) - 1} more reasons of the kind)" if len(reasons) > 1 else ""
            rows.append((name, f"{budget:,}", what, f"{reasons[0]}{more}", *trusted))
    grid = Grid(
        caption="Refused by the provider",
        headers=("attack", "budget", "requests", "why", "hit, if trusted", "gain, if trusted"),
        rows=tuple(rows),
        words=4,
    )
    notes = {
        "hit, if trusted": "share of targets, in percent, hit where a provider takes rows that were never trained on "
        "for members, which the one under attack does not.",
        "gain, if trusted": "by how much the targets' margins would rise there above those of the model before.",
    }
    return (_known(grid, notes, lambda cell: cell == _NONE),) if rows else ()


def _naive(at: Measured) -> bool:
    return any(one.of("naive", "attack") for one in at.done)


def above_before(at: Measured) -> float:
    """Of requests taken on trust: the margin above that of the model before, mean over targets."""
    gains = [one.margin("naive", "attack") - one.margin("through", "nothing") for one in at.done]
    return sum(gains) / len(gains)


def untried_grid(found: Redteam) -> tuple[Grid, ...]:
    """Attacks that could not be made; no grid if there are none."""
    rows = [
        (name, f"{rows:,}", f"{sum(one.error == why for one in at.tried)} of {len(at.tried)}", why.partition(": ")[2])
        for (name, rows), at in found.measured.items()
        for why in at.untried
    ]
    grid = Grid(
        caption="Attacks that could not be made, and are in no figure",
        headers=("attack", "budget", "targets", "why"),
        rows=tuple(rows),
        words=4,
    )
    return (grid,) if rows else ()


def screen_grid(found: Redteam) -> Grid:
    """What is left of each attack at the largest budget, under every policy and under none.

    Without those that the provider refused: it needs no screen for them.
    """
    told = [
        (name, response(found, policy, name, found.largest))
        for name in found.screened
        for policy in (NO_SCREEN, *found.policies)
    ]
    equal = any(f"{one.gain:.2f}" != f"{one.gain_equal:.2f}" for _, one in told)
    grid = Grid(
        caption=f"What is left of each attack of {found.largest:,} rows, screens calibrated to "
        f"{100 * found.about['rate']:g} % false alarms",
        headers=("attack", "policy", "caught", "hit", "gain", "at equal", "delayed", "work", "area"),
        rows=tuple(_response_row(name, one, equal) for name, one in told),
        words=2,
    )
    notes = {name: text.format(benign=found.about["benign"]) for name, text in _LEFT.items()}
    return _known(grid, notes, lambda cell: cell in (_NONE, "0"))


def _response_row(attack: str, one: Response, equal: bool) -> tuple[str, ...]:
    shares = [_NONE if share is None else f"{share:.0%}" for share in (one.caught, one.hit)]
    delayed = _NONE if one.false_alarms is None else f"{one.false_alarms:.0%}"
    area = _NONE if one.auc is None else f"{one.auc:.2f}"
    left = (f"{one.gain:.2f}", f"{one.gain_equal:.2f}" if equal else _NONE)
    return (attack, one.policy, *shares, *left, delayed, f"{one.gradients:,.0f}", area)
