"""How many touched shards predictions withstand, as people read it: tables and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from expunge.certify.vote_radius import DeletionRobustness, Floor
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate
from expunge.report.certified import _ON_ITS_OWN, _STYLES, _counted
from expunge.report.page import Grid
from expunge.report.plots import _INK, _follow_the_page, _svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COVERED = (
    "Covered: all that requests can do to at most k shards together, counted from this model on, if carried out by "
    "sisa, or by retraining with the same recipe and coins. An owner lies in one shard, so that k owners, or k rows, "
    "touch at most k. Not covered: wrong predictions, and methods that change shards which held none of the rows."
)
_SHARES = (
    "Shares of test rows in percent, with 95 % intervals over rows of one training. accuracy at least: right, and no "
    "such requests can change it; a lower bound, as one set of requests is seldom the worst for every row."
)


def robustness_grid(found: DeletionRobustness) -> Grid:
    """A line for each number of touched shards, up to the first at which nothing is certain."""
    return Grid(
        caption=f"{_counted(found.shards, 'shard')}, {found.voters} of them vote; {len(found):,} predictions, median "
        f"radius {found.median_radius:g}",
        headers=("shards touched", "cannot change", "accuracy at least"),
        rows=tuple((str(one.k), f"{one.stable:.1%}", f"{one.accuracy:.1%}") for one in found.curve()),
        words=1,
        notes=f"{_SHARES}\n{COVERED}",
    )


def predictions_grid(found: DeletionRobustness) -> Grid:
    """A line for each prediction."""
    given = zip(
        found.ids,
        found.labels.tolist(),
        found.predicted.tolist(),
        found.radius.tolist(),
        found.votes.tolist(),
        strict=True,
    )
    return Grid(
        caption="Each prediction",
        headers=("record", "label", "predicted", "radius", "votes by class"),
        rows=tuple((name, str(y), str(c), str(r), " ".join(map(str, votes))) for name, y, c, r, votes in given),
        words=1,
        notes="radius: shards that may be touched without changing the prediction; of one more, some reply changes it.",
    )


def robustness_by_shards_grid(found: Sequence[DeletionRobustness], ks: Sequence[int]) -> Grid:
    """A line for each number of shards, with the accuracy floors at these numbers of touched ones."""
    return Grid(
        caption=f"Votes of shards on {len(found[0]):,} test rows" if found else "No votes",
        headers=("shards", "vote", "accuracy", "median radius", "radius >= 1", *(f"floor, k={k}" for k in ks)),
        rows=tuple(_line(one, ks) for one in found),
        words=0,
        notes=f"{_SHARES}\nfloor, k: accuracy at least after any requests that touch at most k shards. {COVERED}",
    )


def _line(one: DeletionRobustness, ks: Sequence[int]) -> tuple[str, ...]:
    shares = [one.accuracy_floor(0), one.floor(1).stable, *map(one.accuracy_floor, ks)]
    accuracy, stable, *floors = (f"{share:.1%}" for share in shares)
    return (str(one.shards), str(one.voters), accuracy, f"{one.median_radius:g}", stable, *floors)


def robustness_svg(found: Sequence[DeletionRobustness]) -> str:
    """Accuracy floor and share of unchanged predictions against touched shards: a picture of its own.

    Raises:
        Misuse: if there is nothing to draw.
    """
    if not found:
        raise Misuse("there are no votes to draw, got none; give at least one model")
    svg = _svg(_figure(found))
    head, bracket, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{bracket}{_ON_ITS_OWN}{rest}'


def _figure(found: Sequence[DeletionRobustness]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw(above, found, "accuracy at least, %", lambda one: one.accuracy)
    _draw(below, found, "predictions that cannot change, %", lambda one: one.stable)
    below.set_xlabel("shards touched by requests, at most")
    above.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def _draw(axes: Axes, found: Sequence[DeletionRobustness], label: str, share: Callable[[Floor], Estimate]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, one in enumerate(found):
        mark, colour = _STYLES[number % len(_STYLES)]
        curve = one.curve()
        x, shares = [floor.k for floor in curve], [share(floor) for floor in curve]
        bars = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
        drawn = {"color": colour, "marker": mark, "markersize": 6, "capsize": 2, "lw": 1}
        axes.errorbar(x, [100 * s.value for s in shares], yerr=bars, label=_counted(one.shards, "shard"), **drawn)  # type: ignore[arg-type]
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    _follow_the_page(axes)
