"""Screens that must be exposed: one sleeps, one cries wolf, and two were told the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator

from expunge.core.protocols import Judgement
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.screen import understand


@dataclass(frozen=True, kw_only=True)
class _Liar:
    """Says the same of every row of a request."""

    def _score(self, records: Records, request: Request, ids: Sequence[str]) -> float:
        raise NotImplementedError

    def whole(self, judgements: Sequence[Judgement]) -> float:
        """The request's score."""
        return max((one.score for one in judgements), default=0.0)

    def __call__(
        self, trained: Trained, records: Records, request: Request, *, rng: Generator
    ) -> tuple[Judgement, ...]:
        """One judgement a row."""
        asked = understand(trained, records, request)
        score = self._score(records, request, asked.ids)
        return tuple(Judgement(record=i, score=score, flagged=score > 0.5, reason="because") for i in asked.names)


@dataclass(frozen=True, kw_only=True)
class FlagsNothing(_Liar):
    """Never sees anything."""

    def _score(self, records: Records, request: Request, ids: Sequence[str]) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class FlagsAll(_Liar):
    """Sees it everywhere."""

    def _score(self, records: Records, request: Request, ids: Sequence[str]) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ReadsLabels(_Liar):
    """Knows which requests of the test are malicious, by their rows."""

    malicious: frozenset[frozenset[str]] = frozenset()

    def _score(self, records: Records, request: Request, ids: Sequence[str]) -> float:
        return float(frozenset(ids) in self.malicious)


@dataclass(frozen=True, kw_only=True)
class ReadsWhoAsked(_Liar):
    """Knows the name under which the test files malicious requests."""

    name: str = "attacker"

    def _score(self, records: Records, request: Request, ids: Sequence[str]) -> float:
        return float(request.asked_by == self.name)
