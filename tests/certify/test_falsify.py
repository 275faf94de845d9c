"""Attacks find nearly all that can be found, seldom cry wolf, and catch accountants that lie."""

import math

import numpy as np
import pytest
from scipy import stats
from torch import nn

from expunge.certify import gaussian, guesses
from expunge.certify.constants import setting
from expunge.certify.falsify import (
    best_attainable,
    best_attainable_mu,
    ceiling,
    ceiling_mu,
    falsify,
    lower_bound,
    lower_bound_mu,
)
from expunge.certify.guarantee import guarantee_of
from expunge.core.claim import Guarantee
from expunge.core.errors import Misuse

DELTA = 1e-5


def scores(mu, n, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(mu, spread, n), rng.normal(0, spread, n)


# How much of what can be found


def two_rates(mu, n):
    """The mean bound of two exact bounds of rates (Clopper-Pearson) at the best threshold: the older yardstick."""
    rng, best = np.random.default_rng(0), 0.0
    for threshold in np.linspace(mu / 2, mu / 2 + 3, 31):
        hits, alarms = (rng.binomial(n, stats.norm.sf(threshold - shift), 400) for shift in (mu, 0.0))
        low = stats.beta.ppf(0.025, np.maximum(hits, 1), n - hits + 1)
        high = stats.beta.ppf(0.975, alarms + 1, np.maximum(n - alarms, 1))
        best = max(best, np.maximum(0, np.log(np.maximum(low - DELTA, 1e-12) / high)).mean())
    return best


@pytest.mark.parametrize(
    ("mu", "n"), [(0.3, 1000), (0.5, 1000), (1.0, 1000), (2.0, 1000), (4.0, 1000), (0.5, 4000), (1.0, 4000)]
)
def test_the_bound_reaches_four_fifths_of_the_best_attainable(mu, n):
    seeds = 200 if mu < 0.5 else 25  # there the bound of one sample is hardly more than its spread
    found = [lower_bound(*scores(mu, n, seed), DELTA).low for seed in range(seeds)]
    best = best_attainable(mu, n, DELTA)
    assert two_rates(mu, n) < best, "a yardstick no shorter than that of Clopper and Pearson"
    assert 0.8 * best <= np.mean(found) <= best < gaussian.epsilon_of(mu, DELTA)
    assert np.median(found) >= 0.8 * two_rates(mu, n)


@pytest.mark.soak
@pytest.mark.parametrize("mu", [0.3, 0.5, 1.0, 2.0, 4.0])
def test_the_median_bound_of_many_reaches_four_fifths_of_the_best_attainable(mu):
    found = [lower_bound(*scores(mu, 1000, seed), DELTA).low for seed in range(1000, 1400)]
    assert min(np.median(found), np.mean(found)) >= 0.8 * best_attainable(mu, 1000, DELTA)


@pytest.mark.parametrize(("mu", "n"), [(1.0, 1000), (1.5, 1000), (2.0, 1000), (4.0, 1000), (0.5, 4000), (1.0, 4000)])
def test_the_bound_on_mu_reaches_four_fifths_of_the_best_attainable(mu, n):
    found_mu = np.mean([lower_bound_mu(*scores(mu, n, seed)).low for seed in range(25)])
    best_mu = best_attainable_mu(mu, n)
    assert 0.8 * best_mu <= found_mu <= best_mu <= mu
    by_mu = gaussian.epsilon_of(found_mu, DELTA)
    assert best_attainable(mu, n, DELTA) < by_mu  # the Gaussian bound is the stronger one


def test_an_attack_that_looks_at_half_of_the_releases_falls_short():
    mu, n = 2.0, 1000
    rng = np.random.default_rng(0)
    blurred = [lower_bound(rng.normal(mu, 2, n), rng.normal(0, 2, n), DELTA).low for _ in range(10)]
    assert np.mean(blurred) < 0.8 * best_attainable(mu, n, DELTA)


def test_the_best_attainable_is_the_mean_over_attacks_told_who_votes():
    mu, n, rng = 1.0, 500, np.random.default_rng(0)
    best = 0.0
    for depth in np.linspace(1, 3, 9):
        ones, others = rng.normal(mu, 1, (400, n)), rng.normal(0, 1, (400, n))
        above, below = ((side > mu / 2 + depth).sum(1) for side in (ones, others)), (ones, others)
        hits, alarms = above
        false, true = ((side < mu / 2 - depth).sum(1) for side in below)
        right, wrong = hits + true, alarms + false
        low = stats.beta.ppf(0.05, np.maximum(right, 1), wrong + 1)
        spoilt = low - DELTA * 2 * n / np.maximum(right + wrong, 1)
        best = max(best, np.maximum(0, np.log(spoilt / (1 - low))).mean())
    assert best_attainable(mu, n, DELTA) == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("n", [8, 9, 10, 11, 32, 1000])
def test_perfect_scores_reach_the_ceiling_and_nothing_exceeds_it(n):
    one, other = np.ones(n), np.zeros(n)
    assert lower_bound(one, other, DELTA).low == pytest.approx(ceiling(n, DELTA))
    assert lower_bound_mu(one, other).low == pytest.approx(ceiling_mu(n))
    assert lower_bound(other, one, DELTA).low == pytest.approx(ceiling(n, DELTA))  # both directions
    left = n - math.ceil(n / 12)
    counted = guesses.counted(left, 0.05)
    share = (0.05 * 0.95 - stats.binom.sf(0, counted, DELTA)) ** (1 / counted)
    if stats.binom.sf(0, counted, DELTA) < 0.0025:
        assert 0 <= math.log(share / (1 - share)) - ceiling(n, DELTA) < 0.25 / math.sqrt(counted)
    counted_mu = n - math.ceil(n / 4)
    right = 0.025 ** (1 / counted_mu)
    assert ceiling_mu(n) == pytest.approx(2 * stats.norm.ppf(right) if right > 0.5 else 0.0)


def test_a_larger_delta_lowers_the_bound_and_the_ceiling():
    one, other = scores(3.0, 1000, 0)
    assert lower_bound(one, other, 0.2).low < lower_bound(one, other, DELTA).low
    assert ceiling(1000, 0.2) < ceiling(1000, DELTA)
    assert lower_bound(one, other, 0.999).low == 0.0


@pytest.mark.parametrize("shape", ["shifted", "rare large", "rare small"])
def test_both_tails_and_both_directions_are_looked_at(shape):
    rng = np.random.default_rng(0)
    plain, other = rng.normal(0, 1, 4000), rng.normal(0, 1, 4000)
    if shape == "shifted":
        other = other + 2
    else:  # the other world shows itself in a few scores only, far out
        other[rng.random(4000) < 0.05] = 50.0 if shape == "rare large" else -50.0
    for pair in ((plain, other), (other, plain)):
        assert lower_bound(*pair, DELTA).low > 2.0


def test_the_bound_is_an_estimate_that_bounds_nothing_from_above():
    found = lower_bound(*scores(1.0, 1000, 0), DELTA)
    assert found.low <= found.value <= found.high == math.inf
    assert found.n == guesses.counted(916, 0.05) < 2 * 916
    assert found.level == 0.95
    assert lower_bound(*scores(1.0, 1000, 0), DELTA, confidence=0.999).low < found.low


# False alarms


def alarms(bound, truth, trials, **given):
    return np.mean([bound(*scores(seed=seed, **given)) > truth for seed in range(trials)])


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("n", [40, 400])
def test_false_alarms_are_rarer_than_one_in_twenty(mu, n):
    assert alarms(lambda one, other: lower_bound_mu(one, other).low, mu, 400, mu=mu, n=n) <= 0.05
    truth = gaussian.epsilon_of(mu, 0.05)
    assert alarms(lambda one, other: lower_bound(one, other, 0.05).low, truth, 400, mu=mu, n=n) <= 0.05


def test_randomised_response_attains_its_epsilon_and_raises_few_false_alarms():
    """The pair whose epsilon one threshold shows exactly: the bound's worst case, and sharp enough to see its level."""
    epsilon = 1.5
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        found.append(lower_bound(rng.random(400) < right, rng.random(400) >= right, 0.0).low)
    assert 0.001 < np.mean(np.array(found) > epsilon) <= 0.05
    assert np.mean(found) > 0.75 * epsilon


def test_rare_events_in_worlds_of_unequal_size_raise_few_false_alarms():
    """Scores that choose are nearly all 0 here: coins dealt from those alone would ever be the same."""

    def rare(seed):
        rng = np.random.default_rng([seed, 100, 30])
        return [1.0 * (rng.random(n) < 0.05) for n in (100, 30)]

    assert np.mean([lower_bound(*rare(seed), 0.0, 0.9).low > 0 for seed in range(200)]) <= 0.15


def test_scores_that_are_infinite_are_the_most_extreme_ones():
    one, other = np.full(1000, math.inf), np.full(1000, -math.inf)
    assert lower_bound(one, other, DELTA).low == pytest.approx(ceiling(1000, DELTA))
    one[::2] = other[::2] = 0.0
    assert lower_bound(one, other, DELTA).low > 4
    assert lower_bound_mu(one, other).low > 2


def test_a_bound_that_chooses_and_counts_on_the_same_scores_would_be_noticed():
    def naive(one, other):
        places = np.sort(np.concatenate([one, other]))
        best = 0.0
        for side in (1, -1):
            hits = np.array([(side * one >= side * p).sum() for p in places])
            misses = np.array([(side * other >= side * p).sum() for p in places])
            low = np.where(hits > 0, stats.beta.ppf(0.05, np.maximum(hits, 1), len(one) - hits + 1), 0)
            high = np.where(
                misses < len(other), stats.beta.ppf(0.95, misses + 1, np.maximum(len(other) - misses, 1)), 1
            )
            best = max(best, float(np.log(np.maximum(low, 1e-12) / high).max()))
        return best

    assert alarms(naive, 0.0, 60, mu=0.0, n=100) > 0.05


# Guarantees and liars


def guarantee(epsilon, mu=None, delta=DELTA):
    constants = {
        "sigma": setting(1.0, "method.sigma"),
        "sensitivity": setting(1.0, "method.cap"),
        "mu" if mu is not None else "epsilon": setting(epsilon if mu is None else mu, "method.figure"),
    }
    made = guarantee_of(
        nn.Linear(1, 1),
        parameters=["weight", "bias"],
        constants=constants,
        delta=delta,
        mechanism="noise",
        reference="the other world",
        transcript=None,
    )
    return Guarantee.from_json({**made.to_json(), "epsilon": epsilon})


def transcripts(mu, releases, seed, *, n=1500, dimension=15, noisy=True):
    """Scores of the likelihood ratio on `releases` releases that are each exactly at the cap: their worst case.

    Every release is a vector that the one world shifts by mu standard deviations, in a direction that is its own.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(releases, dimension))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    worlds = []
    for shift in (mu, 0.0):
        released = rng.normal(size=(n, releases, dimension)) * (1.0 if noisy else 0.0) + shift * directions
        worlds.append((released * directions).sum((1, 2)))
    return worlds


def sigma_forgotten(seed):
    """Noise for epsilon 1 is on paper, and was never added."""
    mu = gaussian.mu_of(1.0, DELTA)
    return guarantee(1.0, mu), transcripts(mu, 1, seed, noisy=False)


def alpha_forgotten(seed):
    """The noise that the conversion without alpha asks for at epsilon 1.004: mu is sqrt 2."""
    return guarantee(1.004), transcripts(math.sqrt(2), 1, seed)


def alpha_forgotten_and_mu_from_epsilon(seed):
    """The same, in a guarantee that states the mu that its epsilon would have."""
    return guarantee(1.004, gaussian.mu_of(1.004, DELTA)), transcripts(math.sqrt(2), 1, seed)


def sequence_forgotten(seed):
    """30 releases at mu .25 each; the figure is that of one."""
    return guarantee(gaussian.epsilon_of(0.25, DELTA), 0.25), transcripts(0.25, 30, seed)


def sequence_forgotten_without_mu(seed):
    """The same, told in epsilon alone."""
    return guarantee(gaussian.epsilon_of(0.25, DELTA)), transcripts(0.25, 30, seed)


def honest_single(seed):
    """Noise as it should be."""
    mu = gaussian.mu_of(1.0, DELTA)
    return guarantee(1.0, mu), transcripts(mu, 1, seed)


def honest_alpha(seed):
    """The right conversion of the same noise."""
    return guarantee(gaussian.epsilon_of(math.sqrt(2), DELTA), math.sqrt(2)), transcripts(math.sqrt(2), 1, seed)


def honest_sequence(seed):
    """All 30 releases composed."""
    mu = gaussian.compose([0.25] * 30)
    return guarantee(gaussian.epsilon_of(mu, DELTA), mu), transcripts(0.25, 30, seed, n=600)


def caught(case):
    return sum(falsify(*(lambda g, s: (g, *s))(*case(seed))).outcome == "fail" for seed in range(20))


@pytest.mark.parametrize(
    "liar",
    [
        sigma_forgotten,
        alpha_forgotten,
        alpha_forgotten_and_mu_from_epsilon,
        sequence_forgotten,
        sequence_forgotten_without_mu,
    ],
)
def test_an_accountant_that_lies_is_caught(liar):
    assert caught(liar) >= 19


@pytest.mark.parametrize("honest", [honest_single, honest_alpha, honest_sequence])
def test_an_honest_accountant_is_hardly_ever_accused(honest):
    assert caught(honest) <= 1


def test_a_verdict_says_what_decided_and_that_a_pass_proves_nothing():
    passed = falsify(guarantee(4.4, 1.0), *scores(1.0, 1000, 0))
    assert passed.passed
    assert "can only falsify" in passed.why
    assert "1000 pairs can refute no epsilon above 6.1;" in passed.why
    assert passed.figures["mu_at_least"] < 1.0 < passed.figures["mu_ceiling"]
    failed = falsify(guarantee(0.5, 0.14), *scores(1.0, 1000, 0))
    assert failed.outcome == "fail"
    assert "epsilon is at least" in failed.why
    assert "mu is at least" in failed.why
    assert failed.figures["epsilon_at_least"] > 0.5
    assert "mu" not in falsify(guarantee(0.5), *scores(1.0, 1000, 0)).figures


def test_the_chance_of_a_false_alarm_is_shared_where_two_figures_are_tested():
    one, other = scores(1.0, 1000, 0)
    both = falsify(guarantee(9.0, 3.0), one, other)
    assert both.figures["epsilon_at_least"] == lower_bound(one, other, DELTA, 0.975).low
    assert both.figures["mu_at_least"] == lower_bound_mu(one, other, 0.975).low
    alone = falsify(guarantee(9.0), one, other)
    assert alone.figures["epsilon_at_least"] == lower_bound(one, other, DELTA, 0.95).low


@pytest.mark.parametrize(
    "call",
    [
        lambda: lower_bound([1.0] * 7, [0.0] * 100, DELTA),
        lambda: lower_bound([1.0] * 9, [math.nan] * 9, DELTA),
        lambda: lower_bound_mu([1.0] * 9, [0.0] * 9, confidence=1.0),
        lambda: ceiling(7, DELTA),
    ],
    ids=["too few", "no number", "certainty", "too few for a ceiling"],
)
def test_what_cannot_be_meant_is_refused(call):
    with pytest.raises(Misuse):
        call()
