"""The binomial test with rates that were measured: what was not known beforehand is counted into the errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from expunge.core.errors import Misuse
from expunge.verify.binomial import BinomialTest, lower, upper


@dataclass(frozen=True, kw_only=True)
class CountedTest:
    """`BinomialTest` with q and p out of counts, and errors that hold for the whole procedure.

    A false accusation (at most alpha) is one of three things, and alpha is split between them. The owner's trigger is
    luckier than every control, though all are drawn alike: 1 / (m + 1) for m controls. The luckiest control's rate is
    above its Clopper-Pearson bound: half of what is left. There are k* hits in spite of all: the other half. The bound
    used is the highest of all controls; that it covers the luckiest needs no further division, as which one is the
    luckiest is not chosen by the counts. A miss (at most beta) is one of two: p is below its bound, or there are fewer
    than k* hits; half of beta each.

    With one control (or hits pooled over controls, as is often done) it cannot be valid: q differs between triggers.

    Attributes:
        controls: hits of each control, triggers drawn like the owner's and never trained, on the model that is judged:
            there alone are they its like. That rates are no higher after is an assumption, if they are of before.
        each: random queries that each control was asked on.
        before: hits of the owner's trigger on the model before.
        asked: random queries that it was asked on.
        n: random queries to be asked after.
        alpha: false accusations at most; more than 1 / (m + 1).
        beta: misses at most, if the model after obeys the trigger as well as the one before.
    """

    controls: tuple[int, ...]
    each: int
    before: int
    asked: int
    n: int
    alpha: float = 1e-3
    beta: float = 1e-3

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and 0 < self.beta < 1):
            raise Misuse(f"alpha and beta must lie between 0 and 1, got {self.alpha} and {self.beta}")
        if min(self.each, self.asked, self.n) < 1 or not 0 <= self.before <= self.asked:
            raise Misuse(f"needs queries, and hits from 0 to their number, got {self.before} of {self.asked}")
        if not self.controls or not 0 <= min(self.controls) <= max(self.controls) <= self.each:
            raise Misuse(f"each control needs from 0 to {self.each} hits, got {self.controls[:5]}")
        if self._left <= 0:
            raise Misuse(
                f"alpha = {self.alpha:g} takes more than {1 / self.alpha - 1:,.0f} controls, got fewer or as many"
            )

    @property
    def _left(self) -> float:
        return self.alpha - 1 / (len(self.controls) + 1)

    @property
    def q_high(self) -> float:
        """Bound on the rate of a trigger that was never trained."""
        return upper(max(self.controls), self.each, self._left / 2)

    @property
    def p_low(self) -> float:
        """Bound on the rate of the owner's trigger on the model before."""
        return lower(self.before, self.asked, self.beta / 2)

    @cached_property
    def test(self) -> BinomialTest:
        """The test at the bounds, at the alpha that is left to it."""
        return BinomialTest(n=self.n, q=self.q_high, p=self.p_low, alpha=self._left / 2)

    @property
    def missed(self) -> float:
        """Bound on the misses."""
        return min(1.0, self.beta / 2 + self.test.beta)

    def decide(self, k: int) -> Literal["pass", "fail", "inconclusive"]:
        """Of k hits after deletion: fail, the trigger still works; pass, it would have been noticed if it did."""
        if self.p_low <= self.q_high:
            return "inconclusive"
        if self.test.accuses(k):
            return "fail"
        return "pass" if self.missed <= self.beta else "inconclusive"
