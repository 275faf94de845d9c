"""Attacks on a guarantee: how well somebody told two worlds apart, and what that refutes. Refutes, never certifies.

A lower bound on epsilon above the one that is guaranteed proves the guarantee false, up to the chance of a false alarm.
A bound below it proves nothing: another attack, or more pairs, might do better.

Two bounds, of two statements. `lower_bound` is on epsilon at a delta, whatever the mechanism. `lower_bound_mu` is on
mu, and refutes only who states a mu. Both choose how to look by some of the scores and count the others, so that
choosing costs no validity, and are exact at any number of pairs, with a false alarm in at most ``1 - confidence``
of cases. They need independent scores, also across the worlds, and alike within each: of independent trainings, or of
fresh noise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import betaincinv, ndtr, ndtri

from expunge.certify import guesses
from expunge.core.claim import Guarantee
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate
from expunge.core.protocols import Verdict

_Numbers = NDArray[np.float64]
_CHOOSING = 4  # one in so many scores chooses the threshold
_PLANNING = 12  # and one in so many the order of guesses
_FEWEST = 8
_TIE = 1e-6
_FAR = 1e300  # infinite scores are as far out as this, so that there are means of them


def lower_bound(scores_one: ArrayLike, scores_other: ArrayLike, delta: float, confidence: float = 0.95) -> Estimate:
    """An epsilon that the two worlds exceed at this delta, with the given confidence, by what their scores tell.

    Every score guesses its world, and guesses are counted from the most extreme score inwards: under a guarantee in
    both directions, no more than ``e^epsilon / (1 + e^epsilon)`` of any number of them are right, but for chance and
    delta (`guesses` has the proof). Needs nothing of the mechanism. Of two Gaussians with mu .3 to 4 it finds about
    four fifths and more of `best_attainable` from 1,000 pairs on; below mu .3 less, at 1,000 pairs.

    Args:
        scores_one: an attack's scores in the one world, in the order of the trials.
        scores_other: in the other.
        delta: of the guarantee.
        confidence: of the bound.

    Returns:
        `low` is the bound (of a fine grid; 0 if nothing can be refuted), `value` the figure without allowance for
        chance where the bound is best, `high` infinite, as no attack bounds epsilon from above; `n` the scores, of both
        worlds, that were counted: somewhat fewer than there are. The same scores in the same order give the same bound.

    Raises:
        Misuse: with fewer than 8 scores in a world, or scores that are no numbers.

    Cost: a tenth of a second at 1,000 pairs.
    """
    one, other = _pair(scores_one, scores_other, confidence)
    apart, held = zip(*(_split(world, _PLANNING) for world in (one, other)), strict=True)
    found = guesses.bound(held, apart, delta, 1 - confidence)
    how = "right guesses among the most extreme scores, one-sided, exact, on eleven twelfths of the scores"
    return Estimate(found.value, found.epsilon, math.inf, found.counted, confidence, how)


def lower_bound_mu(scores_one: ArrayLike, scores_other: ArrayLike, confidence: float = 0.95) -> Estimate:
    """A mu that the two worlds exceed, by what their scores tell: ``Phi^-1(P(S)) - Phi^-1(Q(S))``.

    By exact binomial bounds (Clopper-Pearson) of both rates at one threshold, which every fourth of the scores chooses.
    Much stronger than `lower_bound`, as the errors at one threshold bound the whole trade-off curve (Nasr et al.,
    2023). It refutes a guarantee that states a mu; one of (epsilon, delta) alone only where the mechanism is known to
    be Gaussian, and then `gaussian.epsilon_of` makes an epsilon of it.

    Args, Returns and Raises: as `lower_bound`, but for `n`, which is that of the smaller world.
    """
    worlds = _pair(scores_one, scores_other, confidence)
    tail = (1 - confidence) / 2  # one half for each of the two rates
    apart, kept = zip(*(_split(world, _CHOOSING) for world in worlds), strict=True)
    sign, threshold, swapped = _choose(list(apart), tail)
    held = [sign * world for world in kept]
    true, false = reversed(held) if swapped else held
    hits, alarms = (np.array(float((world >= threshold).sum())) for world in (true, false))
    low = float(_mu(_low(hits, len(true), tail), _high(alarms, len(false), tail)))
    value = float(_mu(hits / len(true), alarms / len(false)))
    how = "clopper-pearson of both error rates, one-sided, on three quarters of the scores"
    return Estimate(max(value, low), low, math.inf, min(len(true), len(false)), confidence, how)


def ceiling(n: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that `lower_bound` can refute with n scores in each world, however good the attack."""
    m = guesses.counted(_left(n, _PLANNING), 1 - confidence)
    return guesses.refuted(np.array([m]), np.array([m]), m, delta, 1 - confidence)


def ceiling_mu(n: int, confidence: float = 0.95) -> float:
    """The largest mu that `lower_bound_mu` can refute with n scores in each world."""
    counted, tail = _left(n, _CHOOSING), (1 - confidence) / 2
    return float(_mu(_low(np.array(float(counted)), counted, tail), _high(np.array(0.0), counted, tail)))


def best_attainable(mu: float, n: int, delta: float, confidence: float = 0.95) -> float:
    """The expected bound on epsilon of the best vote on N(0, 1) against N(mu, 1), told beforehand who should vote.

    Of all 2 n scores those that are as far from mu / 2 as is best guess their world, and one exact binomial bound of
    the share that is right gives epsilon: what `lower_bound` is to be measured by. It is more than what exact bounds
    of both error rates at the best threshold give (Jagielski et al., 2020): by 16 % at mu 4, by 64 % at mu .5, and
    2.2 times as much at mu .3 (1,000 pairs, delta 1e-5). Computed by quantiles of binomials, to about three digits.
    """
    chances = (np.arange(41) + 0.5) / 41
    right, wrong = (ndtr(sign * mu / 2 - np.linspace(0, 4, 81)) for sign in (1, -1))
    voting, share = (right + wrong)[:, None], (right / (right + wrong))[:, None]
    votes = np.maximum(stats.binom.ppf(chances, 2 * n, voting), 1)[:, :, None]
    known = _low(stats.binom.ppf(chances, votes, share[:, :, None]), votes, 1 - confidence)
    return float(_epsilon(known, 1 - known, delta / voting[:, :, None]).mean((1, 2)).max())


def best_attainable_mu(mu: float, n: int, confidence: float = 0.95) -> float:
    """The expected bound on mu by the exact bounds of both error rates at the best threshold, told beforehand.

    With all n pairs of scores counted, as none are needed to choose: what `lower_bound_mu` is to be measured by.
    """
    thresholds = np.linspace(-6, 6 + mu, 401)[:, None]
    chances = (np.arange(41) + 0.5) / 41
    tail = (1 - confidence) / 2
    hits = _low(stats.binom.ppf(chances, n, ndtr(mu - thresholds)), n, tail)
    alarms = _high(stats.binom.ppf(chances, n, ndtr(-thresholds)), n, tail)
    return float(_mu(hits[:, :, None], alarms[:, None, :]).mean((1, 2)).max())


def falsify(guarantee: Guarantee, scores_one: ArrayLike, scores_other: ArrayLike, confidence: float = 0.95) -> Verdict:
    """Whether an attack's scores refute a guarantee: "fail" if a lower bound exceeds it, else "pass".

    Its epsilon is tested by `lower_bound` and, if it states one, its mu by `lower_bound_mu`, each at half of the
    chance of a false alarm. The scores must be of the two worlds that the guarantee compares (`guarantee.reference`);
    those of several releases test the transcript, whose figures are elsewhere. A pass is no proof.

    Raises:
        Misuse: as `lower_bound`.
    """
    each = 1 - (1 - confidence) / (1 if guarantee.mu is None else 2)
    epsilon = lower_bound(scores_one, scores_other, guarantee.delta, each)
    n = min(np.size(np.asarray(scores_one)), np.size(np.asarray(scores_other)))
    figures = {
        "epsilon": guarantee.epsilon,
        "epsilon_at_least": epsilon.low,
        "epsilon_ceiling": ceiling(n, guarantee.delta, each),
        "confidence": confidence,
        "pairs": float(n),
    }
    refuted = []
    if epsilon.low > guarantee.epsilon:
        refuted.append(f"epsilon is at least {epsilon.low:.4g}, and {guarantee.epsilon:.4g} is guaranteed")
    if guarantee.mu is not None:
        mu = lower_bound_mu(scores_one, scores_other, each)
        figures |= {"mu": guarantee.mu, "mu_at_least": mu.low, "mu_ceiling": ceiling_mu(n, each)}
        if mu.low > guarantee.mu:
            refuted.append(f"mu is at least {mu.low:.4g}, and {guarantee.mu:.4g} is guaranteed")
    if refuted:
        return Verdict(check="falsify", outcome="fail", why="; ".join(refuted), figures=figures)
    blind = f"; {n} pairs can refute no epsilon above {figures['epsilon_ceiling']:.3g}"
    return Verdict(
        check="falsify",
        outcome="pass",
        why=f"epsilon is at least {epsilon.low:.4g}, which does not refute {guarantee.epsilon:.4g}{blind}; "
        "an attack can only falsify",
        figures=figures,
    )


def _epsilon(true: _Numbers, false: _Numbers, delta: _Numbers) -> _Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(np.maximum(true - delta, 0)) - np.log(false)
    return np.where(true > delta, np.maximum(found, 0), 0.0)


def _mu(true: _Numbers, false: _Numbers) -> _Numbers:
    with np.errstate(invalid="ignore"):
        found: _Numbers = np.maximum(ndtri(true) - ndtri(false), 0)
    return np.where(np.isnan(found), 0.0, found)


def _low(counts: _Numbers, n: int | _Numbers, tail: float) -> _Numbers:
    return np.where(counts > 0, betaincinv(np.maximum(counts, 0.5), n - counts + 1, tail), 0.0)


def _high(counts: _Numbers, n: int, tail: float) -> _Numbers:
    return np.where(counts < n, betaincinv(counts + 1, np.maximum(n - counts, 0.5), 1 - tail), 1.0)


def _checked(scores: ArrayLike) -> _Numbers:
    values = np.asarray(scores, dtype=np.float64).ravel()
    if len(values) < _FEWEST or np.isnan(values).any():
        raise Misuse(f"an attack needs at least {_FEWEST} scores in each world, and numbers, got {len(values)}")
    return np.clip(values, -_FAR, _FAR)


def _pair(scores_one: ArrayLike, scores_other: ArrayLike, confidence: float) -> tuple[_Numbers, _Numbers]:
    if not 0 < confidence < 1:
        raise Misuse(f"confidence must be > 0 and < 1, got {confidence}")
    return _checked(scores_one), _checked(scores_other)


def _split(world: _Numbers, every: int) -> tuple[_Numbers, _Numbers]:
    """One in so many, to choose by, and the others, to count."""
    return world[::every], world[np.arange(len(world)) % every != 0]


def _left(n: int, every: int) -> int:
    if n < _FEWEST:
        raise Misuse(f"an attack needs at least {_FEWEST} scores in each world, got {n}")
    return n - len(range(0, n, every))


def _choose(worlds: list[_Numbers], tail: float) -> tuple[float, float, bool]:
    """Sign, threshold and whether the worlds change places: what gives the best bound on these scores alone.

    By their own, wide, bounds: thresholds that look good by the luck of a few scores do not win. Where those bounds say
    nothing, by the rates themselves.
    """
    best, choice = -1.0, (1.0, 0.0, False)
    for sign in (1.0, -1.0):
        one, other = (np.sort(sign * world) for world in worlds)
        places = _places(np.sort(np.concatenate([one, other])))
        above = [(len(w) - np.searchsorted(w, places)).astype(np.float64) for w in (one, other)]
        for swapped in (False, True):
            (true, n), (false, m) = ((above[i], len(worlds[i])) for i in ((1, 0) if swapped else (0, 1)))
            found = _mu(_low(true, n, tail), _high(false, m, tail))
            found = found + _TIE * _mu((true + 0.5) / (n + 1), (false + 0.5) / (m + 1))
            place = int(found.argmax())
            if found[place] > best:
                best, choice = float(found[place]), (sign, float(places[place]), swapped)
    return choice


def _places(pooled: _Numbers) -> _Numbers:
    """Thresholds to choose from: dense at both ends, where they matter, and few, so that luck finds few to favour."""
    ranks = np.unique(np.floor(1.3 ** np.arange(math.log(len(pooled) / 2 + 1) / math.log(1.3))).astype(int))
    ranks = np.concatenate([ranks, len(pooled) + 1 - ranks])
    return np.unique(pooled[len(pooled) - ranks])
