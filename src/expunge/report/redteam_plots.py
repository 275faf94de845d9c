"""Pictures of attacks and screens: success against budget, ROC curves, and targets before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from expunge.attack.measured import Outcome, Tried
from expunge.core.estimate import Estimate
from expunge.report.plots import _INK, _follow_the_page, _svg
from expunge.study.redteam_found import Redteam

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "os^DvPX*h"
_COLOURS = ("#2a6fb5", "#c0562b", "#2f7d4f", "#8a5bb0", "#a87b12", "#b03a6b", "#3b8c8c", "#6b6b6b", "#7d4f2f")
_LINES = ("-", "--", ":")
_KINDS = {
    "attack, through the unlearner": ("through", "attack", _COLOURS[0]),
    "attack, exact retraining": ("retrain", "attack", _COLOURS[1]),
    "random rows, through the unlearner": ("through", "random", _COLOURS[7]),
}
"""By what the key says: world, arm and colour; marks and lines tell them apart without colour."""
_SHOWN = {
    "before": ("through", "nothing"),
    "after, through the unlearner": ("through", "attack"),
    "after exact retraining": ("retrain", "attack"),
}


def success(found: Redteam) -> str:
    """SVG of the share of targets hit: against the budget, or at one budget beside how far they moved."""
    return _at_one_budget(found) if len(found.about["budgets"]) == 1 else _hits_against_budget(found)


def _at_one_budget(found: Redteam) -> str:
    """For each attack a line for each kind of requests: who is hit, and how far targets are moved beyond controls."""
    from matplotlib.figure import Figure

    names = found.screened
    figure = Figure(figsize=(9.6, 1.4 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))[::-1]
    for number, (label, (world, arm, colour)) in enumerate(_KINDS.items()):
        style = {"color": colour, "fmt": _MARKS[number], "markersize": 5, "capsize": 2, "lw": 1, "label": label}
        hits = [found.at_most(name).hits(world, arm) for name in names]
        aside = places + 0.24 * (1 - number)
        left.errorbar([100 * one.value for one in hits], aside, xerr=_reach(hits), **style)
        if arm == "attack":
            moved = [found.at_most(name).least(world) for name in names]
            right.errorbar([one.value for one in moved], aside, xerr=_spread(moved), **style)
    left.set_yticks(places, names)
    left.set_xlabel("targets hit, %")
    left.set_xlim(-4, 104)
    right.axvline(0, linestyle=":", color=_INK, lw=1)
    right.set_xlabel("margin over the nearest control")
    for axes in (left, right):
        _follow_the_page(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, labelcolor=_INK, loc="outside upper center", ncols=3, fontsize=9)
    return _svg(figure)


def _hits_against_budget(found: Redteam) -> str:
    """A panel for each attack, a line for each kind of requests."""
    from matplotlib.figure import Figure

    names, wide = found.screened, 4
    high = -(-len(names) // wide)
    figure = Figure(figsize=(9.6, 0.6 + 2.1 * high), layout="constrained")
    panels = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        known = [(rows, at) for (attack, rows), at in found.measured.items() if attack == name and at.done]
        for number, (label, (world, arm, colour)) in enumerate(_KINDS.items()):
            aside = 1.06 ** (number - 1)  # marks of one budget lie side by side
            line = [(aside * 100 * rows / found.about["rows"], at.hits(world, arm)) for rows, at in known]
            mark = {"color": colour, "marker": _MARKS[number], "markersize": 4, "capsize": 2, "lw": 1, "label": label}
            x, y = [budget for budget, _ in line], [100 * one.value for _, one in line]
            axes.errorbar(x, y, yerr=_reach([one for _, one in line]), linestyle=_LINES[number], **mark)
        axes.set_title(name, color=_INK, fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks([100 * rows / found.about["rows"] for rows in found.about["budgets"]], minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:.2g}")
        axes.set_ylim(-4, 104)
        _follow_the_page(axes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("budget, % of the rows (log scale)", color=_INK, fontsize=10)
    figure.supylabel("targets hit, %", color=_INK, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, labelcolor=_INK, loc="outside upper center", ncols=3, fontsize=9)
    return _svg(figure)


def _reach(shares: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach below and above, in percent."""
    low = [100 * (one.value - max(0.0, one.low)) for one in shares]
    high = [100 * (min(1.0, one.high) - one.value) for one in shares]
    return [low, high]


def _spread(known: Sequence[Estimate]) -> list[list[float]]:
    """The same of means; of one target there is no interval to draw."""
    ends = [(one.value - one.low, one.high - one.value) for one in known]
    return [[end if math.isfinite(end) else 0.0 for end in side] for side in zip(*ends, strict=True)]


def curves(found: Redteam, attack: str) -> str:
    """SVG of every policy's ROC against one attack at the largest budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, policy in enumerate(found.policies):
        if found.false_alarms(policy, attack, found.largest) is None:
            continue
        points, area = found.roc(policy, attack, found.largest)
        x, y = [100 * a for a, _ in points], [100 * b for _, b in points]
        style = "-" if number % 2 else "--"
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        axes.plot(x, y, style, color=colour, marker=mark, markevery=0.15, lw=1.4, label=f"{policy}, area {area:.2f}")
    axes.plot([0, 100], [0, 100], ":", color=_INK, lw=1, label="chance")
    axes.axvline(100 * found.about["rate"], linestyle=":", color=_INK, alpha=0.5, lw=1)
    axes.set_xlabel("requests in good faith delayed, %")
    axes.set_ylabel("attempts caught, %")
    return _finished(figure, axes)


def before_and_after(found: Redteam, tried: Tried) -> str:
    """SVG of one target: its picture, if rows are pictures, and the model's probabilities before and after."""
    from matplotlib.figure import Figure

    target = found.targets[tried.target]
    picture = target["picture"]
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    panels = figure.subplots(1, 4 if picture is not None else 3, squeeze=False)[0]
    if picture is not None:
        pixels = np.asarray(picture, dtype=np.uint8)
        panels[0].imshow(pixels if pixels.ndim == 2 else np.moveaxis(pixels, 0, -1).squeeze(), cmap="gray")
        panels[0].set_title(f"class {target['y']}", color=_INK, fontsize=10)
        panels[0].set_axis_off()
    for axes, (name, (world, arm)) in zip(panels[-3:], _SHOWN.items(), strict=True):
        outcomes = tried.of(world, arm)
        if outcomes:
            _bars(axes, outcomes[0], target)
        axes.set_title(name, color=_INK, fontsize=10)
        axes.set_ylim(0, 1.05)
        _follow_the_page(axes)
    return _svg(figure)


def _bars(axes: Axes, outcome: Outcome, target: Mapping[str, Any]) -> None:
    said = np.asarray(outcome.said)
    shown = np.arange(len(said)) if len(said) <= 12 else np.sort(np.argsort(said)[-8:])
    own = target["y"]
    colours = [_COLOURS[2] if one == own else _COLOURS[1] if said[one] == said.max() else "#8a929a" for one in shown]
    names = [
        f"{one}\ntrue" if one == own else f"{one}\nwanted" if one == target["wanted"] else str(one) for one in shown
    ]
    axes.bar(names, said[shown], color=colours)


def _finished(figure: Figure, axes: Axes) -> str:
    _follow_the_page(axes)
    axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(figure)
