"""Which segments of a transcript to replay, and the chance that a choice misses all faulty ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator

from expunge.core import coins
from expunge.core.errors import Misuse, UnreadableFile
from expunge.verify.states import distance
from expunge.verify.transcript import Transcript


class Chosen(frozenset[int]):
    """Segments to replay. What may be missed is reckoned from those alone that nobody could foresee.

    Attributes:
        random: how many were drawn at random among all.
    """

    random: int

    def __new__(cls, segments: Iterable[int], random: int) -> Chosen:
        """These, so many of them drawn."""
        made = super().__new__(cls, segments)
        made.random = random
        return made


class Budget(Protocol):
    """Chooses among the segments of a transcript; what is no `Chosen` counts as foreseen by the provider."""

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """Indices into `Transcript.segments`."""


@dataclass(frozen=True)
class All:
    """Every segment: a full replay."""

    def choose(self, transcript: Transcript, *, rng: Generator) -> Chosen:
        """All indices."""
        return Chosen(range(len(transcript.segments)), len(transcript.segments))


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

    def choose(self, transcript: Transcript, *, rng: Generator) -> Chosen:
        """So many random indices, from a generator that the provider could not foresee."""
        own = coins.child(rng, "spot checks", transcript.commitment)
        drawn = torch.randperm(len(transcript.segments), generator=own)[: self.count]
        return Chosen(drawn.tolist(), len(drawn))


@dataclass(frozen=True)
class TopQ:
    """The `count` segments whose checkpoints lie farthest apart. Alone it can be gamed: a forger keeps these honest.

    Cost: reads every checkpoint once.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise Misuse(f"at least one segment must be replayed, got {self.count}")

    def choose(self, transcript: Transcript, *, rng: Generator) -> Chosen:
        """Indices of the largest updates; NaN, or a file that cannot be read, counts as largest."""
        sizes = []
        for begin, end in transcript.segments:
            try:
                sizes.append(distance(transcript.checkpoint(begin), transcript.checkpoint(end), "parameter"))
            except UnreadableFile:
                sizes.append(math.inf)
        order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        return Chosen(order[: self.count], 0)


@dataclass(frozen=True)
class Both:
    """What any of several budgets chooses, such as ``Both((TopQ(2), Random(4)))``."""

    budgets: Sequence[Budget]

    def choose(self, transcript: Transcript, *, rng: Generator) -> Chosen:
        """The union. Of several `Random` the largest is drawn, and holds the others."""
        chosen = [budget.choose(transcript, rng=rng) for budget in self.budgets]
        return Chosen(frozenset().union(*chosen), max((at_random(one) for one in chosen), default=0))


def at_random(chosen: frozenset[int]) -> int:
    """How many of the chosen segments were drawn at random."""
    return chosen.random if isinstance(chosen, Chosen) else 0


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
