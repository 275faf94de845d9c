"""How many may guess right which of two worlds a score is from: the bound on epsilon behind `falsify`.

Every score guesses a world, and guesses are counted from the most extreme score inwards. In why that bounds epsilon,
``m`` scores are counted, each of the one world or of the other by the toss of a coin that is independent of all others:

1. Two worlds that (epsilon, delta) holds for, in both directions, are made by one map from randomised response that
   gives itself away with chance delta and else tells the truth with chance ``p = e^epsilon / (1 + e^epsilon)``
   (Kairouz, Oh and Viswanath, 2015). So, given all scores, each guess that was not given away is right with chance p
   at most, independently of the others. With j given away at most, the count of right guesses among the first r is at
   most j plus that of r - j tosses of a coin with chance p, for all r at once.
2. The counts are looked at a dozen times or fewer, each time at half as many guesses again. What is refuted is every p
   at which the least of the binomial tails is so small that this has a chance of `tail` at most. That chance is
   computed, as that of a sum of tosses to cross a line, so that looking often costs what it must and no more.
3. What order, sides and middle the guesses have is chosen by scores that are not counted. The coins are a SHA-256 of
   all scores in their order, taken to be as good as coins that know nothing of them. Of the scores that are not
   counted alone they would not be: of a rare event those are hardly ever other than 0, and the coins ever the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import betaincinv, logit

from expunge.core.digest import sha256_hex

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]
_STEP = 0.25  # over the root of the scores: a fixed grid of epsilons, so that one test decides if the truth is passed
_GROWTH = 1.5
_FIRST = 32  # the first look is at so small a share of the guesses
_SHARE = 20  # of the chance of a false alarm, one part in so many is for delta, and one for the coins
_WIDE = 9  # standard deviations of tosses that are followed; what is beyond counts as crossing


@dataclass(frozen=True)
class Found:
    """A refuted epsilon, the figure without allowance for chance where the bound is best, and the scores counted."""

    epsilon: float
    value: float
    counted: int


def counted(n: int, tail: float) -> int:
    """How many scores are counted if each world has n: nearly 2 n, so that the coins seldom ask for more of one.

    They do with a chance of ``tail / 20`` at most, and that is subtracted from `tail`. Never fewer than n.
    """
    return max(n, math.floor(2 * n - float(stats.norm.isf(tail / _SHARE / 4)) * math.sqrt(2 * n)))


def refuted(right: Whole, looks: Whole, m: int, delta: float, tail: float) -> float:
    """The largest epsilon of a grid that counts of right guesses refute; 0 if none.

    Args:
        right: how many were right among the first ``looks`` guesses.
        looks: growing.
        m: scores that were counted, those that made no guess included.
        delta: of the guarantee.
        tail: chance of a false alarm.

    Cost: milliseconds at thousands of guesses; memory in proportion to their square root.
    """
    away = int(stats.binom.isf(tail / _SHARE, m, delta))
    level = tail - float(stats.binom.sf(away, m, delta)) - tail / _SHARE
    left = looks > away
    right, looks = np.maximum(right[left] - away, 0), looks[left] - away
    if not len(looks):
        return 0.0
    surely, at_most = (
        float(logit(np.maximum(_low(right, looks, one).max(), 0.5))) for one in (level / len(looks), level)
    )
    grid = _STEP / math.sqrt(m)
    step = max(math.floor(surely / grid), 0)
    while (step + 1) * grid <= at_most and crossing(right, looks, (step + 1) * grid) <= level:
        step += 1
    return step * grid


def crossing(right: Whole, looks: Whole, epsilon: float) -> float:
    """The chance that coins at this epsilon look as bad as these counts, at one look or another."""
    p = 1 / (1 + math.exp(-epsilon))
    least = float(stats.binom.sf(right - 1, looks, p).min()) * (1 + 1e-9)
    tried = stats.binom.isf(min(least, 1.0), looks, p)[:, None] + np.arange(-1, 3)
    line = tried[np.arange(len(looks)), (stats.binom.sf(tried - 1, looks[:, None], p) <= least).argmax(1)].astype(int)
    below, start, before = np.ones(1), 0, 0
    for votes, bar in zip(looks, line, strict=True):
        tosses = int(votes - before)
        middle, width = tosses * p, _WIDE * math.sqrt(tosses * p * (1 - p)) + 3 * _WIDE
        few, many = max(0, math.floor(middle - width)), min(tosses, math.ceil(middle + width))
        below = np.convolve(below, stats.binom.pmf(np.arange(few, many + 1), tosses, p))
        start, before = start + few, int(votes)
        below = below[: max(bar - start, 0)]
        if not len(below):
            return 1.0
    return 1 - float(below.sum())


def tally(scores: Numbers, ours: NDArray[np.bool_], middle: float, sides: str) -> tuple[Whole, Whole]:
    """Counts of right guesses and of all, at every look. A score from the middle up guesses the one world (`ours`).

    Scores that are equal are counted in the order that they come in.
    """
    order = np.argsort(scores, kind="stable")
    above = ours[order][scores[order] >= middle][::-1] if sides != "below" else np.zeros(0, bool)
    below = ~ours[order][scores[order] < middle] if sides != "above" else np.zeros(0, bool)
    sums = [np.concatenate([[0], np.cumsum(side)]) for side in (above, below)]
    deepest = max(len(above), len(below))
    if not deepest:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first = max(deepest / _FIRST, 1.0)
    steps = math.ceil(math.log(deepest / first) / math.log(_GROWTH))
    depths = np.unique(np.minimum(np.ceil(first * _GROWTH ** np.arange(steps + 1)).astype(np.int64), deepest))
    right = sum(total[np.minimum(depths, len(total) - 1)] for total in sums)
    looks = sum(np.minimum(depths, len(total) - 1) for total in sums)
    return np.asarray(right, np.int64), np.asarray(looks, np.int64)


def _low(right: Whole, looks: Whole, tail: float) -> Numbers:
    return np.where(right > 0, betaincinv(np.maximum(right, 0.5), looks - right + 1, tail), 0.0)


def _spoilt(share: Numbers, looks: Whole, m: int, delta: float) -> Numbers:
    """The epsilon of a share of right guesses, less those that delta may have given away."""
    left = np.maximum(share - delta * m / looks, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Numbers = np.log(left) - np.log1p(-share)
    return np.where(left > 0, np.maximum(found, 0), 0.0)


def plan(one: Numbers, other: Numbers, delta: float, tail: float) -> tuple[float, float, str]:
    """Sign of the scores, middle and sides of the guesses that these scores, which are not counted, speak for.

    Both sides, by the sum of ranks, unless another plan has the better bound on these scores alone.
    """
    scores, ours = np.concatenate([one, other]), np.repeat([True, False], [len(one), len(other)])
    ranks = stats.rankdata(scores)
    usual = 1.0 if ranks[: len(one)].mean() >= (len(one) + len(other) + 1) / 2 else -1.0
    best, choice = -1.0, (usual, 0.0, "both")
    for sign, sides in [(s, side) for side in ("both", "above", "below") for s in (usual, -usual)]:
        middle = sign * (float(np.median(one)) / 2 + float(np.median(other)) / 2)
        right, looks = tally(sign * scores, ours, middle, sides)
        known = _spoilt(_low(right, looks, tail / max(len(looks), 1)), looks, len(scores), delta)
        found = float(known.max(initial=0.0))
        if found > best:
            best, choice = found, (sign, middle, sides)
    return choice


def bound(held: tuple[Numbers, ...], apart: tuple[Numbers, ...], delta: float, tail: float) -> Found:
    """What these scores of two worlds refute, by the plan that the scores apart make.

    Args:
        held: scores of the one world and of the other, independent of each other and of those apart.
        apart: the same, never counted.
        delta: of the guarantee.
        tail: chance of a false alarm.
    """
    sign, middle, sides = plan(apart[0], apart[1], delta, tail)
    rng = np.random.default_rng(int(sha256_hex(np.concatenate([*held, *apart]).tobytes()), 16))
    one, other = held
    m = counted(min(len(one), len(other)), tail)
    ours = int(np.clip(rng.binomial(m, 0.5), m - len(other), len(one)))
    scores = np.concatenate([sign * one[:ours], sign * other[: m - ours]])
    order = rng.permutation(m)  # so that equal scores come in an order that tells nothing
    right, looks = tally(scores[order], (np.arange(m) < ours)[order], middle, sides)
    epsilon = refuted(right, looks, m, delta, tail)
    if not len(looks):
        return Found(epsilon, epsilon, m)
    best = int(_spoilt(_low(right, looks, tail / len(looks)), looks, m, delta).argmax())
    return Found(epsilon, max(float(_spoilt(right / looks, looks, m, delta)[best]), epsilon), m)
