"""The figures of a study: means over seeds, beside exact retraining and the yardstick of each method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from expunge.audit import Row
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, mean
from expunge.study import store
from expunge.study.cells import Cell, Trial, best
from expunge.study.plan import FLOOR, ORIGINAL, RETRAIN
from expunge.study.store import Key

Figure = Estimate | float
# What a figure can be at all: Student's t knows nothing of it. All others are shares.
_RANGES = {
    **dict.fromkeys(("seconds", "seconds_over_retrain", "yardstick_seconds"), (0.0, math.inf)),
    **dict.fromkeys(("over_yardstick", "over_original"), (-1.0, 1.0)),
}
_OF_ROW = {"unlearning_accuracy": "unlearning_accuracy", "attack": "attack", "retain": "retain", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model in the table of one sparsity and scenario.

    Attributes:
        sparsity: of the original.
        scenario: what was forgotten.
        method: name of the row.
        kind: ``original``, ``retrain``, ``floor`` (retraining with other coins) or ``method``.
        claim: what its maker claims; empty if nothing was measured.
        seeds: how many were measured.
        of: how many were asked for.
        why: why the others were not, without repetition.
        figures: means over the measured seeds with Student's t interval, cut to what the figure can be (shares and
            gaps to [0, 1], differences of gaps to [-1, 1], seconds to >= 0), which `Estimate.interval` then says. Of a
            single seed: accuracies with intervals over rows, the rest without. Accuracies, efficacy and attack as in
            `Cell`; ``gap`` is `Row.mean_gap` to retraining; ``disparity`` the same over unlearning accuracy, efficacy,
            retain and test, as in the field's table; ``tug_of_war``; ``seconds``; ``seconds_over_retrain``;
            ``yardstick_gap`` and ``yardstick_seconds``, those of retraining stopped after as much compute;
            ``over_yardstick`` and ``over_original``, the gap minus the yardstick's and minus the original's, where
            below zero is worth the method's cost. What was not measured is missing.
    """

    sparsity: float
    scenario: str
    method: str
    kind: str
    claim: str
    seeds: int
    of: int
    why: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        figures = {name: one.to_json() if isinstance(one, Estimate) else one for name, one in self.figures.items()}
        return {**vars(self), "why": list(self.why), "figures": figures}


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """All that a study measured.

    Attributes:
        about: the study's settings and digests of its rows, as plain JSON values.
        cells: every model of every seed.
        trials: every candidate of the search.
    """

    about: Mapping[str, Any]
    cells: tuple[Cell, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, about: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> StudyResult:
        """The result of the finished lines of a study's folder, in the order of the settings."""
        kept = list(lines)
        cells = {cell.key: cell for cell in (Cell.from_json(one) for one in kept if one["key"][0] == "cell")}
        trials = tuple(Trial.from_json(one) for one in kept if one["key"][0] == "trial")
        return cls(about=about, cells=tuple(cells.values()), trials=trials)

    @classmethod
    def read(cls, folder: str | Path) -> StudyResult:
        """What the study in this folder has measured so far; nothing is changed. Misuse if there is none."""
        about, lines = store.read(Path(folder))
        return cls.of(about, lines.values())

    def table(self) -> tuple[Line, ...]:
        """One line for each sparsity, scenario and model, in the order of the settings."""
        settings = self.about["settings"]
        groups: dict[tuple[float, str, str], list[Cell]] = {}
        for cell in self.cells:
            if cell.kind != "yardstick":
                groups.setdefault((cell.sparsity, cell.scenario, cell.method), []).append(cell)
        sparsities, scenarios = list(settings["sparsities"]), list(settings["scenarios"])
        ordered = sorted(groups.items(), key=lambda one: (sparsities.index(one[0][0]), scenarios.index(one[0][1])))
        return tuple(self._line(cells, len(settings["seeds"])) for _, cells in ordered)

    def line(self, sparsity: float, scenario: str, method: str) -> Line:
        """One line of the table; Misuse if it is not there."""
        for line in self.table():
            if (line.sparsity, line.scenario, line.method) == (sparsity, scenario, method):
                return line
        raise Misuse(f'the study has no "{method}" for {scenario} at sparsity {sparsity}')

    def _line(self, cells: list[Cell], asked: int) -> Line:
        measured = [cell for cell in cells if cell.row is not None]
        first = cells[0]
        return Line(
            sparsity=first.sparsity,
            scenario=first.scenario,
            method=first.method,
            kind=first.kind,
            claim=next((cell.row.claim for cell in measured if cell.row is not None), ""),
            seeds=len(measured),
            of=asked,
            why=tuple(dict.fromkeys(cell.why for cell in cells if cell.why)),
            figures=_figures([self._of_seed(cell) for cell in measured]),
        )

    def _of_seed(self, cell: Cell) -> dict[str, Figure]:
        """The figures of one model of one seed."""
        row = cell.row
        if row is None:
            return {}
        around = {
            one.kind: one
            for one in self.cells
            if (one.sparsity, one.scenario, one.seed) == (cell.sparsity, cell.scenario, cell.seed)
            and (one.kind in ("retrain", "original") or (one.kind == "yardstick" and one.method == cell.method))
        }
        found: dict[str, Figure | None] = {name: getattr(row, attribute) for name, attribute in _OF_ROW.items()}
        found["efficacy"] = cell.efficacy
        if cell.kind != "original":
            found["seconds"] = row.seconds
        reference = around.get("retrain")
        if reference is not None and reference.row is not None:
            found |= _gaps(cell, row, reference, reference.row, around.get("yardstick"))
            before = around.get("original")
            if cell.kind == "method" and before is not None and before.row is not None:
                found["over_original"] = row.mean_gap(reference.row) - before.row.mean_gap(reference.row)
        return {name: value for name, value in found.items() if value is not None}

    def chosen(self) -> tuple[dict[str, Any], ...]:
        """What the search found for each sparsity, scenario and method: settings, value, and what it took."""
        groups: dict[tuple[float, str, str], list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault((trial.sparsity, trial.scenario, trial.method), []).append(trial)
        return tuple(
            {
                "sparsity": sparsity,
                "scenario": scenario,
                "method": method,
                "trials": len(trials),
                "failed": sum(trial.value is None for trial in trials),
                "best": None if (winner := best(trials)) is None else winner.to_json(),
                "seconds": math.fsum(trial.seconds for trial in trials),
            }
            for (sparsity, scenario, method), trials in groups.items()
        )

    def to_do(self) -> tuple[Key, ...]:
        """Keys of the cells that the settings ask for and that are not there yet, in the order of the work."""
        settings = self.about["settings"]
        rows = [("original", ORIGINAL), ("retrain", RETRAIN), *([("floor", FLOOR)] if settings["floor"] else [])]
        for name in settings["methods"]:
            rows += [("method", name), *([] if settings["equal_compute"] is None else [("yardstick", name)])]
        places = product(settings["sparsities"], settings["seeds"], settings["scenarios"])
        known = {cell.key for cell in self.cells}
        keys = (("cell", sparsity, scenario, seed, *row) for sparsity, seed, scenario in places for row in rows)
        return tuple(key for key in keys if key not in known)

    def not_measured(self) -> tuple[dict[str, Any], ...]:
        """Every cell without a model, with the reason."""
        missing = [cell for cell in self.cells if cell.row is None]
        names = ("sparsity", "scenario", "seed", "method", "kind", "why")
        return tuple({name: getattr(cell, name) for name in names} for cell in missing)

    def to_json(self) -> dict[str, Any]:
        """Settings, means, what was chosen and what was not measured, and every cell and trial."""
        return {
            **self.about,
            "lines": [line.to_json() for line in self.table()],
            "chosen": list(self.chosen()),
            "not_measured": list(self.not_measured()),
            "cells": [cell.to_json() for cell in self.cells],
            "trials": [trial.to_json() for trial in self.trials],
        }


def _gaps(cell: Cell, row: Row, reference: Cell, full: Row, yardstick: Cell | None) -> dict[str, Figure | None]:
    gap = row.mean_gap(full)
    found: dict[str, Figure | None] = {"gap": gap, "tug_of_war": row.tug_of_war(full)}
    if cell.efficacy is not None and reference.efficacy is not None:
        gaps = row.gaps(full)
        three = [gaps[name] for name in ("forget", "retain", "test") if name in gaps]
        found["disparity"] = math.fsum([*three, abs(cell.efficacy.value - reference.efficacy.value)]) / (1 + len(three))
    if cell.kind != "original":
        found["seconds_over_retrain"] = row.seconds / full.seconds
    if yardstick is not None and yardstick.row is not None:
        found["yardstick_gap"] = yardstick.row.mean_gap(full)
        found["yardstick_seconds"] = yardstick.row.seconds
        found["over_yardstick"] = gap - yardstick.row.mean_gap(full)
    return found


def _figures(seeds: list[dict[str, Figure]]) -> dict[str, Figure]:
    """Means over seeds; of a figure that one seed alone has, the figure itself."""
    found: dict[str, Figure] = {}
    for name in dict.fromkeys(name for seed in seeds for name in seed):
        values = [seed[name] for seed in seeds if name in seed]
        plain = [one.value if isinstance(one, Estimate) else one for one in values]
        found[name] = _cut(mean(plain), *_RANGES.get(name, (0.0, 1.0))) if len(plain) > 1 else values[0]
    return found


def _cut(found: Estimate, least: float, most: float) -> Estimate:
    """The interval within what the figure can be; it says so where that changed it."""
    low, high = max(least, found.low), min(most, found.high)
    if (low, high) == (found.low, found.high):
        return found
    within = f"[{least:g}, {most:g}]" if math.isfinite(most) else f">= {least:g}"
    return replace(found, low=low, high=high, interval=f"{found.interval}, cut to {within}")
