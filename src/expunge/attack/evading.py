"""An attacker that knows the screens and asks them, over and over, until something harmful passes.

A screen that is judged only on attacks that do not know it is not judged. This one has a copy of the provider's
screening, model and data, as an insider would, and searches for the most harm that is let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, Protocol

from torch import Generator

from expunge.attack.wares import Wares, alike, halved, offered
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Attack, Judgement, Method, Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained


class Decided(Protocol):
    """What a screening says of a request."""

    @property
    def action(self) -> str:
        """``carry out`` if the request goes through as it is."""

    @property
    def hold(self) -> bool:
        """Whether a person looks first."""

    @property
    def p_values(self) -> Mapping[str, float] | Sequence[float]:
        """One a screen: small is suspicious."""

    @property
    def judgements(self) -> Any:
        """Of each screen, one `Judgement` a requested row: a mapping or a sequence of them."""


class Asked(Protocol):
    """A screening, which the attacker can call as often as it likes."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Decided:
        """Judge one request."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evasion:
    """What a search came to.

    Attributes:
        requests: what passes, in order; empty if nothing harmful did.
        promised: predicted change of the adversary's loss by all of them, cover included; below 0 helps the attacker.
        unscreened: the same for the strongest rows of the budget, had nobody looked.
        queries: how often the screening was asked.
        trick: which variant won, in words.
    """

    requests: tuple[Request, ...]
    promised: float
    unscreened: float
    queries: int
    trick: str


@dataclass(frozen=True, kw_only=True)
class Evading:
    """The requests with the most predicted effect among those that a known screening lets through.

    Tried, each at every size in a halving series and with every share of cover: the strongest rows; rows that lie
    close to the strongest one (a screen that looks for isolated rows overlooks a group); and mild rows, which are each
    weaker but not outstanding. Of an inner attack that replaces rows: its replacements, and the same half as far from
    the rows that they replace. A request that is stopped loses its most suspicious rows, and is tried again. Rows are
    spread over as many requests as the budget needs, filled up with rows that do next to nothing (cover). What passes
    is counted by its first-order effect on the target. The plan with the most is filed.

    Every request is asked about `confirm` times with fresh coins and must pass each time. All are judged as if the
    model were still the one now: a screening that keeps count over requests, or sees the model change, may catch later
    ones. Coins come from `rng`: give it a seed that the calibration never saw.

    Cost: up to `queries` calls of the screening, and what `Victim.effects` costs.

    Attributes:
        screening: the provider's, known to the attacker.
        budget: harmful rows at most, over all requests.
        inner: an attack whose first rows are taken, in its order, instead of the strongest by influence; it must file
            removals by id, or replacements.
        covers: rows of cover for each harmful one that are tried.
        queries: calls of the screening at most.
        confirm: times that a request must pass.
        least: p-value that every screen must stay at or above; None: the decision alone counts.
    """

    screening: Asked
    budget: int = 20
    inner: Attack | None = None
    covers: tuple[float, ...] = (0.0, 1.0, 3.0)
    queries: int = 200
    confirm: int = 1
    least: float | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "queries", "confirm"):
            if getattr(self, name) < 1:
                raise Misuse(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.covers or min(self.covers) < 0:
            raise Misuse(f"covers must be shares >= 0, got {self.covers}")
        if self.least is not None and not 0 <= self.least <= 1:
            raise Misuse(f"least is a p-value between 0 and 1, got {self.least}")

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> Records | None:
        """What the inner attack brings; nothing without one."""
        return None if self.inner is None else self.inner.contribute(records, target, rng=rng)

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """The best requests that pass; none if nothing does. See `search`."""
        return self.search(trained, records, target, through=through, rng=rng).requests

    def search(self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator) -> Evasion:
        """Search, and say what it took.

        Raises:
            Misuse: for a target that the model cannot be asked about, an inner attack that files other than removals
                by id or replacements, or a budget that leaves no row.
        """
        filed = None
        if self.inner is not None:
            filed = self.inner.requests(trained, records, target, through=through, rng=child(rng, "inner"))
        plain = offered(trained, records, target, through, filed)
        if self.budget >= len(plain.effects):
            raise Misuse(f"the budget is {self.budget} of {len(plain.effects)} rows; leave some to train on")
        oracle = _Oracle(self, trained, records, rng)
        best: tuple[Request, ...] = ()
        promised, won = 0.0, "nothing passed"
        for trick, size, cover in product(self._variants(plain, trained, target, through), self._sizes(), self.covers):
            if oracle.left < self.confirm:
                break
            name, wares = trick
            passed, gain = self._passing(wares, size, cover, oracle)
            if gain < promised:
                best, promised, won = passed, gain, f"{name}, {size} rows a request, {cover:g} of cover for each"
        unscreened = sum(plain.effects[name] for name in plain.ranked[: self.budget])
        return Evasion(requests=best, promised=promised, unscreened=unscreened, queries=oracle.asked, trick=won)

    def _sizes(self) -> list[int]:
        return [self.budget >> halvings for halvings in range(self.budget.bit_length())]

    def _variants(self, plain: Wares, trained: Trained, target: Target, through: Method) -> list[tuple[str, Wares]]:
        """What is tried, each with up to twice the budget of harmful rows."""
        twice = 2 * self.budget
        found = [("strongest", replace(plain, ranked=plain.ranked[:twice]))]
        if plain.moved is not None:
            half = halved(plain, trained, target, through)
            return [*found, ("half as far", replace(half, ranked=half.ranked[:twice]))]
        mild = plain.ranked[self.budget : self.budget + twice]
        return [*found, ("alike", replace(plain, ranked=alike(plain, twice))), ("mild", replace(plain, ranked=mild))]

    def _passing(self, wares: Wares, size: int, cover: float, oracle: _Oracle) -> tuple[tuple[Request, ...], float]:
        """Requests of up to `size` harmful rows that pass, and what they promise.

        Until the budget, the rows or the questions run out, or three in a row come to nothing.
        """
        passed: list[Request] = []
        waiting, quiet, filed, failures, gain = list(wares.ranked), iter(wares.quiet), 0, 0, 0.0
        while waiting and filed < self.budget and oracle.left >= self.confirm and failures < 3:
            rows = waiting[: min(size, self.budget - filed)]
            waiting = waiting[len(rows) :]
            filler = list(islice(quiet, round(cover * len(rows))))
            kept = oracle.thinned(wares, rows, filler)
            failures = 0 if kept else failures + 1
            if kept:
                passed.append(wares.request(kept + filler))
                filed += len(kept)
                gain += sum(wares.effects[name] for name in kept + filler)
        return tuple(passed), gain


@dataclass(eq=False)
class _Oracle:
    """The screening, with a count of how often it was asked."""

    attack: Evading
    trained: Trained
    records: Records
    rng: Generator
    asked: int = 0

    @property
    def left(self) -> int:
        return self.attack.queries - self.asked

    def thinned(self, wares: Wares, rows: list[str], filler: list[str]) -> list[str]:
        """The rows that pass with their cover: all, or those left when the most suspicious half goes, and again."""
        while rows and self.left >= self.attack.confirm:
            suspicion = self._suspicion(wares.request(rows + filler))
            if suspicion is None:
                return rows
            rows = sorted(rows, key=lambda name: (suspicion.get(name, 0.0), rows.index(name)))[: len(rows) // 2]
        return []

    def _suspicion(self, request: Request) -> dict[str, float] | None:
        """None if the request passes every time; else how suspicious each row is, by its worst rank in any screen."""
        for _ in range(self.attack.confirm):
            self.asked += 1
            coins = child(self.rng, "asked", self.asked)
            decided = self.attack.screening(self.trained, self.records, request, rng=coins)
            if not self._passes(decided):
                return _ranks(decided)
        return None

    def _passes(self, decided: Decided) -> bool:
        values, least = decided.p_values, self.attack.least
        found = list(values.values()) if isinstance(values, Mapping) else list(values)
        fine = least is None or all(value >= least for value in found)
        return decided.action == "carry out" and not decided.hold and fine


def _ranks(decided: Decided) -> dict[str, float]:
    """Of each row the worst of its ranks over screens, 0 for the least suspicious; flagged rows above all others."""
    screens = decided.judgements
    worst: dict[str, float] = {}
    for judgements in screens.values() if isinstance(screens, Mapping) else screens:
        ordered: list[Judgement] = sorted(judgements, key=lambda one: one.score)
        for place, one in enumerate(ordered):
            rank = place / len(ordered) + float(one.flagged)
            worst[one.record] = max(worst.get(one.record, 0.0), rank)
    return worst
