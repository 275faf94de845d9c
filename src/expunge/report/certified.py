"""What certified methods make of a budget, as people read it: the plan's table, and accuracy and seconds by epsilon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from expunge.core.errors import Unsupported
from expunge.core.estimate import Estimate
from expunge.report.page import Chapter, Grid, Report
from expunge.report.plots import _INK, _follow_the_page, _svg
from expunge.study.certified import CertifiedPlan, CertifiedSweep, SweptLine
from expunge.study.certified_tries import Figures, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_MEASURED = "not measured"
_ON_ITS_OWN = (
    "<style>svg{color:#1c2126;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6e9ec;background:#15191d}}</style>"
)
_COLOURS = ["#2a6fb5", "#c0562b", "#2f7d4f", "#8a5bb0", "#a87b12", "#b03a6b", "#3b8c8c", "#6b6b6b", "#7d4f2f"]
_STYLES = tuple(zip("os^DvPX*h", _COLOURS, strict=True))
_TICKS = (0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98, 99, 100)
_PLAN_NOTES = (
    "Accuracy in percent on the test rows. with noise: of the model that is given out, mean over {draws} draws of the "
    "noise, or whole runs, with 95 % interval (Student's t); it says nothing of other trainings. retrained: exact "
    "retraining by the recipe that the method needs, without noise, one training. as long: retraining by your recipe "
    "that stops after as long as the first request took, and a later one; a method below it buys nothing but its "
    "guarantee. seconds: of real removals of {rows}, on this machine with {threads}; training is not in them. "
    "radius: {radius:.4g}, which no row with a 1 appended may exceed (--radius). "
    "basis: proved by formulas from settings, conditional on what somebody vouches for, or none. cap: distance that "
    "the noise hides. vacuous: doing nothing has the same guarantee."
)
_CHOSEN = (
    "(sigma chosen): the largest sigma of a fixed grid whose draws cost at most half a point here. It was chosen by "
    "looking at the accuracy on these data, so that it depends on them, which no guarantee covers: choose it on public "
    "data, or accept that."
)


def plan_grid(plan: CertifiedPlan) -> Grid:
    """A line for each method; why, and what must be so from the start, stand in `plan_reasons`."""
    budget, about = plan.budget, plan.about
    rows = about["rows_per_request"]
    return Grid(
        caption=f"{budget.requests:,} requests of {_counted(rows, 'row')} within epsilon {budget.epsilon:g}, delta "
        f"{budget.delta:g}: {about['model']} on {about['records']:,} rows",
        headers=("method", "can", "basis", "sigma", "cap", "with noise", "retrained", "first s", "later s", "as long"),
        rows=(_retrain_row(plan), *map(_plan_row, plan.lines)),
        words=3,
        notes=" ".join(
            [
                _PLAN_NOTES.format(
                    draws=about["draws"],
                    radius=about["radius"],
                    rows=_counted(rows, "random row"),
                    threads=_counted(about["threads"], "thread"),
                ),
                *([_CHOSEN] if any(line.chosen for line in plan.lines) else []),
            ]
        ),
    )


def plan_reasons(plan: CertifiedPlan) -> list[tuple[str, str]]:
    """(method, what must be known beside its figures); the name stands at the first of its lines only."""
    found = []
    for line in plan.lines:
        told = [*([f"cannot: {line.why}"] if line.why and line.can == "no" else []), *_partly(line)]
        told += [f"from the start: {line.demand}"] if line.demand else []
        told += [remark for remark in line.remarks if remark not in line.why]
        if not line.chosen:
            found += [("" if number else line.method, text) for number, text in enumerate(told)]
    return found


def _partly(line: Line) -> list[str]:
    return [f"only in part: {line.why}"] if line.can == "current only" else []


def _retrain_row(plan: CertifiedPlan) -> tuple[str, ...]:
    return ("retrain", "yes", "exact", "", "", "", f"{plan.retrained:.1%}", *[_seconds(plan.seconds_retrain)] * 2, "")


def _plan_row(line: Line) -> tuple[str, ...]:
    name = f"{line.method} (sigma chosen)" if line.chosen else line.method
    can = f"{line.can}, vacuous" if line.vacuous else line.can
    sizes = ("" if one is None else f"{one:.3g}" for one in (line.sigma, line.cap))
    return (name, can, line.basis or "", *sizes, *_figures(line.figures))


def _figures(found: Figures | None) -> tuple[str, ...]:
    if found is None:
        return ("",) * 5
    early = [NOT_MEASURED if one is None else f"{100 * one:.1f}" for one in (found.early_first, found.early_later)]
    seconds = (_seconds(found.seconds_first), _seconds(found.seconds_later))
    return (f"{found.accuracy:.1%}", f"{found.retrained:.1%}", *seconds, ", ".join(early))


def _seconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def sweep_report(sweep: CertifiedSweep, check: str = "") -> Report:
    """The whole sweep as a report; `check` is the command that made it."""
    about, told = sweep.about, _verdict(sweep)
    drawn = _DRAWINGS if _methods(sweep) else {}
    chapter = Chapter(
        name="certified",
        headline=told,
        text=(
            f"Each budget is for {about['requests']:,} requests of {_counted(about['rows_per_request'], 'row')} "
            f"together, at delta {about['delta']:g}. Every method was set up for it before any request, and removed "
            "random rows for real. first: the first request after training (cold). later: those after it (warm).",
            "Marks and lines tell the methods apart, not colours alone. Hollow marks: vacuous, or the budget is not "
            "honoured.",
        ),
        grids=(_sweep_grid(sweep), *_refusals(sweep)),
        plots={caption: _svg(_figure(sweep, [draw])) for caption, draw in drawn.items()},
        shows="What each guarantee costs in accuracy and in time, on these data and this machine.",
        does_not_show="That rows are forgotten by models before this one, or how methods do with other settings: each "
        "was tried with one, and no method was tuned.",
        check=check,
        data=sweep.to_json(),
    )
    return Report(
        title="expunge certify plot: accuracy and seconds against epsilon",
        verdict=told,
        facts=_facts(sweep),
        chapters=(chapter,),
    )


def _verdict(sweep: CertifiedSweep) -> str:
    able = [line for line in sweep.lines if line.can == "yes" and not line.vacuous]
    worth = [line.method for line in able if line.gain_later is not None and line.gain_later.low > 0]
    who = f"At some epsilon, {', '.join(dict.fromkeys(worth))}" if worth else "No method that keeps to the budget"
    return f"{who} gave more accuracy, with all of its interval, than retraining for as long as a later request takes."


def sweep_svg(sweep: CertifiedSweep) -> str:
    """All three plots as one picture of its own: dark on light, or light on dark where the viewer asks for that.

    Raises:
        Unsupported: if no method gave any figure.
    """
    if not _methods(sweep):
        raise Unsupported("no method can be drawn, as none could be tried; write a page (.html), which says why")
    svg = _svg(_figure(sweep, list(_DRAWINGS.values())))
    head, bracket, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{bracket}{_ON_ITS_OWN}{rest}'


def _facts(sweep: CertifiedSweep) -> dict[str, str]:
    about = sweep.about
    return {
        "training rows": f"{about['records']:,}",
        "test rows": f"{about['test_rows']:,}",
        "model": about["model"],
        "requests": f"{about['requests']:,} of {_counted(about['rows_per_request'], 'row')}",
        "delta": f"{about['delta']:g}",
        "seeds": str(about["seeds"]),
        "retraining": f"{sweep.retrained:.1%} %, {sweep.seconds_retrain:.2g} s",
        "threads": str(about["threads"]),
    }


def _sweep_grid(sweep: CertifiedSweep) -> Grid:
    seeds = sweep.about["seeds"]
    one = "over draws of the noise, or runs; they say nothing of other trainings"
    over = f"over {seeds} seeds (Student's t)" if seeds > 1 else one
    return Grid(
        caption="Accuracy and seconds by epsilon",
        headers=("method", "epsilon", "can", "accuracy", "first s", "later s", "gain, first", "gain, later"),
        rows=tuple(_sweep_row(line) for line in sweep.lines if line.accuracy is not None),
        words=3,
        notes=f"Accuracy in percent on test rows, noise included; 95 % intervals {over}. gain: accuracy minus that of "
        "retraining that stops after as long as the first request, or a later one, took, in points.",
    )


def _sweep_row(line: SweptLine) -> tuple[str, ...]:
    can = f"{line.can}, vacuous" if line.vacuous else line.can
    shares = [NOT_MEASURED if one is None else f"{one:.1%}" for one in (line.gain_first, line.gain_later)]
    seconds = (NOT_MEASURED if one is None else _seconds(one) for one in (line.seconds_first, line.seconds_later))
    return (line.method, f"{line.epsilon:g}", can, f"{line.accuracy:.1%}", *seconds, *shares)


def _refusals(sweep: CertifiedSweep) -> list[Grid]:
    rows = tuple((line.method, f"{line.epsilon:g}", line.why) for line in sweep.lines if line.why)
    return (
        [Grid(caption="What cannot be had", headers=("method", "epsilon", "why"), rows=rows, words=3)] if rows else []
    )


def _figure(sweep: CertifiedSweep, drawings: Sequence[Callable[[Axes, CertifiedSweep], None]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.6 * len(drawings)), layout="constrained")
    every = figure.subplots(len(drawings), 1, squeeze=False)[:, 0]
    for axes, draw in zip(every, drawings, strict=True):
        axes.margins(x=0.08, y=0.12)
        draw(axes, sweep)
        axes.set_xscale("log")
        axes.set_xlabel("epsilon of all requests together (log scale)")
        _follow_the_page(axes)
        axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def _methods(sweep: CertifiedSweep) -> list[tuple[str, str, str, list[SweptLine]]]:
    """Each method with figures: name, mark, colour and lines by epsilon."""
    names = list(dict.fromkeys(line.method for line in sweep.lines))
    found = []
    for number, name in enumerate(names):
        lines = [line for line in sweep.lines if line.method == name and line.accuracy is not None]
        mark, colour = _STYLES[number % len(_STYLES)]
        if lines:
            found.append((name, mark, colour, lines))
    return found


def _draw_estimates(
    axes: Axes, sweep: CertifiedSweep, label: str, style: str, of: Callable[[SweptLine], Estimate | None]
) -> None:
    for name, mark, colour, lines in _methods(sweep):
        known = [(line, one) for line in lines if (one := of(line)) is not None]
        x, y = [line.epsilon for line, _ in known], [100 * one.value for _, one in known]
        bars = [[100 * (one.value - one.low) for _, one in known], [100 * (one.high - one.value) for _, one in known]]
        if known:
            axes.errorbar(x, y, yerr=bars, linestyle=style, color=colour, capsize=3, lw=1)
            _marks(axes, [line for line, _ in known], y, mark, colour, f"{name}{label}", style)


def _marks(
    axes: Axes, lines: Sequence[SweptLine], y: Sequence[float], mark: str, colour: str, label: str, style: str
) -> None:
    axes.plot([], [], mark, linestyle=style, color=colour, label=label)
    for line, value in zip(lines, y, strict=True):
        sound = line.can == "yes" and not line.vacuous
        axes.plot([line.epsilon], [value], mark, color=colour, markersize=8, fillstyle="full" if sound else "none")


def _draw_accuracy(axes: Axes, sweep: CertifiedSweep) -> None:
    _draw_estimates(axes, sweep, "", "-", lambda line: line.accuracy)
    axes.axhline(100 * sweep.retrained.value, linestyle=":", color=_INK, lw=1, label="exact retraining")
    _stretch_the_top(axes)
    axes.set_ylabel("test accuracy, % (errors on a log scale)")


def _stretch_the_top(axes: Axes) -> None:
    """Accuracy by the logarithm of its errors, so that a useless method does not flatten the good ones."""
    low, high = axes.get_ylim()
    low, high = max(0.0, low), min(100.0, high)
    axes.set_yscale("function", functions=(lambda y: -np.log(101 - y), lambda t: 101 - np.exp(-t)))
    axes.set_ylim(low, high)
    axes.set_yticks([one for one in _TICKS if low <= one <= high], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")


def _draw_seconds(axes: Axes, sweep: CertifiedSweep) -> None:
    for name, mark, colour, lines in _methods(sweep):
        for what, style, key in (("first", "-", "seconds_first"), ("later", "--", "seconds_later")):
            known = [line for line in lines if getattr(line, key) is not None]
            y = [max(getattr(line, key), 1e-4) for line in known]
            if known:
                axes.plot([line.epsilon for line in known], y, linestyle=style, color=colour, lw=1)
                _marks(axes, known, y, mark, colour, f"{name}, {what}", style)
    axes.axhline(max(sweep.seconds_retrain, 1e-4), linestyle=":", color=_INK, lw=1, label="exact retraining")
    axes.set_yscale("log")
    axes.set_ylabel("seconds a request (log scale)")


def _draw_gain(axes: Axes, sweep: CertifiedSweep) -> None:
    _draw_estimates(axes, sweep, ", first", "-", lambda line: line.gain_first)
    _draw_estimates(axes, sweep, ", later", "--", lambda line: line.gain_later)
    axes.axhline(0.0, linestyle=":", color=_INK, lw=1, label="retraining for as long")
    axes.set_yscale("symlog", linthresh=2.0)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("points over retraining for as long (log scale beyond 2)")


_DRAWINGS: dict[str, Callable[[Axes, CertifiedSweep], None]] = {
    "Test accuracy against epsilon, noise included": _draw_accuracy,
    "Seconds of a request against epsilon: first (cold, solid) and later (warm, dashed)": _draw_seconds,
    "Accuracy over that of retraining for as long: first (cold, solid) and later (warm, dashed)": _draw_gain,
}
