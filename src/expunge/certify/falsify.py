"""Attacks on a guarantee: how well somebody told two worlds apart, and what that refutes. Refutes, never certifies.

A lower bound on epsilon above the one that is guaranteed proves the guarantee false, up to the chance of a false alarm.
A bound below it proves nothing: another attack, or more pairs, might do better.

All bounds here choose their threshold on every fourth of the scores and count errors on the others, so that choosing
costs no validity: the exact binomial bounds (Clopper-Pearson) hold at any number of pairs, with a false alarm in at
most ``1 - confidence`` of all cases. They need independent scores: of independent trainings, or of fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import betaincinv, ndtr, ndtri

from expunge.core.claim import Guarantee
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate
from expunge.core.protocols import Verdict

_Numbers = NDArray[np.float64]
_Figure = Callable[[_Numbers, _Numbers], _Numbers]  # from a true and a false positive rate
_CHOOSING = 4  # one in so many scores chooses the threshold
_FEWEST = 8
_TIE = 1e-6


def lower_bound(scores_one: ArrayLike, scores_other: ArrayLike, delta: float, confidence: float = 0.95) -> Estimate:
    """An epsilon that the two worlds exceed at this delta, with the given confidence, by what their scores tell.

    ``ln((P(S) - delta) / Q(S))`` for the set S of scores above, or below, a threshold, and either world as P
    (Jagielski et al., 2020). Needs nothing of the mechanism. Of two Gaussians with mu >= 1 it finds 85 % and more of
    `best_attainable` from 1,000 pairs on; with mu .5 about three quarters, and with mu .3 half.

    Args:
        scores_one: an attack's scores in the one world, in the order of the trials.
        scores_other: in the other.
        delta: of the guarantee.
        confidence: of the bound.

    Returns:
        `low` is the bound (0 if nothing can be refuted), `value` the figure without allowance for chance, `high`
        infinite, as no attack bounds epsilon from above; `n` the pairs that were counted.

    Raises:
        Misuse: with fewer than 8 scores in a world, or scores that are no numbers.

    Cost: sorting a quarter of the scores.
    """
    return _bound(scores_one, scores_other, lambda true, false: _epsilon(true, false, delta), confidence)


def lower_bound_mu(scores_one: ArrayLike, scores_other: ArrayLike, confidence: float = 0.95) -> Estimate:
    """A mu that the two worlds exceed, by what their scores tell: ``Phi^-1(P(S)) - Phi^-1(Q(S))``.

    Much stronger than `lower_bound`, as the errors at one threshold bound the whole trade-off curve (Nasr et al.,
    2023). It refutes a guarantee that states a mu; one of (epsilon, delta) alone only where the mechanism is known to
    be Gaussian, and then `gaussian.epsilon_of` makes an epsilon of it.

    Args, Returns and Raises: as `lower_bound`.
    """
    return _bound(scores_one, scores_other, _mu, confidence)


def ceiling(n: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that `lower_bound` can refute with n scores in each world, however good the attack."""
    return _best(n, confidence, lambda true, false: _epsilon(true, false, delta))


def ceiling_mu(n: int, confidence: float = 0.95) -> float:
    """The largest mu that `lower_bound_mu` can refute with n scores in each world."""
    return _best(n, confidence, _mu)


def best_attainable(mu: float, n: int, delta: float, confidence: float = 0.95) -> float:
    """The expected bound on epsilon of the best test of N(0, 1) against N(mu, 1), told the best threshold beforehand.

    With all n pairs of scores counted, as none are needed to choose: what `lower_bound` is to be measured by. Computed
    by quantiles of the two binomials, to about three digits.
    """
    return _attainable(mu, n, confidence, lambda true, false: _epsilon(true, false, delta))


def best_attainable_mu(mu: float, n: int, confidence: float = 0.95) -> float:
    """As `best_attainable`, for the bound on mu."""
    return _attainable(mu, n, confidence, _mu)


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


def _epsilon(true: _Numbers, false: _Numbers, delta: float) -> _Numbers:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(np.maximum(true - delta, 0)) - np.log(false)
    return np.where(true > delta, np.maximum(found, 0), 0.0)


def _mu(true: _Numbers, false: _Numbers) -> _Numbers:
    with np.errstate(invalid="ignore"):
        found: _Numbers = np.maximum(ndtri(true) - ndtri(false), 0)
    return np.where(np.isnan(found), 0.0, found)


def _low(counts: _Numbers, n: int, tail: float) -> _Numbers:
    return np.where(counts > 0, betaincinv(np.maximum(counts, 0.5), n - counts + 1, tail), 0.0)


def _high(counts: _Numbers, n: int, tail: float) -> _Numbers:
    return np.where(counts < n, betaincinv(counts + 1, np.maximum(n - counts, 0.5), 1 - tail), 1.0)


def _checked(scores: ArrayLike) -> _Numbers:
    values = np.asarray(scores, dtype=np.float64).ravel()
    if len(values) < _FEWEST or np.isnan(values).any():
        raise Misuse(f"an attack needs at least {_FEWEST} scores in each world, and numbers, got {len(values)}")
    return values


def _bound(scores_one: ArrayLike, scores_other: ArrayLike, figure: _Figure, confidence: float) -> Estimate:
    if not 0 < confidence < 1:
        raise Misuse(f"confidence must be > 0 and < 1, got {confidence}")
    worlds = [_checked(scores_one), _checked(scores_other)]
    tail = (1 - confidence) / 2  # one half for each of the two rates
    sign, threshold, swapped = _choose([world[::_CHOOSING] for world in worlds], figure, tail)
    held = [sign * world[np.arange(len(world)) % _CHOOSING != 0] for world in worlds]
    true, false = reversed(held) if swapped else held
    hits, alarms = (np.array(float((world >= threshold).sum())) for world in (true, false))
    low = float(figure(_low(hits, len(true), tail), _high(alarms, len(false), tail)))
    value = float(figure(hits / len(true), alarms / len(false)))
    how = "clopper-pearson of both error rates, one-sided, on three quarters of the scores"
    return Estimate(max(value, low), low, math.inf, min(len(true), len(false)), confidence, how)


def _choose(worlds: list[_Numbers], figure: _Figure, tail: float) -> tuple[float, float, bool]:
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
            found = figure(_low(true, n, tail), _high(false, m, tail))
            found = found + _TIE * figure((true + 0.5) / (n + 1), (false + 0.5) / (m + 1))
            place = int(found.argmax())
            if found[place] > best:
                best, choice = float(found[place]), (sign, float(places[place]), swapped)
    return choice


def _places(pooled: _Numbers) -> _Numbers:
    """Thresholds to choose from: dense at both ends, where they matter, and few, so that luck finds few to favour."""
    ranks = np.unique(np.floor(1.3 ** np.arange(math.log(len(pooled) / 2 + 1) / math.log(1.3))).astype(int))
    ranks = np.concatenate([ranks, len(pooled) + 1 - ranks])
    return np.unique(pooled[len(pooled) - ranks])


def _best(n: int, confidence: float, figure: _Figure) -> float:
    if n < _FEWEST:
        raise Misuse(f"an attack needs at least {_FEWEST} scores in each world, got {n}")
    counted, tail = n - len(range(0, n, _CHOOSING)), (1 - confidence) / 2
    return float(figure(_low(np.array(float(counted)), counted, tail), _high(np.array(0.0), counted, tail)))


def _attainable(mu: float, n: int, confidence: float, figure: _Figure) -> float:
    thresholds = np.linspace(-6, 6 + mu, 401)[:, None]
    chances = (np.arange(41) + 0.5) / 41
    tail = (1 - confidence) / 2
    hits = _low(stats.binom.ppf(chances, n, ndtr(mu - thresholds)), n, tail)
    alarms = _high(stats.binom.ppf(chances, n, ndtr(-thresholds)), n, tail)
    return float(figure(hits[:, :, None], alarms[:, None, :]).mean((1, 2)).max())
