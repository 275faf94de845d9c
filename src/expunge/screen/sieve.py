"""What all screens share: look at the model once, then measure requests by look-ups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Generator, Tensor

from expunge.core.protocols import Judgement
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.screen.asked import Asked, understand
from expunge.screen.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Judged(Judgement):
    """A judgement that knows the score of the whole request that its row came in."""

    whole: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """What a screen measures of one request.

    Attributes:
        rows: (k,) a score for each row, larger for more suspicion.
        whole: the request's one score; what is calibrated.
        flagged: (k,) rows that stand out by the screen's own rule, which is not calibrated.
        reason: of each row, for people; made only when somebody reads it.
    """

    rows: Tensor
    whole: float
    flagged: Tensor
    reason: Callable[[int], str]


class Reader(Protocol):
    """A screen that has looked at a model: measures requests."""

    def __call__(self, asked: Asked) -> Measure:
        """Measure a request of at least one row."""


@dataclass(frozen=True, kw_only=True)
class Sieve(ABC):
    """A screen: `prepare` once for a model, then `judge` as many requests as there are; a call does both."""

    @abstractmethod
    def prepare(self, scene: Scene, *, rng: Generator) -> Reader:
        """Look at the model and its rows. Everything random is drawn here, from names below `rng`."""

    def judge(self, reader: Reader, asked: Asked) -> tuple[Judged, ...]:
        """One judgement a row: the trained ones in the order of the records, then those never trained on."""
        return told(reader, asked)

    def whole(self, judgements: Sequence[Judgement]) -> float:
        """The request's one suspicion score, larger for more; 0 for a request without rows."""
        return whole_of(judgements)

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> tuple[Judged, ...]:
        """One judgement for each requested row; those never trained on come last."""
        asked = understand(trained, records, request)
        if not len(asked):
            return ()
        return self.judge(self.prepare(Scene(trained, records), rng=rng), asked)


def told(reader: Reader, asked: Asked) -> tuple[Judged, ...]:
    """What a reader measures, row by row. Of a replacement the rows never trained on are measured apart, as removed."""
    if not len(asked):
        return ()
    if asked.new is not None and asked.strangers is not None:
        strangers = replace(asked, ids=(), places=asked.places[:0], new=None)
        return told(reader, asked.trained) + told(reader, strangers)
    found = reader(asked)
    rows = zip(asked.names, found.rows.tolist(), found.flagged.tolist(), strict=True)
    return tuple(
        Judged(record=name, score=score, flagged=flag, reason=found.reason(row), whole=found.whole)
        for row, (name, score, flag) in enumerate(rows)
    )


def whole_of(judgements: Sequence[Judgement]) -> float:
    """The whole request's score, as the screen measured it; of judgements that do not say, the largest row's."""
    if not judgements:
        return 0.0
    first = judgements[0]
    return first.whole if isinstance(first, Judged) else max(one.score for one in judgements)
