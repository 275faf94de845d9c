"""Pictures of attacks and screens: success against budget, ROC curves, and targets before and after."""

from __future__ import annotations

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
_LINES = {"through": "-", "retrain": "--"}
_SHOWN = {
    "before": ("through", "nothing"),
    "after, through the unlearner": ("through", "attack"),
    "after exact retraining": ("retrain", "attack"),
}


def success(found: Redteam) -> str:
    """SVG of the share of targets hit against the budget, through the unlearner and under exact retraining."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = found.about["rows"]
    for number, name in enumerate(found.about["attacks"]):
        for world, line in _LINES.items():
            aside = 1 + 0.02 * (number - (len(found.about["attacks"]) - 1) / 2)  # marks of one budget lie side by side
            known = [
                (aside * 100 * budget / rows, at.hits(world, "attack"))
                for (attack, budget), at in found.measured.items()
                if attack == name and at.done
            ]
            if known:
                _line(axes, known, number, line, f"{name}, {'unlearner' if world == 'through' else 'retraining'}")
    axes.set_xlabel("budget, % of the rows (log scale)")
    axes.set_xscale("log")
    axes.set_xticks([100 * budget / rows for budget in found.about["budgets"]], minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:.2g}")
    axes.set_ylabel("targets hit, %")
    axes.set_ylim(-4, 104)
    return _finished(figure, axes)


def _line(axes: Axes, known: Sequence[tuple[float, Estimate]], number: int, line: str, label: str) -> None:
    x, y = [budget for budget, _ in known], [100 * one.value for _, one in known]
    low = [value - max(0.0, 100 * one.low) for value, (_, one) in zip(y, known, strict=True)]
    high = [min(100.0, 100 * one.high) - value for value, (_, one) in zip(y, known, strict=True)]
    colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
    axes.errorbar(x, y, yerr=[low, high], linestyle=line, color=colour, marker=mark, capsize=3, lw=1, label=label)


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
    axes.bar([str(one) for one in shown], said[shown], color=colours)


def _finished(figure: Figure, axes: Axes) -> str:
    _follow_the_page(axes)
    axes.legend(frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(figure)
