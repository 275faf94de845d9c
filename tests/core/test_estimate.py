"""Intervals against scipy's own, their coverage, and how they print."""

import math

import numpy as np
import pytest
from scipy import stats

from expunge import Estimate, Misuse
from expunge.core.estimate import mean, proportion, share


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (27, 30), (488, 500), (9750, 10000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_proportion_is_clopper_pearson(k: int, n: int, level: float) -> None:
    ours = proportion(k, n, level)
    theirs = stats.binomtest(k, n).proportion_ci(level, "exact")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-10)
    assert (ours.value, ours.n, ours.level) == (k / n, n, level)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.97])
def test_proportion_covers_at_its_level_or_more(p: float) -> None:
    n = 60
    covered = sum(stats.binom.pmf(k, n, p) for k in range(n + 1) if proportion(k, n).low <= p <= proportion(k, n).high)
    assert covered >= 0.95  # exact sum over all outcomes, no simulation


def test_mean_is_students_interval() -> None:
    values = [0.91, 0.94, 0.925, 0.93]
    ours = mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / 4, scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-12)
    assert ours.interval == "student t over seeds"


def test_one_seed_says_nothing_of_the_spread() -> None:
    one = mean([0.5])
    assert (one.value, one.low, one.high, one.n) == (0.5, -math.inf, math.inf, 1)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_shares_are_refused(k: int, n: int) -> None:
    with pytest.raises(Misuse, match="0 <= successes <= n"):
        proportion(k, n)


def test_an_interval_holds_its_value() -> None:
    with pytest.raises(Misuse, match="must hold its value"):
        Estimate(0.5, 0.6, 0.7, 10)
    with pytest.raises(Misuse, match="at least one value"):
        mean([])


def test_printing_and_json() -> None:
    e = proportion(964, 1000)
    assert f"{e:.1%}" == "96.4 (95.1 to 97.5)"
    assert f"{e:.2f}" == "0.96 (0.95 to 0.97)"
    assert str(e) == "0.964 (0.951 to 0.975)"
    assert Estimate.from_json(e.to_json()) == e


@pytest.mark.parametrize("k", range(0, 13, 3))
def test_a_share_of_zeros_and_ones_is_a_proportion(k: int) -> None:
    ours, theirs = share(float(k), 12), proportion(k, 12)
    assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-12)


def test_a_share_of_broken_numbers_covers_at_its_level_or_more() -> None:
    rng = np.random.default_rng(7)
    for p in (0.02, 0.3, 0.6):
        sums = rng.binomial(3, p, size=(2000, 30)).sum(1) / 3
        inside = [found.low <= p <= found.high for found in (share(float(total), 30) for total in sums)]
        assert np.mean(inside) >= 0.95


def test_no_hit_at_any_seed_is_no_certainty() -> None:
    assert share(0.0, 30).high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_a_share_outside_its_range_is_refused() -> None:
    with pytest.raises(Misuse, match="0 <= total <= n"):
        share(3.1, 3)
