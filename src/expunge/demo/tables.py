"""The tables of the unlearning chapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.audit import Row, Table, summarise
from expunge.core.estimate import Estimate
from expunge.report import Grid

_REFERENCE = "(ref.)"
_NOTES = (
    "forget, retain, test: accuracy in percent on removed, staying and test images. attack: AUC of a loss-threshold "
    "membership attack on the removed images, 0.5 is chance. gap: mean absolute difference to the reference (ref.) "
    "over these four, in points. ratio: seconds over the reference's. "
)


def grid_of(caption: str, kinds: Sequence[Sequence[Table]]) -> Grid:
    """One table of all methods: for each kind of model, its tables over the seeds."""
    headers = ("method", "claim", "forget", "retain", "test", "attack", "gap", "seconds", "ratio")
    seeds = len(kinds[0])
    if seeds == 1:
        lines = [_line(row, told[0][told[0].reference]) for told in kinds for row in told[0].rows]
        notes = _NOTES + "Intervals (95 %) are over images of one training; times are of one run."
    else:
        means = [(summarise(told), told[0].reference) for told in kinds]
        lines = [_mean_line(figures, reference, told) for told, reference in means for figures in told]
        notes = _NOTES + f"Means over {seeds} seeds with 95 % intervals (Student's t)."
    return Grid(caption=caption, headers=headers, rows=tuple(lines), notes=notes)


def _line(row: Row, reference: Row) -> tuple[str, ...]:
    timed = row.seconds > 0
    return (
        row.method,
        row.claim,
        f"{row.forget:.1%}",
        f"{row.retain:.1%}",
        f"{row.test:.1%}" if row.test is not None else "not measured",
        f"{row.attack:.2f}" if row.attack is not None else "not measured",
        _REFERENCE if row is reference else f"{100 * row.mean_gap(reference):.2f}",
        f"{row.seconds:.2f}" if timed else "",
        ratio(row.seconds / reference.seconds) if timed else "",
    )


def _mean_line(figures: Mapping[str, Any], reference: str, lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def cell(name: str, spec: str) -> str:
        value = figures.get(name)
        return f"{value:{spec}}" if isinstance(value, Estimate) else "not measured"

    seconds = {line["method"]: line["seconds"].value for line in lines}
    timed = seconds[figures["method"]] > 0
    return (
        figures["method"],
        figures["claim"],
        cell("forget", ".1%"),
        cell("retain", ".1%"),
        cell("test", ".1%"),
        cell("attack", ".2f"),
        _REFERENCE if figures["method"] == reference else cell("mean_gap", ".2%"),
        cell("seconds", ".2f") if timed else "",
        ratio(seconds[figures["method"]] / seconds[reference]) if timed else "",
    )


def ratio(value: float) -> str:
    """A share of one as people say it, ``1/17``; near or above one as it is."""
    if not value:
        return "0"
    return f"1/{1 / value:.0f}" if value < 0.67 else f"{value:.1f}"
