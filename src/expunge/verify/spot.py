"""Which segments of a transcript to replay, and the chance that a choice misses all faulty ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator

from expunge.core import coins
from expunge.core.errors import Misuse, UnreadableFile
from expunge.verify.states import distance
from expunge.verify.transcript import Transcript


class Budget(Protocol):
    """Chooses among the segments of a transcript."""

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """Indices into `Transcript.segments`."""


@dataclass(frozen=True)
class All:
    """Every segment: a full replay."""

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """All indices."""
        return frozenset(range(len(transcript.segments)))


@dataclass(frozen=True)
class Random:
    """`count` segments drawn without replacement; draw them only after the transcript's commitment is public.

    A forger who leaps once, from an honest beginning to the old model, has one faulty segment, and `count` of n find
    it with chance ``count / n``. The leap is a large update: use `Both` with `TopQ`.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise Misuse(f"at least one segment must be drawn, got {self.count}")

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """So many random indices, from a generator that the provider could not foresee."""
        own = coins.child(rng, "spot checks", transcript.commitment)
        drawn = torch.randperm(len(transcript.segments), generator=own)[: self.count]
        return frozenset(drawn.tolist())


@dataclass(frozen=True)
class TopQ:
    """The `count` segments whose checkpoints lie farthest apart. Alone it can be gamed: a forger keeps these honest.

    Cost: reads every checkpoint once.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise Misuse(f"at least one segment must be replayed, got {self.count}")

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """Indices of the largest updates; NaN, or a file that cannot be read, counts as largest."""
        sizes = []
        for begin, end in transcript.segments:
            try:
                sizes.append(distance(transcript.checkpoint(begin), transcript.checkpoint(end), "parameter"))
            except UnreadableFile:
                sizes.append(math.inf)
        order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        return frozenset(order[: self.count])


@dataclass(frozen=True)
class Both:
    """What any of several budgets chooses, such as ``Both((TopQ(2), Random(4)))``."""

    budgets: Sequence[Budget]

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """The union."""
        return frozenset().union(*(budget.choose(transcript, rng=rng) for budget in self.budgets))


def chance_of_missing(segments: int, faulty: int, drawn: int) -> float:
    """Chance that `drawn` of `segments`, drawn without replacement, hold none of the `faulty` ones (hypergeometric).

    At most ``(1 - faulty / segments) ** drawn``.

    Raises:
        Misuse: if there are fewer segments than are faulty, or negative numbers.
    """
    if not 0 <= faulty <= segments or drawn < 0:
        raise Misuse(f"need 0 <= faulty <= segments and drawn >= 0, got {faulty}, {segments} and {drawn}")
    drawn = min(drawn, segments)
    return math.comb(segments - faulty, drawn) / math.comb(segments, drawn)
