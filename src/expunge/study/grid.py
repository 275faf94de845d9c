"""Carrying a study out, cell by cell, so that an interruption costs one cell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from expunge.audit import Answers, measure, mia_efficacy
from expunge.core.coins import child, generator
from expunge.core.errors import Impossible, Misuse, NothingChanged, Stopped, Unsupported
from expunge.core.protocols import Unlearned
from expunge.core.records import Records
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import Report, warm_up
from expunge.learn.pruning import mask_of_zeros, prunable
from expunge.learn.training import train
from expunge.study.cells import Cell, Kind, Trial, best
from expunge.study.plan import FLOOR, ORIGINAL, RETRAIN, Study
from expunge.study.scenario import Scenario
from expunge.study.search import Goal, drawn, settings_of, with_settings
from expunge.study.store import Cells, opened
from expunge.study.summary import StudyResult
from expunge.unlearn import Method, Retrain, RetrainBriefly

_FAILURES = (Unsupported, Impossible, NothingChanged, Misuse)


def run_study(
    study: Study,
    records: Records,
    test: Records | None = None,
    *,
    folder: str | Path | None = None,
    report: Report | None = None,
) -> StudyResult:
    """Carry a study out, or go on with it.

    Args:
        study: what to compare.
        records: the training rows.
        test: rows that nothing is trained on; without them, test accuracy and attacks are not measured.
        folder: where each finished cell is kept; the same call goes on with what is there. None keeps nothing.
        report: told (what, cells done, cells in all).

    Returns:
        Every cell and trial, with the means over seeds.

    Raises:
        Misuse: before any work, if the folder is another study's, or a scenario does not fit the records.
        Unsupported: before any work, if there is nothing to prune in such a model.
        Stopped: at a keyboard interrupt; what is finished is kept.
        BadRecipe: if an original or a retraining diverges.

    Cost: for each sparsity and seed a training; for each scenario of it a retraining and each method, with a yardstick
    that takes as long. A search adds one more replica, with `trials` runs of each method. No model is kept on disk.
    """
    records.digests()  # once, so that all selections share them
    scenarios = study.chosen_scenarios
    for seed in (*study.seeds, *([study.search_seed] if study.trials > 1 else [])):
        for scenario in scenarios:
            scenario.request(records, int(seed or 0))
    if any(study.sparsities):
        prunable(build(study.recipe_of(max(study.sparsities), study.seeds[0]).completed(records)))
    aside, measured = study.held_out(test)
    about = study.about(records, test)
    with opened(None if folder is None else Path(folder), about) as cells:
        run = _Run(study, records, test, aside, measured, cells, report or (lambda *_: None))
        try:
            run.go()
        except KeyboardInterrupt:
            if folder is None:
                raise
            done = f"{len(cells.known)} of {run.total} cells are finished and kept in {folder}"
            raise Stopped(f"interrupted: {done}; go on with the same command") from None
        return StudyResult.of(about, cells.known.values())


class _Replica:
    """An original of one sparsity and seed, trained when it is first needed, and what is forgotten from it."""

    def __init__(self, run: _Run, sparsity: float, seed: int) -> None:
        self.run, self.sparsity, self.seed = run, sparsity, seed
        self.seconds = 0.0

    @cached_property
    def original(self) -> Trained:
        self.run.tell(f"train: {_said(self.sparsity)}, seed {self.seed}")
        warm_up()
        started = time.perf_counter()
        study = self.run.study
        trained = train(study.recipe_of(self.sparsity, self.seed), self.run.records, keep=study.keep)
        self.seconds = time.perf_counter() - started
        return trained


class _Removal:
    """A scenario in a replica: the request, which is the same for all methods."""

    def __init__(self, replica: _Replica, scenario: Scenario) -> None:
        self.replica, self.scenario = replica, scenario

    @cached_property
    def request(self) -> Request:
        return self.scenario.request(self.replica.run.records, self.replica.seed)

    @cached_property
    def split(self) -> Split:
        return self.request.split(self.replica.run.records)

    def ask(self, method: Method) -> Unlearned:
        rng = child(generator(self.replica.seed), "study", self.scenario.name)
        return method(self.replica.original, self.replica.run.records, self.request, rng=rng)


class _Run:
    """One call of `run_study`."""

    def __init__(
        self,
        study: Study,
        records: Records,
        test: Records | None,
        aside: Records | None,
        measured: Records | None,
        cells: Cells,
        report: Report,
    ) -> None:
        self.study, self.records, self.cells, self.report = study, records, cells, report
        self.aside, self.measured = aside, measured
        self.answers = Answers(records, *([] if test is None else [test]))
        rows = 2 + study.floor + len(study.named) * (1 if study.equal_compute is None else 2)
        searched = sum(map(study.trials_of, study.named))
        self.total = len(study.sparsities) * len(study.chosen_scenarios) * (rows * len(study.seeds) + searched)

    def tell(self, what: str) -> None:
        self.report(what, len(self.cells.known), self.total)

    def go(self) -> None:
        for sparsity in self.study.sparsities:
            chosen = self._search(sparsity)
            for seed in self.study.seeds:
                replica = _Replica(self, sparsity, seed)
                for scenario in self.study.chosen_scenarios:
                    self._measure_all(_Removal(replica, scenario), chosen)
        self.tell("finished")

    def _search(self, sparsity: float) -> dict[tuple[str, str], Method]:
        """The method to measure, for each scenario and name: with the settings that the search found best."""
        replica = _Replica(self, sparsity, int(self.study.search_seed or 0))
        chosen = {}
        for scenario in self.study.chosen_scenarios:
            removal = _Removal(replica, scenario)
            judge = _judge(self, removal)
            for name, method in self.study.named.items():
                trials = [self._trial(removal, name, k, judge) for k in range(self.study.trials_of(name))]
                winner = best(trials)
                chosen[scenario.name, name] = with_settings(method, winner.settings) if winner else method
        return chosen

    def _trial(self, removal: _Removal, name: str, number: int, judge: _Judge) -> Trial:
        method, replica, scenario = self.study.named[name], removal.replica, removal.scenario
        settings = drawn(method, name, number, replica.seed)
        trial = Trial(sparsity=replica.sparsity, scenario=scenario.name, method=name, number=number, settings=settings)
        if trial.key in self.cells:
            return Trial.from_json(self.cells[trial.key])
        self.tell(f"search: {_said(replica.sparsity)}, {scenario.name}: {name} {number + 1} of {self.study.trials}")
        replica.original  # noqa: B018  # trained outside the try below, for what is wrong with it is no candidate's fault
        try:
            answer = removal.ask(with_settings(method, settings))
        except _FAILURES as error:
            trial = replace(trial, why=str(error))
        else:
            value, figures = judge(answer.trained)
            trial = replace(trial, value=value, figures=figures, seconds=answer.cost.seconds)
        self.cells.add(trial.key, trial.to_json())
        return trial

    def _measure_all(self, removal: _Removal, chosen: dict[tuple[str, str], Method]) -> None:
        replica = removal.replica

        def once(method: str, kind: Kind, work: Callable[[Cell], Cell]) -> Cell:
            cell = Cell(
                sparsity=replica.sparsity, scenario=removal.scenario.name, seed=replica.seed, method=method, kind=kind
            )
            if cell.key in self.cells:
                return Cell.from_json(self.cells[cell.key])
            what = method if kind != "yardstick" else f"retrain as long as {method}"
            self.tell(f"{_said(cell.sparsity)}, seed {cell.seed}, {cell.scenario}: {what}")
            replica.original  # noqa: B018  # its training is no part of the cell's work
            cell = work(cell)
            self.cells.add(cell.key, cell.to_json())
            return cell

        once(ORIGINAL, "original", lambda cell: self._original(cell, removal))
        full = once(RETRAIN, "retrain", lambda cell: self._answer(cell, removal, Retrain()))
        if self.study.floor:
            once(FLOOR, "floor", lambda cell: self._answer(cell, removal, Retrain(coins="fresh")))
        for name in self.study.named:
            method = chosen[removal.scenario.name, name]
            done = once(name, "method", lambda cell, method=method: self._try(cell, removal, method))  # type: ignore[misc]
            if self.study.equal_compute is not None:
                once(name, "yardstick", lambda cell, done=done: self._yardstick(cell, removal, done, full))  # type: ignore[misc]

    def _original(self, cell: Cell, removal: _Removal) -> Cell:
        cell = self._measured(cell, removal, removal.replica.original, "not unlearned", 0.0)
        return replace(cell, original_seconds=removal.replica.seconds)

    def _try(self, cell: Cell, removal: _Removal, method: Method) -> Cell:
        try:
            return self._answer(cell, removal, method)
        except _FAILURES as error:
            return replace(cell, why=str(error), settings=settings_of(method))

    def _answer(self, cell: Cell, removal: _Removal, method: Method) -> Cell:
        answer = removal.ask(method)
        claim = f"{answer.claim.value}, {answer.exactness}" if answer.exactness else answer.claim.value
        cell = self._measured(cell, removal, answer.trained, claim, answer.cost.seconds)
        log = answer.trained.log
        steps = log.steps if log is not None and isinstance(method, Retrain) else 0
        return replace(cell, settings=settings_of(method), steps=steps, gradients=answer.cost.gradients)

    def _yardstick(self, cell: Cell, removal: _Removal, done: Cell, full: Cell) -> Cell:
        """Retraining that stops when it has cost as much as the method did; exact retraining itself if that is less.

        A pruned model's begins with the original's mask, so that it makes the last training only, and never more
        steps than that has.
        """
        if done.row is None or full.row is None:
            return replace(cell, why=f"there is no time to compare with: {done.why}")
        spent, whole = done.row.seconds, full.row.seconds
        if self.study.equal_compute == "gradients":
            spent, whole = done.gradients, full.gradients
        affordable = max(1, round(full.steps * spent / whole))
        if affordable >= full.steps:
            return replace(full, kind="yardstick", method=cell.method)
        recipe, rows = removal.replica.original.recipe, len(removal.split.retain)
        affordable = min(affordable, recipe.epochs * math.ceil(rows / recipe.batch_size))
        return replace(self._answer(cell, removal, RetrainBriefly(steps=affordable)), steps=affordable)

    def _measured(self, cell: Cell, removal: _Removal, trained: Trained, claim: str, seconds: float) -> Cell:
        split, test = removal.split, self.measured
        row = measure(
            trained,
            split.forget,
            split.retain,
            test,
            method=cell.method if cell.kind != "yardstick" else f"(retrain, as long as {cell.method})",
            claim=claim,
            seconds=seconds,
            ask=self.answers,
        )
        efficacy = None
        if test is not None:
            efficacy = mia_efficacy(trained, split.forget, split.retain, test, ask=self.answers)
        return replace(cell, row=row, efficacy=efficacy, sparsity_found=_sparsity(trained))


_Judge = Callable[[Trained], tuple[float, dict[str, float]]]


def _judge(run: _Run, removal: _Removal) -> _Judge:
    """The search's criterion on the validation rows; what it needs is made at the first call."""
    made: list[_Judge] = []

    def judge(candidate: Trained) -> tuple[float, dict[str, float]]:
        if not made:
            made.append(_by_oracle(run, removal) if run.study.criterion == "oracle" else _by_goal(run, removal))
        return made[0](candidate)

    return judge


def _by_goal(run: _Run, removal: _Removal) -> _Judge:
    split, replica = removal.split, removal.replica
    if run.aside is None:
        raise Misuse("there are no validation rows to search by; give test rows")
    goal = Goal(replica.original, split.forget, split.retain, run.aside, replica.seed)

    def judge(candidate: Trained) -> tuple[float, dict[str, float]]:
        figures = goal.figures(candidate)
        return goal.value(figures), figures

    return judge


def _by_oracle(run: _Run, removal: _Removal) -> _Judge:
    run.tell(f"search: retrain {removal.scenario.name}")
    split = removal.split
    reference = measure(removal.ask(Retrain()).trained, split.forget, split.retain, run.aside, method=RETRAIN)

    def judge(candidate: Trained) -> tuple[float, dict[str, float]]:
        row = measure(candidate, split.forget, split.retain, run.aside, method="candidate")
        return row.mean_gap(reference), row.gaps(reference)

    return judge


def _sparsity(trained: Trained) -> float | None:
    try:
        return mask_of_zeros(trained.module).sparsity
    except Unsupported:  # nothing but a head
        return None


def _said(sparsity: float) -> str:
    return f"{100 * sparsity:g} % sparse" if sparsity else "dense"
