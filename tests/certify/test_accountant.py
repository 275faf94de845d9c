"""Accountants against golden numbers, brute force, processes that attain their bounds, and one another."""

import importlib
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from expunge.certify import composition, gaussian
from expunge.certify.accountant import Budget, charge, clipped_steps_mu, clipped_steps_sigma, mu_of_release
from expunge.certify.clipping import model_clipping_delta, model_clipping_epsilon, model_clipping_sigma
from expunge.certify.composition import (
    GaussianAccountant,
    LossAccountant,
    RenyiAccountant,
    SharedAccountant,
    group_epsilon,
)
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.events import ClippedModels, ClippedSteps, GaussianNoise, PrivateSteps, Release

DELTA = 1e-5


def noise(mu):
    return GaussianNoise(parameters=("w",), sensitivity=mu, sigma=1.0)


def steps(**other):
    settings = {"start": 1.0, "gradient": 0.5, "lr": 0.1, "weight_decay": 0.2, "steps": 20, "sigma": 1.0, **other}
    return ClippedSteps(parameters=("w",), **settings)


def models(radius=1.0, steps=10, sigma=2.0):
    return ClippedModels(parameters=("w",), radius=radius, steps=steps, sigma=sigma)


def private(rate=0.01, noise=5.0, steps=1000, group=1):
    return PrivateSteps(parameters=("w",), rate=rate, noise=noise, steps=steps, group=group)


# Gaussian releases


def test_renyi_and_exact_figures_are_the_published_ones():
    # eps_R = D_alpha / alpha = mu^2 / 2 = 1
    release = [noise(math.sqrt(2))]
    assert GaussianAccountant().epsilon(release, DELTA) == pytest.approx(6.573, abs=5e-4)
    assert RenyiAccountant().epsilon(release, DELTA) == pytest.approx(7.077, abs=1e-3)
    assert LossAccountant().epsilon(release, DELTA) == pytest.approx(6.573, abs=5e-4)


def alpha_dropped(renyi, delta):
    """The popular conversion: the divergence at order alpha is taken to be `renyi`, and not alpha times that."""
    orders = np.linspace(1.001, 1000, 10_000)
    return float((renyi - (np.log(delta) + np.log(orders)) / (orders - 1) + np.log((orders - 1) / orders)).min())


def understated(claimed, releases, delta):
    """Whether a figure is below what every accountant says."""
    return claimed < min(one.epsilon(releases, delta) for one in (GaussianAccountant(), RenyiAccountant()))


def test_the_conversion_that_drops_alpha_is_caught():
    claimed = alpha_dropped(1.0, DELTA)
    assert claimed == pytest.approx(1.004, abs=2e-3)
    assert understated(claimed, [noise(math.sqrt(2))], DELTA)
    assert not understated(RenyiAccountant().epsilon([noise(math.sqrt(2))], DELTA), [noise(math.sqrt(2))], DELTA)


@pytest.mark.parametrize("mus", [[0.2, 0.2, 0.3, 0.3, 0.5], [1.0], [0.05], [3.0, 4.0]])
def test_the_three_accountants_agree_from_the_right_side(mus):
    releases = [noise(mu) for mu in mus]
    exact = GaussianAccountant().epsilon(releases, DELTA)
    assert exact <= LossAccountant().epsilon(releases, DELTA) <= exact * 1.01 + 5e-4
    assert exact <= RenyiAccountant().epsilon(releases, DELTA) <= exact * 1.15


def test_five_releases_compose_to_the_published_figure():
    releases = [noise(mu) for mu in (0.2, 0.2, 0.3, 0.3, 0.5)]
    assert GaussianAccountant().epsilon(releases, DELTA) == pytest.approx(2.97646, abs=6e-6)
    assert LossAccountant().epsilon(releases, DELTA) == pytest.approx(2.97646, abs=3e-4)


def test_accountants_leave_their_events_alone_and_know_no_order():
    releases = [noise(0.3), steps(), noise(0.1)]
    before = [release.to_json() for release in releases]
    for accountant in (GaussianAccountant(), RenyiAccountant(), LossAccountant(), SharedAccountant(9)):
        assert accountant.epsilon(releases, DELTA) == accountant.epsilon(releases[::-1], DELTA)
    assert [release.to_json() for release in releases] == before


def test_nothing_released_tells_nothing():
    for accountant in (GaussianAccountant(), RenyiAccountant(), LossAccountant(), SharedAccountant(3)):
        assert accountant.epsilon([], DELTA) == 0.0
        assert accountant.epsilon([noise(0.0)], DELTA) == 0.0


def test_a_release_without_noise_tells_all():
    bare = GaussianNoise(parameters=("w",), sensitivity=1.0, sigma=0.0)
    for accountant in (GaussianAccountant(), RenyiAccountant(), LossAccountant(), SharedAccountant(3)):
        assert accountant.epsilon([bare], DELTA) == math.inf
    assert mu_of_release(steps(sigma=0.0)) == math.inf


# Clipped gradients


def test_the_process_of_opposed_gradients_attains_the_bound():
    """Starts +-C0 and gradients that stay opposed: by closed form, and by the likelihood ratio of simulated runs."""
    start, gradient, lr, decay, count, sigma = 0.7, 0.4, 0.3, 0.5, 12, 0.9
    mu = clipped_steps_mu(start, gradient, lr, decay, count, sigma)
    rng = np.random.default_rng(0)
    runs, dimension = 100_000, 3
    direction = np.array([2.0, -1.0, 2.0]) / 3
    ends = []
    for side in (1, -1):
        w = np.tile(side * start * direction, (runs, 1))
        for _ in range(count):
            w = w - lr * (-side * gradient * direction + decay * w) + rng.normal(0, sigma, (runs, dimension))
        ends.append(w @ direction)
    spread = math.sqrt((ends[0].var() + ends[1].var()) / 2)
    assert (ends[0].mean() - ends[1].mean()) / spread == pytest.approx(mu, rel=0.01)
    loss = mu * (ends[0] / spread)  # log likelihood ratio of two Gaussians, symmetrical about 0
    for epsilon in (0.0, 0.5, 1.0):
        measured = np.maximum(0.0, -np.expm1(epsilon - loss)).mean()
        assert measured == pytest.approx(gaussian.delta_of(mu, epsilon), abs=6e-3)
        assert measured > gaussian.delta_of(0.95 * mu, epsilon)


def test_no_schedule_of_pulls_does_better_and_the_best_never_overshoots():
    start, gradient, lr, decay, count = 0.7, 0.4, 0.3, 0.5, 12
    r, c = 1 - lr * decay, 2 * lr * gradient
    powers = r ** np.arange(count)[::-1]
    shift = 2 * start * r**count + c * powers.sum()
    best = shift * powers / (powers**2).sum()

    def reaches(pulls):
        z = 2 * start
        for pull in pulls:
            z = max(0.0, r * z + c - pull)
        return z

    assert reaches(best) == pytest.approx(0.0, abs=1e-12)
    assert np.linalg.norm(best) == pytest.approx(clipped_steps_mu(start, gradient, lr, decay, count, 1.0))
    rng = np.random.default_rng(1)
    for _ in range(200):
        other = best * np.exp(0.3 * rng.normal(size=count))
        other *= 0.999 * np.linalg.norm(best) / np.linalg.norm(other)
        assert reaches(other) > 0


def test_a_start_alone_with_one_step_is_plain_noise():
    assert clipped_steps_mu(3.0, 0.0, 0.1, 0.0, 1, 2.0) == pytest.approx(2 * 3.0 / 2.0)
    assert clipped_steps_mu(3.0, 0.0, 0.5, 1.0, 1, 2.0) == pytest.approx(2 * 3.0 * 0.5 / 2.0)
    assert clipped_steps_mu(3.0, 1.0, 0.5, 2.0, 4, 2.0) == pytest.approx(2 * 0.5 * 1.0 / 2.0)  # all is forgotten


def test_the_limit_of_no_decay_is_continuous():
    at_zero = clipped_steps_mu(1.0, 0.5, 0.1, 0.0, 50, 1.0)
    assert at_zero == pytest.approx((2 * 1.0 + 2 * 0.1 * 0.5 * 50) / math.sqrt(50))
    for decay in (1e-14, 1e-10, 1e-7, 1e-5):
        assert clipped_steps_mu(1.0, 0.5, 0.1, decay, 50, 1.0) == pytest.approx(at_zero, rel=1e-3)
    halved = at_zero / math.sqrt(2)  # the fault of public code: half the variance in the branch without decay
    assert halved != pytest.approx(clipped_steps_mu(1.0, 0.5, 0.1, 1e-7, 50, 1.0), rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.3, 10.0])
def test_sigma_of_clipped_steps_is_the_inverse_of_mu(decay):
    sigma = clipped_steps_sigma(0.25, 1.0, 0.5, 0.1, decay, 30)
    assert clipped_steps_mu(1.0, 0.5, 0.1, decay, 30, sigma) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: clipped_steps_mu(1.0, 1.0, 0.1, 0.0, 0, 1.0),
        lambda: clipped_steps_mu(1.0, 1.0, 1.0, 1.5, 5, 1.0),
        lambda: clipped_steps_mu(-1.0, 1.0, 1.0, 0.5, 5, 1.0),
        lambda: clipped_steps_sigma(0.0, 1.0, 1.0, 0.1, 0.5, 5),
        lambda: model_clipping_delta(1.0, 1.0, 0, 1.0),
        lambda: model_clipping_delta(-1.0, 1.0, 2, 1.0),
        lambda: LossAccountant().epsilon([private(rate=1.5)], DELTA),
        lambda: RenyiAccountant().epsilon([private(noise=0.0)], DELTA),
    ],
    ids=["no step", "decay too large", "start<0", "mu 0", "no models", "epsilon<0", "rate>1", "no noise"],
)
def test_what_cannot_be_meant_is_refused(call):
    with pytest.raises(Misuse):
        call()


# Clipped models


@pytest.mark.parametrize(
    ("epsilon", "count", "ratio"),
    [
        *[(1, *pair) for pair in ((1, 7.461), (2, 2.335), (5, 1.056), (10, 0.749), (50, 0.475), (100, 0.420))],
        (1, 500, 0.340),
        *[(10, *pair) for pair in ((1, 1.000), (10, 0.400), (100, 0.290))],
    ],
)
def test_model_clipping_needs_the_published_noise(epsilon, count, ratio):
    sigma = model_clipping_sigma(epsilon, DELTA, 1.0, count)
    assert sigma == pytest.approx(ratio, abs=6e-4)
    assert model_clipping_sigma(epsilon, DELTA, 3.0, count) == pytest.approx(3 * sigma, rel=1e-9)
    back = model_clipping_epsilon(1.0, sigma, count, DELTA)
    assert back == pytest.approx(epsilon, rel=1e-6)
    assert model_clipping_delta(back, 1.0, count, sigma) <= DELTA


def test_the_process_that_sends_all_to_two_poles_attains_the_recursion():
    """Steps w -> +C where the one run prevails by more than e^epsilon, else -C: two-point laws, in closed form."""
    radius, sigma, epsilon, count = 0.8, 1.1, 0.4, 4
    grid = np.linspace(-12, 12, 2_000_001)
    at, width = grid, grid[1] - grid[0]
    poles = [stats.norm.pdf(at, side * radius, sigma) for side in (1, -1)]
    p, q = (1.0, 0.0), (0.0, 1.0)  # chances of the poles after the clip
    for t in range(1, count + 1):
        laws = [chance[0] * poles[0] + chance[1] * poles[1] for chance in (p, q)]
        over = laws[0] > math.exp(epsilon) * laws[1]
        measured = np.where(over, laws[0] - math.exp(epsilon) * laws[1], 0).sum() * width
        assert measured == pytest.approx(model_clipping_delta(epsilon, radius, t, sigma), rel=1e-5)
        high = [law[over].sum() * width for law in laws]
        p, q = (high[0], 1 - high[0]), (high[1], 1 - high[1])


def test_model_clipping_at_its_ends():
    assert model_clipping_epsilon(0.0, 1.0, 5, DELTA) == 0.0
    assert model_clipping_epsilon(1.0, 0.0, 5, DELTA) == math.inf
    assert model_clipping_epsilon(1.0, 1.0, 5, 0.0) == math.inf
    assert model_clipping_epsilon(1.0, 1e6, 3, DELTA) == 0.0
    assert model_clipping_sigma(1.0, DELTA, 0.0, 5) == 0.0
    assert model_clipping_delta(800.0, 1.0, 3, 0.02) > 0  # e^800 is no float
    assert model_clipping_delta(5000.0, 1.0, 50, 1.0) == 0.0


# DP-SGD


def test_private_steps_of_single_rows_agree_with_dp_accounting():
    dp, pld = importlib.import_module("dp_accounting"), importlib.import_module("dp_accounting.pld")
    release = private(rate=0.02, noise=1.5, steps=300)
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.5)), 300)
    theirs = pld.PLDAccountant().compose(event).get_epsilon(DELTA)
    ours = LossAccountant().epsilon([release], DELTA)
    assert theirs * (1 - 1e-3) <= ours <= theirs * 1.01
    assert ours <= RenyiAccountant().epsilon([release], DELTA) <= ours * 1.3
    both = LossAccountant().epsilon([release, noise(0.5)], DELTA)
    assert max(ours, gaussian.epsilon_of(0.5, DELTA)) < both <= RenyiAccountant().epsilon([release, noise(0.5)], DELTA)


def test_a_group_in_every_batch_is_a_gaussian_of_as_many_clipping_norms():
    release = private(rate=1.0, noise=40.0, steps=4, group=5)
    exact = gaussian.epsilon_of(math.sqrt(4) * 5 / 40.0, DELTA)
    assert exact <= LossAccountant().epsilon([release], DELTA) <= exact * 1.005
    alone = gaussian.epsilon_of(math.sqrt(4) / 40.0, DELTA)
    assert 5 * alone < exact  # m epsilon at the same delta would be a lie
    assert group_epsilon(release, DELTA) >= exact


@pytest.mark.parametrize("group", [2, 3, 8])
def test_a_group_costs_no_more_than_its_rows_and_more_than_one_of_them(group):
    one = LossAccountant().epsilon([private()], DELTA)
    together = LossAccountant().epsilon([private(group=group)], DELTA)
    assert one < together <= group_epsilon(private(group=group), DELTA)
    assert together > group * one  # at the same delta


def test_a_group_in_one_batch_is_the_mixture_that_it_is():
    rate, spread, group, epsilon = 0.2, 2.0, 3, 0.4
    rng = np.random.default_rng(0)
    shifts = rng.binomial(group, rate, 1_000_000)
    x = rng.normal(shifts, spread)
    chances = stats.binom.pmf(np.arange(group + 1), group, rate)
    ratio = sum(c * np.exp((k * x - k * k / 2) / spread**2) for k, c in enumerate(chances))
    delta = np.maximum(0.0, 1 - math.exp(epsilon) / ratio).mean()
    release = private(rate=rate, noise=spread, steps=1, group=group)
    assert LossAccountant().epsilon([release], float(delta)) == pytest.approx(epsilon, abs=0.02)


def test_one_row_by_way_of_groups_is_one_row():
    assert group_epsilon(private(), DELTA) == pytest.approx(LossAccountant().epsilon([private()], DELTA), rel=1e-6)
    assert group_epsilon(private(noise=0.5, group=400), DELTA) == math.inf


# What is supported


@pytest.mark.parametrize(
    ("accountant", "release"),
    [
        (GaussianAccountant(), models()),
        (GaussianAccountant(), private()),
        (RenyiAccountant(), models()),
        (RenyiAccountant(), private(group=2)),
        (LossAccountant(), models()),
        (SharedAccountant(3), Release(parameters=("w",))),
    ],
)
def test_an_accountant_refuses_what_it_does_not_support(accountant, release):
    error = accountant.supports(release)
    assert isinstance(error, Unsupported)
    with pytest.raises(Unsupported, match=type(release).__name__ if release != private(group=2) else "groups of 2"):
        accountant.epsilon([noise(0.1), release], DELTA)


@pytest.mark.parametrize("accountant", [RenyiAccountant(), LossAccountant(), SharedAccountant(3)])
def test_without_dp_accounting_the_message_says_how_to_get_it(accountant, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(composition.importlib, "import_module", missing)
    with pytest.raises(Unsupported, match=r"pip install expunge\[private\]"):
        accountant.epsilon([private(steps=999)], DELTA)
    assert SharedAccountant(3).epsilon([noise(0.5)], DELTA) == gaussian.epsilon_of(0.5, DELTA)


# Budgets


def test_the_shared_accountant_is_exact_where_all_have_a_mu():
    releases = [noise(0.1), steps(), noise(0.2)]
    assert SharedAccountant(50).epsilon(releases, DELTA) == GaussianAccountant().epsilon(releases, DELTA)


def test_the_shared_accountant_adds_epsilons_and_deltas():
    releases = [noise(0.3), models(), noise(0.4), models(sigma=3.0), private()]
    parts = [
        gaussian.epsilon_of(0.5, DELTA * 7 / 10),
        model_clipping_epsilon(1.0, 2.0, 10, DELTA / 10),
        model_clipping_epsilon(1.0, 3.0, 10, DELTA / 10),
        LossAccountant().epsilon([private()], DELTA / 10),
    ]
    assert SharedAccountant(10).epsilon(releases, DELTA) == pytest.approx(math.fsum(parts), rel=1e-12)
    with pytest.raises(Misuse, match="shared by 4"):
        SharedAccountant(4).epsilon(releases, DELTA)


def test_what_is_spent_never_falls():
    kinds = [noise(0.3), models(), steps(sigma=9.0), noise(0.0), private(), models(sigma=40.0), noise(1e-6)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = [kinds[i] for i in rng.integers(0, len(kinds), 12)]
        spent = [SharedAccountant(12).epsilon(order[:k], DELTA) for k in range(13)]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(spent))


@pytest.mark.parametrize("requests", [1, 2, 7, 100])
def test_a_budget_lasts_for_exactly_its_releases(requests):
    budget = Budget(epsilon=1.0, delta=DELTA, requests=requests)
    releases = []
    for k in range(requests):
        release = GaussianNoise(parameters=("w",), sensitivity=budget.cap(0.3), sigma=0.3)
        spent = charge(releases, release, budget)
        assert spent.releases == k + 1
        assert spent.mu == pytest.approx(budget.mu_each * math.sqrt(k + 1))
        releases.append(release)
    assert spent.epsilon == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(BudgetExhausted, match=f"{requests} were made"):
        charge(releases, release, budget)
    with pytest.raises(BudgetExhausted):
        charge(releases, noise(0.0), budget)  # even one that tells nothing: the number was agreed on too


def test_a_release_larger_than_its_share_is_refused_when_the_rest_is_spent_and_not_before():
    budget = Budget(epsilon=1.0, delta=DELTA, requests=4)
    half = noise(budget.mu_each * math.sqrt(2))
    assert charge([half], half, budget).epsilon == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(BudgetExhausted):
        charge([half, half], noise(0.1), budget)
    with pytest.raises(BudgetExhausted):
        charge([], noise(budget.mu * 1.001), budget)
    with pytest.raises(BudgetExhausted):
        charge([], GaussianNoise(parameters=(), sensitivity=1.0, sigma=0.0), budget)


def test_a_budget_holds_releases_that_have_no_mu():
    budget = Budget(epsilon=2.0, delta=DELTA, requests=4)
    share = models(sigma=model_clipping_sigma(0.5, DELTA / 4, 1.0, 10))
    releases = []
    for k in range(4):
        spent = charge(releases, share, budget)
        assert spent.mu is None
        assert spent.epsilon == pytest.approx(0.5 * (k + 1), rel=1e-6)
        releases.append(share)
    with pytest.raises(BudgetExhausted):
        charge(releases, share, budget)
    with pytest.raises(BudgetExhausted):
        charge(releases[:3], models(sigma=share.sigma / 2), budget)
    dear = private(rate=0.01, noise=1.0, steps=1000)
    assert charge([], dear, Budget(epsilon=3.0, delta=DELTA, requests=2)).epsilon < 3.0
    with pytest.raises(BudgetExhausted):
        charge([], dear, budget)


@pytest.mark.parametrize(
    "wrong", [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"delta": 1.0}, {"requests": 0}]
)
def test_a_budget_that_means_nothing_is_refused(wrong):
    with pytest.raises(Misuse, match=next(iter(wrong))):
        Budget(**wrong)
