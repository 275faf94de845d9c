"""The binomial test against fractions, golden values, its edges, measured rates, and several owners."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from expunge.core.errors import Impossible, Misuse
from expunge.verify.binomial import BinomialTest, PooledTest, critical, lower, queries_needed, upper
from expunge.verify.counted import CountedTest

RATES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.8, 1.0)
ALPHAS = (1e-3, 0.01, 0.05, 0.25, 0.5)


def tails(n, rate):
    """P(Bin(n, rate) >= k) for k = 0 to n + 1, in fractions of the very float."""
    q = Fraction(rate)
    chance = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
    return [sum(chance[k:], Fraction(0)) for k in range(n + 2)]


def by_fractions(n, q, alpha):
    exact = tails(n, q)
    return next(k for k in range(n + 2) if exact[k] <= Fraction(alpha))


def published(n, q, alpha):
    """The liar: the first k whose cdf is above 1 - alpha, as a public code has it."""
    exact = tails(n, q)
    return next((k for k in range(n + 1) if 1 - exact[k + 1] > 1 - Fraction(alpha)), 0)


def size(n, q, k):
    return tails(n, q)[k]


def test_k_star_and_both_errors_are_those_of_fractions():
    for n, q, alpha in itertools.product((1, 2, 3, 5, 8, 12), RATES, (0.0, *ALPHAS, 1.0)):
        wanted = by_fractions(n, q, alpha)
        assert critical(n, q, alpha) == wanted, (n, q, alpha)
        for p in RATES:
            test = BinomialTest(n=n, q=q, p=p, alpha=alpha)
            assert test.alpha_actual == pytest.approx(float(tails(n, q)[wanted]), rel=1e-12, abs=1e-300)
            assert test.beta == pytest.approx(float(1 - tails(n, p)[wanted]), rel=1e-12, abs=1e-300)


def test_every_p_value_is_that_of_fractions():
    for n, q in itertools.product((1, 4, 11), RATES):
        test = BinomialTest(n=n, q=q, p=1.0)
        assert [test.p_value(k) for k in range(n + 1)] == pytest.approx([float(t) for t in tails(n, q)[:-1]], rel=1e-12)


def test_a_tie_with_alpha_is_decided_by_fractions_and_not_by_rounding():
    assert critical(2, 0.5, 0.25) == 2  # P(K >= 2) is 1/4 exactly
    assert critical(2, 0.5, math.nextafter(0.25, 0)) == 3
    assert critical(10, 0.5, 11 / 1024) == 9
    assert critical(10, 0.5, math.nextafter(11 / 1024, 0)) == 10


def test_alpha_is_never_exceeded_on_a_grid_and_the_published_rule_exceeds_it():
    broken = 0
    for n, q, alpha in itertools.product((5, 15, 30), (0.01, 0.1, 0.3, 0.5), (1e-4, 1e-3, 0.01, 0.05)):
        assert size(n, q, BinomialTest(n=n, q=q, p=1.0, alpha=alpha).k_star) <= Fraction(alpha)
        broken += size(n, q, published(n, q, alpha)) > Fraction(alpha)
    assert broken == 48  # every one
    assert float(size(30, 0.1, published(30, 0.1, 1e-3))) == pytest.approx(2.02e-3, rel=0.01)
    assert float(size(5, 0.1, published(5, 0.1, 1e-3))) == pytest.approx(8.56e-3, rel=0.01)


def test_golden_values():
    test = BinomialTest(n=30, q=0.1, p=0.6)
    assert test.k_star == 10
    assert test.beta == pytest.approx(8.56e-4, rel=1e-3)
    assert test.confidence == 1 - test.beta
    assert BinomialTest(n=30, q=0.1, p=0.8).beta == pytest.approx(4.5e-9, rel=0.01)
    assert test.accuses(10)
    assert not test.accuses(9)


@pytest.mark.parametrize(
    ("q", "p", "first"),
    [(0.1, 0.8, 15), (0.1, 0.95, 8), (0.1, 0.6, 30), (0.1, 0.4, 73), (0.2, 0.4, 196), (0.1, 0.15, 1656)],
)
def test_queries_needed(q, p, first):
    needed = queries_needed(q, p, 1e-3, 1e-3)
    assert needed.first == first
    assert needed.always >= first
    for n in (first, needed.always, needed.always + 1, needed.checked_to, needed.checked_to + 17):
        assert BinomialTest(n=n, q=q, p=p).beta <= 1e-3
    for n in (first - 1, *([needed.always - 1] if needed.always > first else [])):
        assert BinomialTest(n=n, q=q, p=p).beta > 1e-3


def test_one_query_more_may_be_one_too_few():
    enough = [n for n in range(60, 155) if BinomialTest(n=n, q=0.1, p=0.4).beta <= 1e-3]
    assert enough == [73, 74, *range(76, 155)]
    needed = queries_needed(0.1, 0.4)
    assert (needed.first, needed.always, needed.checked_to) == (73, 76, 154)


def test_queries_needed_agree_with_the_test_one_by_one():
    for q, p, alpha, beta in [
        (0.0, 0.3, 0.01, 0.05),
        (0.2, 1.0, 1e-4, 0.01),
        (0.3, 0.6, 0.05, 0.1),
        (0.5, 0.75, 0.1, 0.2),
    ]:
        needed = queries_needed(q, p, alpha, beta)
        missing = [BinomialTest(n=n, q=q, p=p, alpha=alpha).beta > beta for n in range(1, needed.checked_to + 30)]
        assert needed.first == missing.index(False) + 1
        assert needed.always == max((n for n, missed in enumerate(missing, 1) if missed), default=0) + 1


def test_monotone_in_rates_and_errors():
    grid = np.linspace(0.05, 0.95, 19)
    for n in (7, 30):
        assert np.all(np.diff([BinomialTest(n=n, q=0.05, p=p).beta for p in grid]) <= 0)
        assert np.all(np.diff([critical(n, q, 0.01) for q in grid]) >= 0)
        assert np.all(np.diff([critical(n, 0.2, alpha) for alpha in grid]) <= 0)
        assert np.all(np.diff([BinomialTest(n=n, q=0.2, p=0.5).p_value(k) for k in range(n + 1)]) <= 0)
    for q in (0.1, 0.5):
        assert BinomialTest(n=30, q=q, p=q, alpha=0.05).beta >= 0.95  # rates that do not differ


def test_edges():
    assert critical(10, 0.3, 0.0) == 11
    assert critical(10, 0.0, 0.0) == 1
    assert critical(10, 1.0, 0.5) == 11
    assert critical(10, 0.3, 1.0) == 0
    assert BinomialTest(n=10, q=0.3, p=0.9, alpha=0.0).beta == 1.0
    assert not BinomialTest(n=10, q=0.3, p=0.9, alpha=0.0).accuses(10)
    assert BinomialTest(n=10, q=0.3, p=0.9, alpha=1.0).beta == 0.0
    assert BinomialTest(n=10, q=0.3, p=0.9, alpha=1.0).accuses(0)
    assert BinomialTest(n=10, q=0.3, p=0.9).p_value(0) == 1.0
    assert BinomialTest(n=10, q=0.3, p=0.9).p_value(10) == pytest.approx(0.3**10)


def test_size_and_power_of_simulated_queries():
    rng, tries = np.random.default_rng(0), 100_000
    test = BinomialTest(n=30, q=0.1, p=0.3, alpha=0.05)
    for rate, wanted in ((0.1, test.alpha_actual), (0.3, 1 - test.beta)):
        found = int((rng.binomial(30, rate, tries) >= test.k_star).sum())
        assert lower(found, tries, 5e-4) <= wanted <= upper(found, tries, 5e-4)


def test_bounds_of_rates_hold_as_often_as_they_say():
    for n, error in ((1, 0.05), (7, 0.05), (20, 0.01)):
        for rate in np.linspace(0.0, 1.0, 41):
            chance = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
            assert sum(c for k, c in enumerate(chance) if upper(k, n, error) < rate) <= error * (1 + 1e-9)
            assert sum(c for k, c in enumerate(chance) if lower(k, n, error) > rate) <= error * (1 + 1e-9)
    assert (upper(5, 5, 0.1), lower(0, 5, 0.1)) == (1.0, 0.0)
    assert lower(27, 30, 0.005) == pytest.approx(0.68, abs=0.005)
    assert upper(27, 30, 0.005) == pytest.approx(0.99, abs=0.005)


def test_pooled_owners_are_convolved_and_not_averaged():
    n, q, p = (3, 4, 2), (0.1, 0.3, 0.05), (0.9, 0.5, 0.7)

    def exact(rates):
        out = [Fraction(0)] * 10
        for hits in itertools.product(*(range(count + 1) for count in n)):
            chance = Fraction(1)
            for count, k, rate in zip(n, hits, map(Fraction, rates), strict=True):
                chance *= math.comb(count, k) * rate**k * (1 - rate) ** (count - k)
            out[sum(hits)] += chance
        return out

    null, other = exact(q), exact(p)
    for alpha in (1e-3, 0.01, 0.1):
        test = PooledTest(n=n, q=q, p=p, alpha=alpha)
        wanted = next(k for k in range(11) if sum(null[k:]) <= Fraction(alpha))
        assert test.k_star == wanted
        assert test.alpha_actual == pytest.approx(float(sum(null[wanted:])), rel=1e-12)
        assert test.beta == pytest.approx(float(sum(other[:wanted])), rel=1e-12)
    assert [test.p_value(k) for k in range(10)] == pytest.approx([float(sum(null[k:])) for k in range(10)], rel=1e-12)
    averaged = BinomialTest(n=9, q=sum(a * b for a, b in zip(n, q, strict=True)) / 9, p=0.7)
    assert averaged.p_value(5) > 1.05 * test.p_value(5)


def test_pooling_equal_owners_is_the_plain_test():
    plain = BinomialTest(n=30, q=0.1, p=0.6)
    pooled = PooledTest(n=(10, 20), q=(0.1, 0.1), p=(0.6, 0.6))
    assert pooled.k_star == plain.k_star == 10
    assert pooled.beta == pytest.approx(plain.beta, rel=1e-10)
    assert pooled.accuses(10)
    assert not pooled.accuses(9)


@pytest.mark.parametrize(("alpha", "k_star"), [(0.0, 6), (1.0, 0)])
def test_edges_of_pooled_owners(alpha, k_star):
    assert PooledTest(n=(2, 3), q=(0.1, 0.2), p=(0.5, 0.5), alpha=alpha).k_star == k_star
    assert PooledTest(n=(2, 3), q=(0.0, 0.0), p=(0.5, 0.5), alpha=0.0).k_star == 1


def test_a_tie_of_pooled_owners_with_alpha_counts_as_above_it():
    quarter = PooledTest(n=(1, 1), q=(0.5, 0.5), p=(0.9, 0.9), alpha=0.25)
    assert (quarter.k_star, quarter.alpha_actual, quarter.beta) == (3, 0.0, 1.0)
    assert PooledTest(n=(1, 1), q=(0.5, 0.5), p=(0.9, 0.9), alpha=0.26).k_star == 2


def counted(**changes):
    settings = {"controls": (1, 4, 2) * 1000, "each": 100, "before": 98, "asked": 100, "n": 40}
    return CountedTest(**settings | changes)


def test_measured_rates_are_counted_into_the_errors():
    test = counted()
    left = 1e-3 - 1 / 3001
    assert test.q_high == upper(4, 100, left / 2) > 0.04
    assert test.p_low == lower(98, 100, 5e-4) < 0.98
    assert test.test.alpha == left / 2
    assert test.missed == 5e-4 + test.test.beta <= 1e-3
    assert (test.decide(0), test.decide(test.test.k_star - 1)) == ("pass", "pass")
    assert (test.decide(test.test.k_star), test.decide(40)) == ("fail", "fail")


def test_nothing_is_decided_where_nothing_can_be():
    assert {counted(before=3).decide(k) for k in range(41)} == {"inconclusive"}  # p_low <= q_high
    few = counted(n=7)
    assert few.decide(0) == "inconclusive"
    assert few.decide(few.test.k_star) == "fail"  # an accusation is as sure with few queries as with many


def test_controls_whose_rates_differ_do_not_raise_the_error_but_break_the_test_on_their_mean():
    """The liar is the common practice: one q over all controls' queries, as if triggers were alike."""
    rng, tries, m, n = np.random.default_rng(1), 2000, 39, 30
    false, naive = 0, 0
    for _ in range(tries):
        rates = rng.beta(0.3, 2.0, m + 1)  # the last is that of the owner's trigger, which was deleted
        controls, found = rng.binomial(n, rates[:-1]), int(rng.binomial(n, rates[-1]))
        test = CountedTest(controls=tuple(map(int, controls)), each=n, before=n, asked=n, n=n, alpha=0.1, beta=0.1)
        false += test.decide(found) == "fail"
        pooled = upper(int(controls.sum()), m * n, 0.05)
        naive += BinomialTest(n=n, q=pooled, p=1.0, alpha=0.05).accuses(found)
    assert false / tries <= 0.1
    assert naive / tries > 0.15


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: BinomialTest(n=0, q=0.1, p=0.5), "n >= 1"),
        (lambda: BinomialTest(n=5, q=1.1, p=0.5), "q must lie"),
        (lambda: BinomialTest(n=5, q=0.1, p=0.5, alpha=-1), "alpha must lie"),
        (lambda: BinomialTest(n=5, q=0.1, p=0.5).accuses(6), "from 0 to 5"),
        (lambda: BinomialTest(n=5, q=0.1, p=0.5).p_value(-1), "from 0 to 5"),
        (lambda: PooledTest(n=(), q=(), p=()), "each owner"),
        (lambda: PooledTest(n=(3,), q=(0.1,), p=(2.0,)), "must lie"),
        (lambda: queries_needed(0.1, 0.5, 0.0, 0.1), "between 0 and 1"),
        (lambda: queries_needed(0.1, 0.1001), "too close"),
        (lambda: counted(controls=(1,) * 999), "999 controls"),
        (lambda: counted(controls=(101,) * 2000), "hits"),
        (lambda: counted(before=101), "hits"),
        (lambda: counted(beta=0.0), "between 0 and 1"),
    ],
)
def test_misuse_is_refused_in_one_line(call, what):
    with pytest.raises(Misuse, match=what) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_no_number_of_queries_tells_rates_apart_that_do_not_differ():
    with pytest.raises(Impossible, match=r"p = 0\.1"):
        queries_needed(0.1, 0.1)
