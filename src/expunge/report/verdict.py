"""What a study's figures say in a sentence, and no more than they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expunge.core.estimate import Estimate
from expunge.study import Line, StudyResult


def said(sparsity: float) -> str:
    """A sparsity in words."""
    return f"{100 * sparsity:g} % sparse" if sparsity else "dense"


def value_of(line: Line, name: str) -> float:
    """The figure without its interval; NaN if it was not measured."""
    value = line.figures.get(name)
    return math.nan if value is None else value.value if isinstance(value, Estimate) else value


def surely_below(line: Line, name: str) -> bool:
    """Whether a difference lies below zero with its whole interval, from every seed that was asked for.

    Of a study of one seed there is no interval, and the figure alone decides.
    """
    value = line.figures.get(name)
    if isinstance(value, Estimate):
        return value.n == line.seeds == line.of and value.high < 0
    return line.of == 1 and value is not None and value < 0


def surely_above(line: Line, name: str) -> bool:
    """As `surely_below`, for above zero."""
    value = line.figures.get(name)
    if isinstance(value, Estimate):
        return value.n == line.seeds == line.of and value.low > 0
    return line.of == 1 and value is not None and value > 0


def verdict(result: StudyResult) -> str:
    """How many methods are worth their cost; what is not done yet comes first."""
    undone = unfinished(result)
    start = f"Unfinished: {undone}. So far: " if undone else ""
    judged = [line for line in result.table() if line.kind == "method" and "over_yardstick" in line.figures]
    if not judged:
        return f"{start}No method was measured beside retraining of equal compute."
    worth = [line for line in judged if surely_below(line, "over_yardstick") and surely_below(line, "over_original")]
    partly = sum(line.seeds < line.of for line in judged)
    sure = "over the whole interval" if judged[0].of > 1 else "on one seed, so without an interval"
    rest = f" {partly} of the rows were not measured on all seeds, and are not counted as nearer." if partly else ""
    return (
        f"{start}Of {len(judged)} rows (a method, a scenario and a sparsity), {len(worth)} are nearer to exact "
        f"retraining than both the original and retraining that stops after as much compute, {sure}.{rest}"
    )


def headline(lines: Sequence[Line]) -> str:
    """The method nearest to retraining, if any is told apart from the original, and what stopping early does."""
    measured = [line for line in lines if line.kind == "method" and "over_original" in line.figures]
    if not measured:
        return "no method was measured"
    nearer = [line for line in measured if surely_below(line, "over_original")]
    if not nearer:
        if measured[0].of == 1 or all(value_of(line, "over_original") >= 0 for line in measured):
            return "no method is nearer to retraining than the original is"
        return "no method is told apart from the original as nearer to retraining: no interval lies below zero"
    line = min(nearer, key=lambda one: value_of(one, "gap"))
    found = (
        f"nearest to retraining: {line.method}, {said(line.sparsity)}, {100 * value_of(line, 'gap'):.2f} points away"
    )
    stopped = f"retraining stopped after as much compute ({100 * value_of(line, 'yardstick_gap'):.2f} points)"
    if "over_yardstick" not in line.figures:
        return found
    if surely_above(line, "over_yardstick"):
        return f"{found}; {stopped} is nearer"
    return found if surely_below(line, "over_yardstick") else f"{found}, not told apart from {stopped}"


def unfinished(result: StudyResult) -> str:
    """What the study has no cells of yet, in words; empty if it is finished."""
    missing = result.to_do()
    if not missing:
        return ""
    settings = result.about["settings"]
    groups: list[tuple[str, Sequence[object], set[Any], set[Any]]] = [
        ("sparsity", settings["sparsities"], {cell.sparsity for cell in result.cells}, {key[1] for key in missing}),
        (
            "scenario",
            list(settings["scenarios"]),
            {cell.scenario for cell in result.cells},
            {key[2] for key in missing},
        ),
        ("seed", settings["seeds"], {cell.seed for cell in result.cells}, {key[3] for key in missing}),
    ]
    nothing, partly = [], []
    for name, asked, there, lacking in groups:
        absent = [str(one) for one in asked if one not in there]
        nothing += [f"{name} {', '.join(absent)}"] if absent else []
        rest = [str(one) for one in asked if one in lacking and one in there]
        partly += [f"{name} {', '.join(rest)}"] if 0 < len(rest) < len(asked) - len(absent) else []
    note = f"; nothing yet of {', '.join(nothing)}" if nothing else ""
    note += f"; incomplete: {', '.join(partly)}" if partly else ""
    return f"{len(missing)} of {len(missing) + len(result.cells)} cells are not done yet{note}"
