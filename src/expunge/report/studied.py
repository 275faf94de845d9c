"""A study as people read it: its tables, its plots, its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from expunge.core.estimate import Estimate
from expunge.report.page import Chapter, Grid, Report
from expunge.report.pareto import Spent, gap_against_seconds
from expunge.report.verdict import headline, said, unfinished, value_of, verdict
from expunge.study import Line, StudyResult

NOT_MEASURED = "not measured"
_REFERENCE = "(ref.)"
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("UA", "unlearning_accuracy", ".1%"),
    ("MIA-eff.", "efficacy", ".1%"),
    ("RA", "retain", ".1%"),
    ("TA", "test", ".1%"),
    ("attack", "attack", ".2f"),
    ("gap", "gap", ".2%"),
    ("tug-of-war", "tug_of_war", ".3f"),
    ("seconds", "seconds", ".2f"),
    ("ratio", "seconds_over_retrain", ".3f"),
    ("against nothing", "over_original", ".2%"),
    ("against equal", "over_yardstick", ".2%"),
)
LEGEND = (
    "UA: 1 - accuracy on the removed rows. MIA-eff.: share of the removed rows that a confidence threshold, the best "
    "in telling retained from test rows, calls non-members. RA, TA: accuracy on retained rows, and on test rows of the "
    "classes that are left. attack: AUC of a loss-threshold membership attack on the removed rows. All but the attack "
    "in percent, and right is what retraining has, not what is high. gap: mean absolute difference to retraining "
    "(ref.), in points, over those of UA, RA, TA and attack that were measured: each table says which. tug-of-war: "
    "product of 1 - difference in UA, RA, TA. ratio: seconds over those of retraining. against nothing, against equal: "
    "the gap minus that of the original, and minus "
    "that of retraining which stops after as much compute; above zero the method is not worth its cost."
)


_CRITERIA = {
    "validation": "what the search made small, in points of accuracy, 0 is best: the difference on removed rows to "
    "what is expected of rows never seen, plus what is lost on retained rows, plus what is lost on validation rows.",
    "oracle": "what the search made small, in points, 0 is best: the gap to a retrained model, on the validation rows.",
}
_HOW_TO_READ = (
    "In the plots lower is nearer to retraining, and further left is quicker. Dotted: doing nothing, where the "
    "original stands; a method above it made matters worse. Dashed: retraining that stopped early. The thin steps are "
    "the front: to a method on it, no other is both as quick and as near. Intervals are not looked at for it."
)


def study_grids(result: StudyResult) -> tuple[Grid, ...]:
    """A table for each scenario and sparsity; what their columns mean stands below the last."""
    grids = [_grid(lines) for _, lines in _groups(result.table())]
    return (*(replace(grid, notes=grid.notes.removeprefix(LEGEND).strip()) for grid in grids[:-1]), *grids[-1:])


def study_report(result: StudyResult, check: str = "") -> Report:
    """The whole study as a report; `check` is the command that made it."""
    settings = result.about["settings"]
    groups = _groups(result.table())
    chapters = [
        _chapter(scenario, [lines for (one, _), lines in groups if one == scenario], check)
        for scenario in settings["scenarios"]
    ]
    if settings["trials"] > 1:
        chapters.append(_search(result))
    if result.not_measured():
        chapters.append(_missing(result))
    return Report(
        title="expunge compare: methods beside exact retraining",
        verdict=verdict(result),
        facts=_facts(result),
        chapters=tuple(chapters),
    )


def _groups(lines: Sequence[Line]) -> list[tuple[tuple[str, float], list[Line]]]:
    names = list(dict.fromkeys(line.scenario for line in lines))
    ordered = sorted(lines, key=lambda line: names.index(line.scenario))
    return [(key, list(some)) for key, some in groupby(ordered, key=lambda line: (line.scenario, line.sparsity))]


def _grid(lines: Sequence[Line]) -> Grid:
    first, seeds = lines[0], lines[0].of
    over = f"Means over {seeds} seeds with 95 % intervals (Student's t)." if seeds > 1 else "One seed."
    over += "" if seeds > 1 else " Intervals (95 %) are over rows of one training, and say nothing of other seeds."
    if any(line.seeds == 2 for line in lines):
        over += " Intervals over two seeds say next to nothing: they cover nearly all that a figure can be."
    missing = [
        f"{one.method}: {one.seeds} of {one.of} measured ({'; '.join(one.why) or 'the others are not done yet'})"
        for one in lines
        if one.seeds < one.of
    ]
    return Grid(
        caption=f"Forgetting {first.scenario}, {said(first.sparsity)}",
        headers=("method", "claim", *(name for name, _, _ in _COLUMNS)),
        rows=tuple(_row(line) for line in lines),
        notes=" ".join(
            [LEGEND, _gap_over(lines), over, *(["Not measured: " + ". ".join(missing) + "."] if missing else [])]
        ),
    )


def _gap_over(lines: Sequence[Line]) -> str:
    """Which figures the gap is a mean of, as a sentence."""
    return f"The gap is over {_in_gap(lines)}."


def _in_gap(lines: Sequence[Line]) -> str:
    names = {"UA": "unlearning_accuracy", "RA": "retain", "TA": "test", "attack": "attack"}
    measured = [line for line in lines if line.seeds]
    found = [short for short, name in names.items() if all(name in line.figures for line in measured)]
    return " and ".join([", ".join(found[:-1]), found[-1]])


def _row(line: Line) -> tuple[str, ...]:
    if not line.seeds:
        return (line.method, NOT_MEASURED, *[NOT_MEASURED] * len(_COLUMNS))
    name = line.method if line.seeds == line.of else f"{line.method} ({line.seeds} of {line.of} seeds)"
    return (name, line.claim, *(_cell(line, name, spec) for _, name, spec in _COLUMNS))


def _cell(line: Line, name: str, spec: str) -> str:
    if name == "gap" and line.kind == "retrain":
        return _REFERENCE
    no_work = line.kind == "original" and name.startswith("seconds")
    if no_work or (name.startswith("over_") and line.kind != "method"):
        return ""
    value = line.figures.get(name)
    if value is None:
        return NOT_MEASURED
    if name == "seconds_over_retrain":
        return format(value.value if isinstance(value, Estimate) else value, spec)
    if isinstance(value, Estimate):
        return format(value, spec)
    return format(100 * value, spec.replace("%", "f")) if spec.endswith("%") else format(value, spec)


def _chapter(scenario: str, groups: Sequence[Sequence[Line]], check: str) -> Chapter:
    lines = [line for some in groups for line in some]
    if not lines:
        return Chapter(name=scenario, headline="not done yet", done=False)
    plots = {
        f"{scenario}, {said(some[0].sparsity)}: gap against seconds, over {_in_gap(some)}": _plot(some)
        for some in groups
    }
    return Chapter(
        name=scenario,
        headline=headline(lines),
        text=(
            "All methods start from the same originals and forget the same rows. The reference is retraining without "
            "them by the same recipe and coins; a sparse model's mask is found anew.",
            "Retraining that stops early begins a sparse model with the original's mask, which it does not pay for and "
            "which saw the removed rows.",
            *((_HOW_TO_READ,) if any(plots.values()) else ()),
        ),
        grids=tuple(_grid(some) for some in groups),
        plots={caption: svg for caption, svg in plots.items() if svg},
        shows="How far each method is from retraining in these figures, and what it costs, on the same machine.",
        does_not_show="That anything is forgotten: a model that looks like a retrained one to weak attacks may still "
        "remember. How the methods do with other data, networks or settings.",
        check=check,
        data={"lines": [line.to_json() for line in lines]},
    )


def _plot(lines: Sequence[Line]) -> str:
    points, yardstick, nothing = [], [], None
    for line in lines:
        gap = line.figures.get("gap")
        if line.kind == "original" and gap is not None:
            nothing = value_of(line, "gap")
        if gap is None or "seconds" not in line.figures:
            continue
        known = gap if isinstance(gap, Estimate) else Estimate(gap, gap, gap, 1, interval="one seed")
        points.append(Spent(name=line.method, claim=line.claim, gap=known, seconds=value_of(line, "seconds")))
        if "yardstick_gap" in line.figures:
            yardstick.append((value_of(line, "yardstick_seconds"), value_of(line, "yardstick_gap")))
    return gap_against_seconds(points, yardstick, nothing) if points else ""


def _search(result: StudyResult) -> Chapter:
    settings, rows = result.about["settings"], []
    criterion = settings["criterion"]
    for one in result.chosen():
        best = one["best"]
        found = ", ".join(f"{name}={value}" for name, value in best["settings"].items()) if best else NOT_MEASURED
        where = (one["method"], f"{one['scenario']}, {said(one['sparsity'])}", found or "as given")
        value = f"{100 * best['value']:.2f}" if best else NOT_MEASURED
        rows.append((*where, value, str(one["trials"]), str(one["failed"]), f"{one['seconds']:.1f}"))
    nothing = [name for name, space in settings["searched"].items() if not space]
    note = f" Nothing to search: {', '.join(nothing)}." if nothing else ""
    return Chapter(
        name="search",
        headline=f"{settings['trials']} trials for each method, scenario and sparsity, by {settings['criterion']}",
        text=(
            f"Settings were searched in a replica of its own (seed {settings['search_seed']}) and by "
            f"{100 * settings['validation']:g} % of the test rows; no figure is measured on either. The first trial is "
            "the method as it was given; the others are drawn from the ranges in the settings.",
        ),
        grids=(
            Grid(
                caption="What the search chose",
                headers=("method", "where", "settings", f"{criterion}, points", "trials", "failed", "seconds"),
                rows=tuple(rows),
                words=3,
                notes=f"{criterion}: {_CRITERIA[criterion]} failed: trials that gave no model.{note}",
            ),
        ),
        does_not_show="That these are the best settings: a larger budget may find better ones for every method.",
        data={"chosen": list(result.chosen()), "searched": settings["searched"]},
    )


def _missing(result: StudyResult) -> Chapter:
    rows = [
        (one["method"], f"{one['scenario']}, {said(one['sparsity'])}, seed {one['seed']}", one["kind"], one["why"])
        for one in result.not_measured()
    ]
    grid = Grid(
        caption="Not measured", headers=("method", "where", "what", "why"), rows=tuple(dict.fromkeys(rows)), words=4
    )
    return Chapter(
        name="gaps",
        headline=f"{len(rows)} cells were not measured",
        grids=(grid,),
        data={"not_measured": list(result.not_measured())},
    )


def _facts(result: StudyResult) -> dict[str, str]:
    about, undone = result.about, unfinished(result)
    settings, recipe = about["settings"], about["settings"]["recipe"]
    test = "none: test accuracy and attacks are not measured" if about["test"] is None else f"{about['test']['rows']:,}"
    pruned = f"{settings['by']}, {settings['rounds']} rounds, rewound to epoch {settings['rewind']}"
    searched = f"{settings['trials']}, by {settings['criterion']}"
    return {
        **({"unfinished": undone} if undone else {}),
        "training rows": f"{about['records']['rows']:,}",
        "test rows": test,
        "model": f"{recipe['model']}, {recipe['epochs']} epochs",
        "sparsities": ", ".join(f"{one:g}" for one in settings["sparsities"]),
        **({"pruning": pruned} if any(settings["sparsities"]) else {}),
        "seeds": ", ".join(map(str, settings["seeds"])),
        "trials": "1: the methods as given" if settings["trials"] == 1 else searched,
        "equal compute": str(settings["equal_compute"] or NOT_MEASURED),
    }
