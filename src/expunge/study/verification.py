"""Every provider before every verifier, over seeds: who is caught, who passes, and by whom nobody is caught."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator

from expunge.core.coins import child
from expunge.core.digest import sha256_hex
from expunge.core.errors import ExpungeError, Misuse
from expunge.core.estimate import Estimate, proportion
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.learn.loop import Report
from expunge.study.store import Cells, Key, Line, opened
from expunge.study.verification_ground import Ground, Hearing, Maker, Terms
from expunge.study.verification_parties import HONEST, PROVIDERS, VERIFIERS, Verifier

Outcome = Literal["pass", "fail", "inconclusive", "not tried"]


def verification(
    records: Records,
    queries: Records,
    recipe: Recipe,
    *,
    seeds: int = 5,
    providers: Mapping[str, Maker] | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    honest: Sequence[str] = HONEST,
    terms: Terms | None = None,
    rng: Generator,
    keep: Path | None = None,
    progress: Report | None = None,
) -> Matrix:
    """Let every verifier look at every provider.

    In each seed some owners plant secret triggers, a model is trained on everybody's rows, the owners ask to be
    forgotten, and each provider answers in its way. The coins of training, who asks and all triggers are of the seed.

    Args:
        records: rows to train on, of two owners or more.
        queries: rows that nobody trains on, with labels.
        recipe: agreed on; its seed is replaced by each run's. Forging needs plain SGD.
        seeds: how many runs.
        providers: by name; None: all of `verification_parties.PROVIDERS`.
        verifiers: by name; None: all of `verification_parties.VERIFIERS`.
        honest: names of the providers that do what they say.
        terms: how many ask, and what they plant.
        rng: names the coins; nothing is drawn from it.
        keep: folder that every cell is kept in as it is finished; the same call goes on there after a break, and one
            with more seeds adds to it.
        progress: told (what, cells done, cells in all).

    Raises:
        Misuse: for no seed, nobody to look at or to look, or another study's folder.

    Cost: for each seed four trainings, and for each provider two trainings and three full replays. Holds the model
    after every step of one training.
    """
    terms, providers, verifiers = terms or Terms(), providers or PROVIDERS, verifiers or VERIFIERS
    if seeds < 1 or records.classes is None:
        raise Misuse(f"a matrix needs one seed or more, and rows with classes, got {seeds} and {records.classes}")
    held = len(set(records.owners))
    if not 0 < terms.askers < held:
        raise Misuse(f"{terms.askers} of {held} owners cannot ask; give more rows, or have fewer ask")
    about = _about(records, queries, recipe, terms, rng) | {
        "providers": list(providers),
        "verifiers": list(verifiers),
        "honest": [name for name in honest if name in providers],
    }
    with opened(keep, about) as cells:
        for seed in range(seeds):
            run = _Run(records, queries, recipe, terms, child(rng, "seed", seed), cells)
            for place, (name, make) in enumerate(providers.items()):
                if progress is not None:
                    progress(f"seed {seed}, {name}", seed * len(providers) + place, seeds * len(providers))
                run.row(seed, name, make, verifiers)
            run.close()
        return Matrix.of(about, cells.known, seeds)


def some_owners(records: Records, rows: int, rng: Generator) -> Records:
    """All rows of so many owners, drawn by the coins, that they hold `rows` at least; all if there are no more."""
    held = Counter(records.owners)
    names, kept, count = sorted(held), set[str](), 0
    for place in torch.randperm(len(names), generator=child(rng, "some owners")).tolist():
        if count < rows:
            kept.add(names[place])
            count += held[names[place]]
    return records.where(lambda _, owner: owner in kept)


class _Run:
    """One seed; its ground is made only if a cell of it is missing."""

    def __init__(
        self, records: Records, queries: Records, recipe: Recipe, terms: Terms, rng: Generator, cells: Cells
    ) -> None:
        self.given, self.terms, self.rng, self.cells = (records, queries), terms, rng, cells
        self.recipe = replace(recipe, seed=child(rng, "training").initial_seed() >> 1)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def ground(self) -> Ground:
        self._folder = tempfile.TemporaryDirectory(prefix="expunge-matrix-")
        records, queries = self.given
        place = Path(self._folder.name)
        return Ground(clean=records, queries=queries, recipe=self.recipe, terms=self.terms, rng=self.rng, folder=place)

    def row(self, seed: int, name: str, make: Maker, verifiers: Mapping[str, Verifier]) -> None:
        """All verifiers before one provider, kept as one line."""
        key = ("row", seed, name)
        if key in self.cells:
            return
        hearing = Hearing(name=name, make=make, ground=self.ground)
        self.cells.add(key, {"found": {word: _found(hearing, verify) for word, verify in verifiers.items()}})

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _found(hearing: Hearing, verify: Verifier) -> dict[str, Any]:
    try:
        verdict = verify(hearing)
    except ExpungeError as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return {"outcome": "not tried", "check": "", "why": why, "figures": {}}
    return verdict.to_json()


def _about(records: Records, queries: Records, recipe: Recipe, terms: Terms, rng: Generator) -> dict[str, Any]:
    return {
        "rows": len(records),
        "owners": len(set(records.owners)),
        "records": sha256_hex(records.digests().tobytes()),
        "queries": sha256_hex(queries.digests().tobytes()),
        "recipe": recipe.completed(records).to_json(),
        "terms": asdict(terms),
        "seed": rng.initial_seed(),
    }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One provider before one verifier, over seeds.

    Attributes:
        caught: seeds in which the verifier failed it.
        passed: in which it passed.
        inconclusive: in which nothing could be said.
        untried: in which the provider or the verifier could not do its work.
        checks: names of the checks that failed, and why one of them did.
        why: the first reason of a seed that did not pass.
        power_caught: of the seeds that it failed, the least chance, as it computed it, to catch who goes on serving the
            model before; None if it computes none. `power_undecided`: of those in which nothing could be said.
    """

    caught: int
    passed: int
    inconclusive: int
    untried: int
    checks: tuple[str, ...]
    why: str
    power_caught: float | None = None
    power_undecided: float | None = None

    @property
    def tried(self) -> int:
        """Seeds that count."""
        return self.caught + self.passed + self.inconclusive


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What was found, and what follows from it.

    Attributes:
        about: all settings.
        seeds: how many runs.
        rows: by (seed, provider), each verifier's verdict as plain JSON values.
    """

    about: Mapping[str, Any]
    seeds: int
    rows: Mapping[tuple[int, str], Mapping[str, Mapping[str, Any]]]

    @classmethod
    def of(cls, about: Mapping[str, Any], cells: Mapping[Key, Line], seeds: int) -> Matrix:
        """From the cells of a finished run."""
        rows = {
            (int(key[1]), str(key[2])): line["found"]
            for key, line in cells.items()
            if key[0] == "row" and int(key[1]) < seeds
        }
        return cls(about=dict(about), seeds=seeds, rows=rows)

    @property
    def providers(self) -> tuple[str, ...]:
        """In order."""
        return tuple(self.about["providers"])

    @property
    def verifiers(self) -> tuple[str, ...]:
        """In order."""
        return tuple(self.about["verifiers"])

    @property
    def honest(self) -> tuple[str, ...]:
        """Providers that do what they say."""
        return tuple(self.about["honest"])

    @property
    def cheats(self) -> tuple[str, ...]:
        """All others."""
        return tuple(name for name in self.providers if name not in self.honest)

    def cell(self, provider: str, verifier: str) -> Cell:
        """One provider before one verifier."""
        told = [self.rows[seed, provider][verifier] for seed in range(self.seeds)]
        outcomes = [one["outcome"] for one in told]
        failed = [one["check"] for one in told if one["outcome"] == "fail"]
        return Cell(
            caught=outcomes.count("fail"),
            passed=outcomes.count("pass"),
            inconclusive=outcomes.count("inconclusive"),
            untried=outcomes.count("not tried"),
            checks=tuple(dict.fromkeys(name for text in failed for name in text.split(", "))),
            why=next((one["why"] for one in told if one["outcome"] != "pass"), ""),
            power_caught=_least_power(told, "fail"),
            power_undecided=_least_power(told, "inconclusive"),
        )

    def caught_by(self, provider: str) -> tuple[str, ...]:
        """Verifiers that caught this provider in every seed that they tried."""
        cells = {name: self.cell(provider, name) for name in self.verifiers}
        return tuple(name for name, one in cells.items() if one.tried and one.caught == one.tried)

    def escapes(self, provider: str) -> int:
        """Seeds in which some verifier tried this provider, and none caught it."""
        told = [{one["outcome"] for one in self.rows[seed, provider].values()} for seed in range(self.seeds)]
        return sum(outcomes != {"not tried"} and "fail" not in outcomes for outcomes in told)

    @property
    def untried(self) -> tuple[str, ...]:
        """Cheats that were never tried, as this recipe or these rows do not allow them."""
        return tuple(who for who in self.cheats if not any(self.cell(who, name).tried for name in self.verifiers))

    @property
    def uncaught(self) -> tuple[str, ...]:
        """Cheats that were tried, and that no verifier caught, in some seed."""
        return tuple(name for name in self.cheats if self.escapes(name))

    def accusations(self, verifiers: Sequence[str] | None = None) -> Estimate | None:
        """Share of honest providers accused, over providers and seeds, by any of the verifiers; None of no provider.

        Verdicts of several verifiers on one run count once, so that the runs are what the interval is over.
        """
        names = self.verifiers if verifiers is None else verifiers
        runs = [self.rows[seed, name] for seed in range(self.seeds) for name in self.honest]
        if not runs:
            return None
        return proportion(sum(any(run[one]["outcome"] == "fail" for one in names) for run in runs), len(runs))

    def worth(self, verifier: str) -> str:
        """``accuses honest providers``, ``catches nobody`` or ``fine``: what becomes of who always says the same."""
        wrong = self.accusations([verifier])
        if wrong is not None and wrong.value > 0:
            return "accuses honest providers"
        return "fine" if any(self.cell(name, verifier).caught for name in self.cheats) else "catches nobody"

    @property
    def sound(self) -> bool:
        """No honest provider was accused, and each cheat was caught by somebody in every seed that it was tried in."""
        wrong = self.accusations()
        return not self.uncaught and (wrong is None or wrong.value == 0)

    def to_json(self) -> dict[str, Any]:
        """All as plain JSON values."""
        wrong = self.accusations()
        return {
            "about": dict(self.about),
            "seeds": self.seeds,
            "cells": {who: {name: asdict(self.cell(who, name)) for name in self.verifiers} for who in self.providers},
            "caught_by": {who: list(self.caught_by(who)) for who in self.cheats},
            "uncaught": list(self.uncaught),
            "untried": list(self.untried),
            "accusations": None if wrong is None else wrong.to_json(),
            "worth": {name: self.worth(name) for name in self.verifiers},
            "sound": self.sound,
        }


def _least_power(told: Sequence[Mapping[str, Any]], outcome: Outcome) -> float | None:
    those = [one.get("figures", {}) for one in told if one["outcome"] == outcome]
    return min((one["power"] for one in those if "power" in one), default=None)
