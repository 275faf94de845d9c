"""The Gaussian mechanism against numbers computed elsewhere, quadrature, and a mechanism that is simulated."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import integrate, stats

from expunge.certify import gaussian
from expunge.core.errors import Misuse

DELTA = 1e-5


@pytest.mark.parametrize(
    ("epsilon", "sigma"),
    [(0.1, 30.74957), (0.5, 7.03183), (1, 3.73063), (2, 1.99381), (5, 0.89187), (10, 0.49989), (50, 0.14976)],
)
def test_sigma_is_the_published_one(epsilon, sigma):
    assert gaussian.sigma_of(epsilon, DELTA) == pytest.approx(sigma, abs=6e-6)
    assert gaussian.sigma_of(epsilon, DELTA, 7.0) == pytest.approx(7 * sigma, rel=1e-4)
    assert gaussian.sigma_of(epsilon, DELTA) == pytest.approx(
        dp_accounting.get_sigma_gaussian(epsilon, DELTA), rel=1e-6
    )


@pytest.mark.parametrize(("mu", "epsilon"), [(0.2, 0.72552), (0.5, 1.99309), (1, 4.37718), (2, 9.99726)])
def test_epsilon_is_the_published_one(mu, epsilon):
    assert gaussian.epsilon_of(mu, DELTA) == pytest.approx(epsilon, abs=6e-6)
    assert gaussian.epsilon_of(mu, DELTA) == pytest.approx(dp_accounting.get_epsilon_gaussian(1 / mu, DELTA), rel=1e-6)


def test_a_large_mu_does_not_overflow():
    assert gaussian.epsilon_of(4000.0, DELTA) == pytest.approx(8.017e6, rel=1e-4)
    assert gaussian.delta_of(4000.0, 1.0) == 1.0
    assert gaussian.delta_of(1e-3, 1e4) == 0.0


def test_delta_is_the_published_one_and_that_of_simulated_releases():
    assert gaussian.delta_of(0.5, 0.3) == pytest.approx(0.096353, abs=5e-7)
    draws = np.random.default_rng(0).normal(0.5, 1.0, 2_000_000)
    loss = 0.5 * draws - 0.125
    measured = np.maximum(0.0, -np.expm1(0.3 - loss)).mean()
    assert measured == pytest.approx(0.096353, abs=6e-4)


@pytest.mark.parametrize("mu", [1e-7, 0.9e-5, 1.1e-5, 1e-3, 0.2, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("at", [-2.0, 0.0, 0.5, 2.0, 4.0])
def test_delta_is_the_integral_of_its_slope(mu, at):
    # d delta / d mu = phi(mu / 2 - epsilon / mu): no term of it cancels, whatever mu.
    epsilon = mu * at
    start = max(0.0, -math.expm1(epsilon))
    points = sorted(mu * share for share in (0.01, 0.03, 0.1, 0.3, 0.6, 0.9, 1.0))
    total = start
    for low, high in zip([mu * 1e-6, *points], points, strict=False):
        total += integrate.quad(lambda m: stats.norm.pdf(m / 2 - epsilon / m), low, high, epsabs=0, epsrel=1e-12)[0]
    lost = mu * 1e-6 * 0.4 if at == 0 else 0.0  # the piece next to 0
    assert gaussian.delta_of(mu, epsilon) == pytest.approx(total + lost, rel=1e-7, abs=0)


@pytest.mark.parametrize("mu", [1e-6, 0.01, 0.2, 1.0, 10.0])
def test_mu_and_epsilon_undo_each_other_on_the_safe_side(mu):
    delta = min(DELTA, gaussian.delta_of(mu, 0.0) / 10)
    epsilon = gaussian.epsilon_of(mu, delta)
    assert gaussian.delta_of(mu, epsilon) <= delta
    assert gaussian.delta_of(mu, epsilon * (1 - 1e-5)) > delta
    back = gaussian.mu_of(epsilon, delta)
    assert back == pytest.approx(mu, rel=1e-5)
    assert gaussian.delta_of(back, epsilon) <= delta


def test_the_smallest_mu_there_is_is_not_taken_for_nothing():
    assert gaussian.mu_of(0.0, 1e-20) == pytest.approx(1e-20 * math.sqrt(2 * math.pi), rel=1e-6, abs=0)
    assert gaussian.epsilon_of(1e-12, 1e-14) > 0


def test_no_noise_and_no_shift():
    assert gaussian.delta_of(0.0, 1.0) == 0.0
    assert gaussian.delta_of(0.0, -1.0) == pytest.approx(1 - math.exp(-1))
    assert gaussian.delta_of(math.inf, 5.0) == 1.0
    assert gaussian.epsilon_of(0.0, 0.0) == 0.0
    assert gaussian.epsilon_of(math.inf, DELTA) == math.inf
    assert gaussian.epsilon_of(0.1, 0.0) == math.inf


def test_the_textbook_formula_says_too_little_above_one_and_too_much_at_one():
    assert gaussian.epsilon_of(1 / gaussian.classical_sigma(10.0, DELTA), DELTA) == pytest.approx(10.39, abs=0.01)
    assert gaussian.epsilon_of(1 / gaussian.classical_sigma(50.0, DELTA), DELTA) == pytest.approx(96.4, abs=0.05)
    assert gaussian.classical_sigma(1.0, DELTA) / gaussian.sigma_of(1.0, DELTA) == pytest.approx(1.3, abs=0.01)


def test_releases_compose_to_the_published_figure():
    together = gaussian.compose([0.2, 0.2, 0.3, 0.3, 0.5])
    assert together == pytest.approx(0.71414, abs=1e-5)
    assert gaussian.epsilon_of(together, DELTA) == pytest.approx(2.97646, abs=6e-6)
    assert gaussian.compose([]) == 0.0
    assert gaussian.compose([1.0, math.inf]) == math.inf


def test_composition_is_that_of_two_coordinates_and_not_of_one_after_the_other():
    first, second = 0.9, 1.2
    rng = np.random.default_rng(1)
    x, y = rng.normal(first, 1, 1_000_000), rng.normal(second, 1, 1_000_000)
    loss = first * x - first**2 / 2 + second * y - second**2 / 2
    measured = np.maximum(0.0, -np.expm1(0.5 - loss)).mean()
    assert measured == pytest.approx(gaussian.delta_of(gaussian.compose([first, second]), 0.5), abs=1.5e-3)
    assert abs(measured - gaussian.delta_of(first + second, 0.5)) > 0.05


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian.delta_of(-1.0, 1.0),
        lambda: gaussian.delta_of(math.nan, 1.0),
        lambda: gaussian.epsilon_of(1.0, 1.0),
        lambda: gaussian.epsilon_of(1.0, -0.1),
        lambda: gaussian.mu_of(1.0, 0.0),
        lambda: gaussian.mu_of(-1.0, 0.1),
        lambda: gaussian.sigma_of(1.0, 0.1, -1.0),
        lambda: gaussian.classical_sigma(0.0, 0.1),
    ],
    ids=["mu<0", "mu nan", "delta 1", "delta<0", "no delta", "epsilon<0", "sensitivity<0", "epsilon 0"],
)
def test_what_cannot_be_meant_is_refused(call):
    with pytest.raises(Misuse):
        call()
