"""The classic test of backdoor verification: hits of a secret trigger counted as a binomial number, done right.

H0, deleted: K ~ Bin(n, q), the hits of a trigger that was never trained. H1, not deleted: K ~ Bin(n, p). The provider
is accused if K >= k* = min{k: P(Bin(n, q) >= k) <= alpha}, so that the actual error is never above alpha. (Athena's
published formula takes the first k whose cdf exceeds 1 - alpha, and so accuses from one hit less: 2.0e-3 for q = .1,
n = 30, alpha = 1e-3.)

Queries share one trigger and one model. Given both, hits on random rows are binomial; but q differs from trigger to
trigger, so a rate estimated on one control says little about another. `CountedTest` counts that; the rank test needs
none of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from scipy import special

from expunge.core.errors import Impossible, Misuse

Floats = np.ndarray[Any, np.dtype[np.float64]]
_CLOSE = 1e-9  # relative; the tails below are good to about 1e-12
_EXACT_UP_TO = 2_000
_MOST_QUERIES = 250_000


def at_least(n: int, k: int, q: float) -> float:
    """P(Bin(n, q) >= k)."""
    if k <= 0 or k > n:
        return float(k <= 0)
    return float(special.betainc(k, n - k + 1, q))


def below(n: int, k: int, p: float) -> float:
    """P(Bin(n, p) < k), accurate where it is small."""
    if k <= 0 or k > n:
        return float(k > n)
    return float(special.betaincc(k, n - k + 1, p))


def upper(hits: int, n: int, error: float) -> float:
    """Upper Clopper-Pearson bound: below the true rate with probability `error` at most. n = 0 gives 1."""
    return 1.0 if hits >= n else float(special.betainccinv(hits + 1, n - hits, error))


def lower(hits: int, n: int, error: float) -> float:
    """Lower Clopper-Pearson bound: above the true rate with probability `error` at most. n = 0 gives 0."""
    return 0.0 if hits <= 0 else float(special.betaincinv(hits, n - hits + 1, error))


def critical(n: int, q: float, alpha: float) -> int:
    """k* = min{k in 0..n + 1: P(Bin(n, q) >= k) <= alpha}; n + 1 means that no count suffices.

    `q` and `alpha` are taken as exactly the numbers that the floats are: where rounding could decide, fractions do; for
    n above 2,000 such a tie counts as above alpha, so that the error is not exceeded there either.
    """
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _at_most(n, middle, q, alpha) else (middle + 1, high)
    return low


def _at_most(n: int, k: int, q: float, alpha: float) -> bool:
    if k <= 0 or k > n or q == 0 or alpha == 0:
        return k > n or (k > 0 and q == 0) or alpha >= 1
    tail = at_least(n, k, q)
    if abs(tail - alpha) > _CLOSE * alpha:
        return tail < alpha
    return n <= _EXACT_UP_TO and _exactly_at_most(n, k, Fraction(q), Fraction(alpha))


def _exactly_at_most(n: int, k: int, q: Fraction, alpha: Fraction) -> bool:
    hit, whole = q.numerator, q.denominator
    tail = sum(math.comb(n, j) * hit**j * (whole - hit) ** (n - j) for j in range(k, n + 1))
    return Fraction(tail, whole**n) <= alpha


def _refuse_other_than_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise Misuse(f"{name} must lie between 0 and 1, got {share}")


@dataclass(frozen=True, kw_only=True)
class BinomialTest:
    """Deleted, Bin(n, q), against not deleted, Bin(n, p), for rates that are known.

    Attributes:
        n: queries.
        q: rate of hits of a trigger that was never trained.
        p: rate of hits of the owner's trigger while it is.
        alpha: false accusations at most.
    """

    n: int
    q: float
    p: float
    alpha: float = 1e-3

    def __post_init__(self) -> None:
        _refuse_other_than_shares(q=self.q, p=self.p, alpha=self.alpha)
        if self.n < 1:
            raise Misuse(f"a test needs n >= 1 queries, got {self.n}")

    @cached_property
    def k_star(self) -> int:
        """Hits from which on the provider is accused; n + 1 if it never is."""
        return critical(self.n, self.q, self.alpha)

    @property
    def alpha_actual(self) -> float:
        """P(accused | deleted); at most alpha."""
        return at_least(self.n, self.k_star, self.q)

    @property
    def beta(self) -> float:
        """P(not accused | not deleted)."""
        return below(self.n, self.k_star, self.p)

    @property
    def confidence(self) -> float:
        """1 - beta."""
        return 1 - self.beta

    def p_value(self, k: int) -> float:
        """P(at least k hits | deleted)."""
        return at_least(self.n, _checked(k, self.n), self.q)

    def accuses(self, k: int) -> bool:
        """Whether k hits are too many for a trigger that is gone."""
        return _checked(k, self.n) >= self.k_star


def _checked(k: int, n: int) -> int:
    if not 0 <= k <= n:
        raise Misuse(f"hits must be from 0 to {n}, got {k}")
    return k


@dataclass(frozen=True)
class Needed:
    """How many queries reach both errors.

    Attributes:
        first: the smallest number that does.
        always: the smallest from which on every number does; beta is no monotone function of n, as k* jumps.
        checked_to: up to here each number was computed; beyond, Hoeffding's inequality proves that it does.
    """

    first: int
    always: int
    checked_to: int


def queries_needed(q: float, p: float, alpha: float = 1e-3, beta: float = 1e-3) -> Needed:
    """Queries with which `BinomialTest` accuses wrongly with at most alpha and misses with at most beta.

    With n >= (sqrt(ln 1/alpha) + sqrt(ln 1/beta))^2 / (2 (p - q)^2) both hold: k = ceil(n q + sqrt(n ln(1/alpha) / 2))
    has P(Bin(n, q) >= k) <= alpha, so that k* <= k, and k - 1 lies sqrt(n ln(1/beta) / 2) below n p. Smaller n are
    computed one by one.

    Raises:
        Impossible: if p <= q.
        Misuse: for errors that are not between 0 and 1, or rates so close that more than 250,000 queries may be needed.

    Example:
        >>> queries_needed(0.1, 0.4)
        Needed(first=73, always=76, checked_to=154)
    """
    _refuse_other_than_shares(q=q, p=p)
    if not (0 < alpha < 1 and 0 < beta < 1):
        raise Misuse(f"alpha and beta must lie between 0 and 1, got {alpha} and {beta}")
    if p <= q:
        raise Impossible(f"no number of queries tells p = {p:g} from q = {q:g}, since p is not above q")
    proven = (math.sqrt(-math.log(alpha)) + math.sqrt(-math.log(beta))) ** 2 / (2 * (p - q) ** 2)
    if proven > _MOST_QUERIES:
        raise Misuse(
            f"p = {p:g} and q = {q:g} are too close: {proven:,.0f} queries may be needed; strengthen the trigger"
        )
    n = np.arange(1, math.ceil(proven) + 1)
    enough = _missed(n, q, p, alpha) <= beta
    always = int(n[~enough].max(initial=0)) + 1
    return Needed(int(n[enough].min(initial=always)), always, len(n))


def _missed(n: np.ndarray[Any, np.dtype[np.int64]], q: float, p: float, alpha: float) -> Floats:
    """beta of each n; as `critical`, but a tie with alpha counts as above it."""
    low, high = np.zeros_like(n), n + 1
    while (low < high).any():
        middle = (low + high) // 2
        inside = np.clip(middle, 1, n)
        tail = np.where(middle < 1, 1.0, np.where(middle > n, 0.0, special.betainc(inside, n - inside + 1, q)))
        fits = tail <= alpha * (1 - _CLOSE)
        low, high = np.where(fits | (low >= high), low, middle + 1), np.where(fits, middle, high)
    inside = np.clip(low, 1, n)
    missed: Floats = np.where(low < 1, 0.0, np.where(low > n, 1.0, special.betaincc(inside, n - inside + 1, p)))
    return missed


def hits_of_several(n: tuple[int, ...], rates: tuple[float, ...]) -> Floats:
    """(sum of n + 1,) probabilities of 0, 1, ... hits in all: a sum of independent Bin(n_i, rate_i), by convolution.

    Exact but for rounding, as all terms are positive. Not a binomial with the mean rate, whose tails are wider.
    """
    out: Floats = np.ones(1)
    for count, rate in zip(n, rates, strict=True):
        k = np.arange(count + 1)
        ways = special.gammaln(count + 1) - special.gammaln(k + 1) - special.gammaln(count - k + 1)
        one = np.exp(ways + special.xlogy(k, rate) + special.xlog1py(count - k, -rate))
        out = np.convolve(out, one / one.sum())
    return out


@dataclass(frozen=True, kw_only=True)
class PooledTest:
    """`BinomialTest` on the hits of several owners together, each with rates and queries of its own.

    Assumes that owners' queries are different rows and that triggers are independent. If rates are bounds, each must
    hold: divide their errors by the number of owners.

    Attributes:
        n: queries of each owner.
        q: rate of each owner's trigger if never trained.
        p: rate of each while it is.
        alpha: false accusations at most; ties within 1e-9 of it count as above.
    """

    n: tuple[int, ...]
    q: tuple[float, ...]
    p: tuple[float, ...]
    alpha: float = 1e-3

    def __post_init__(self) -> None:
        if not (len(self.n) == len(self.q) == len(self.p) >= 1) or min(self.n) < 1:
            raise Misuse(f"each owner needs queries and two rates, got {self.n}, {self.q} and {self.p}")
        _refuse_other_than_shares(alpha=self.alpha, **{f"rate {i}": rate for i, rate in enumerate(self.q + self.p)})

    @cached_property
    def _tails(self) -> Floats:
        """P(at least k | deleted) for k = 0 to n + 1, summed from the small end."""
        tails = np.cumsum(hits_of_several(self.n, self.q)[::-1])[::-1]
        return np.append(np.minimum(np.append(1.0, tails[1:]), 1.0), 0.0)

    @cached_property
    def k_star(self) -> int:
        """Hits in all from which on the provider is accused; one more than there are queries if it never is."""
        fits = (self._tails <= self.alpha * (1 - _CLOSE)) | (self._tails == 0)
        return 0 if self.alpha >= 1 else int(np.argmax(fits))

    @property
    def alpha_actual(self) -> float:
        """P(accused | all deleted)."""
        return float(self._tails[self.k_star])

    @property
    def beta(self) -> float:
        """P(not accused | none deleted)."""
        return float(min(1.0, hits_of_several(self.n, self.p)[: self.k_star].sum()))

    def p_value(self, k: int) -> float:
        """P(at least k hits in all | all deleted)."""
        return float(self._tails[_checked(k, sum(self.n))])

    def accuses(self, k: int) -> bool:
        """Whether k hits in all are too many for triggers that are gone."""
        return _checked(k, sum(self.n)) >= self.k_star
