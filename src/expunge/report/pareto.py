"""What a method's time buys: its gap to exact retraining against its seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.core.estimate import Estimate
from expunge.report.plots import _COLOURS, _INK, _SHAPES, Point, _follow_the_page, _name_points, _svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Spent:
    """One method in the plot.

    Attributes:
        name: of the method.
        claim: ``exact``, ``certified`` or ``none``; more words may follow.
        gap: to exact retraining, as a share.
        seconds: what it took.
    """

    name: str
    claim: str
    gap: Estimate
    seconds: float


def gap_against_seconds(
    points: Sequence[Spent], yardstick: Sequence[tuple[float, float]] = (), nothing: float | None = None
) -> str:
    """SVG of gaps, in points, with intervals against seconds (log scale); shapes tell the claim.

    Args:
        points: one a method; the steps through them are the front: see `front`.
        yardstick: (seconds, gap) of retraining that stopped early, drawn as a dashed line. A method above it did worse
            than stopping early does.
        nothing: gap of the original, which is what doing nothing gives; drawn as a dotted line.
    """
    return _svg(_drawn(points, yardstick, nothing))


def front(points: Sequence[Spent]) -> list[Spent]:
    """Those points to which no other is at least as quick and as near, and better in one; by seconds."""
    found: list[Spent] = []
    for point in sorted(points, key=lambda one: (one.seconds, one.gap.value)):
        if not found or point.gap.value < found[-1].gap.value:
            found.append(point)
    return found


def _drawn(points: Sequence[Spent], yardstick: Sequence[tuple[float, float]], nothing: float | None = None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    named = [Point(name=p.name, claim=p.claim, accuracy=_cut(p.gap), seconds=p.seconds) for p in points]
    for point in named:
        claim, gap = point.claim.split(",")[0].split(" ")[0], point.accuracy
        bars = [[100 * (gap.value - gap.low)], [100 * (gap.high - gap.value)]]
        x = [max(point.seconds, 1e-3)]
        style = {"color": _COLOURS[claim], "marker": _SHAPES[claim]}
        axes.errorbar(x, [100 * gap.value], yerr=bars, markersize=9, capsize=3, **style)  # type: ignore[arg-type]
    best = front(points)
    steps = ([max(p.seconds, 1e-3) for p in best], [100 * p.gap.value for p in best])
    axes.step(*steps, where="post", color=_INK, alpha=0.25, lw=1, label="front")
    if yardstick:
        line = sorted(yardstick)
        drawn = ([max(seconds, 1e-3) for seconds, _ in line], [100 * gap for _, gap in line])
        axes.plot(*drawn, "--", color=_INK, alpha=0.7, lw=1, marker=".", label="retraining stopped early")
    if nothing is not None:
        axes.axhline(100 * nothing, linestyle=":", color=_INK, alpha=0.5, lw=1, label="doing nothing (original)")
    axes.set_xscale("log")
    axes.set_xlabel("seconds (log scale)")
    axes.set_ylabel("gap to retraining, points")
    axes.margins(x=0.2, y=0.15)
    _follow_the_page(axes)
    figure.legend(frameon=False, labelcolor=_INK, loc="outside upper right", ncols=3)
    _name_points(figure, axes, named)
    return figure


def _cut(gap: Estimate) -> Estimate:
    """The interval within what a gap can be."""
    return Estimate(gap.value, max(0.0, gap.low), min(1.0, gap.high), gap.n, gap.level, gap.interval)
