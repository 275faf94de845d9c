"""What noisy steps tell of their start: clipped gradients (mu), or clipped models (a profile, and no mu).

Both formulas compare two runs of the same steps on the same rows from starts that differ in any way, and ask nothing of
the loss. Sources: Koloskova et al. (2025); the proofs here are given in full.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq

from expunge.certify import gaussian
from expunge.core.errors import Misuse


def clipped_steps_mu(start: float, gradient: float, lr: float, weight_decay: float, steps: int, sigma: float) -> float:
    r"""The mu between two runs of noisy clipped steps on the same rows from starts that differ in any way.

    :math:`\mu^2 = (2 C_0 r^T + 2 \eta C_1 \sum_{k<T} r^k)^2 / (\sigma^2 \sum_{k<T} r^{2k})`, `r = 1 - lr weight_decay`.

    Proof: run both with the same noise, and pull the first towards the second by :math:`a_t` in step t. Who watches
    the noise sees Gaussians shifted by at most :math:`a_t`, chosen adaptively: mu is at most
    :math:`\sqrt{\sum a_t^2} / \sigma`. Their distance obeys :math:`z_{t+1} \le \max(0, r z_t + 2 \eta C_1 - a_t)` from
    :math:`z_0 \le 2 C_0`. The smallest such sum with :math:`z_T = 0` is the one above (Cauchy-Schwarz), at
    :math:`a_t \propto r^{T-1-t}`; a pull that would overshoot stops at 0, and what follows is then pulled enough, as
    :math:`\sum_{k<K} r^k / \sum_{k<K} r^{2k}` grows with K. It is the Renyi bound of Koloskova et al. (2025), without
    the loss of going through Renyi divergence. It is attained by starts :math:`\pm C_0` with gradients that stay
    opposed, so nothing can be taken off it without knowing more of the gradients.

    Raises:
        Misuse: unless ``0 <= lr weight_decay <= 1`` and there is at least one step.
    """
    shrink = 1 - lr * weight_decay
    if not 0 <= shrink <= 1 or steps < 1 or min(start, gradient, lr) < 0:
        raise Misuse(f"need steps >= 1 and 0 <= lr weight_decay <= 1, got {steps}, {lr} and {weight_decay}")
    if not sigma > 0:
        return math.inf
    powers = [shrink**k for k in range(steps)]
    shift = 2 * start * shrink**steps + 2 * lr * gradient * math.fsum(powers)
    return shift / (sigma * math.sqrt(math.fsum(power * power for power in powers)))


def clipped_steps_sigma(mu: float, start: float, gradient: float, lr: float, weight_decay: float, steps: int) -> float:
    """The smallest noise a step with which `clipped_steps_mu` is `mu`: they are inversely proportional.

    Raises:
        Misuse: unless mu > 0, and as `clipped_steps_mu`.
    """
    if not mu > 0:
        raise Misuse(f"mu must be > 0, got {mu}")
    return clipped_steps_mu(start, gradient, lr, weight_decay, steps, 1.0) / mu


def model_clipping_delta(epsilon: float, radius: float, steps: int, sigma: float) -> float:
    r"""The delta, at this epsilon, between two runs of ``w <- clip(any step(w), radius) + N(0, sigma^2)``.

    :math:`\delta_{t+1} = \delta_t \theta_{\epsilon_t}(2 C / \sigma)` with :math:`\epsilon_t = \ln(1 + (e^\epsilon - 1)
    / \delta_t)`, :math:`\delta_0 = 1`, and :math:`\theta_\epsilon(\mu)` the smallest delta of Gaussian noise at mu
    (Koloskova et al., 2025).

    Proof of a step: with :math:`\delta_t = E_\gamma(P, Q)`, :math:`\gamma = e^\epsilon`, write P as :math:`(1 -
    \delta_t) R + \delta_t P'` and Q as :math:`(1 - \delta_t) / \gamma R` and the rest, a multiple of Q', where
    :math:`R \propto \min(P, \gamma Q)`. After any kernel K, :math:`E_\gamma(PK, QK)` is at most :math:`\delta_t`
    times the divergence of P'K and Q'K at :math:`e^{\epsilon_t}`, and a clip and noise keep any two points within
    mu = 2 C / sigma (advanced joint convexity: Balle et al., 2018). Attained by a step that sends those places where P
    prevails to one pole of the ball and all others to the opposite one.

    Raises:
        Misuse: unless radius >= 0, sigma > 0, epsilon >= 0 and there is at least one step.

    Cost: one evaluation of the Gaussian profile a step.
    """
    if not (radius >= 0 and sigma > 0 and epsilon >= 0 and steps >= 1):
        raise Misuse(
            f"need radius >= 0, sigma > 0, epsilon >= 0, steps >= 1, got {radius}, {sigma}, {epsilon} and {steps}"
        )
    mu, delta = 2 * radius / sigma, 1.0
    above = _log_expm1(epsilon)
    for _ in range(steps):
        if delta == 0:
            break
        odds = above - math.log(delta)
        delta *= gaussian.delta_of(mu, odds + math.log1p(math.exp(-odds)) if odds > 0 else math.log1p(math.exp(odds)))
    return delta


def model_clipping_epsilon(radius: float, sigma: float, steps: int, delta: float) -> float:
    """Smallest epsilon >= 0 at this delta of `model_clipping_delta`; infinite if delta is 0. Rounded up by 10^-9.

    Raises:
        Misuse: unless 0 <= delta < 1, and as `model_clipping_delta`.
    """
    high = gaussian.epsilon_of(2 * radius / sigma if sigma > 0 else math.inf, delta)  # of the last step alone
    if steps == 1 or not 0 < high < math.inf:
        return high
    if model_clipping_delta(0.0, radius, steps, sigma) <= delta:
        return 0.0
    root = brentq(
        lambda e: model_clipping_delta(e, radius, steps, sigma) - delta, 0.0, 2 * high, xtol=1e-13, rtol=1e-13
    )
    return (float(root) + 1e-12) * (1 + 1e-9)


def model_clipping_sigma(epsilon: float, delta: float, radius: float, steps: int) -> float:
    """Smallest noise a step with which `steps` clipped and noised models are (epsilon, delta). Rounded up by 10^-9.

    Raises:
        Misuse: unless epsilon >= 0, 0 < delta < 1, radius >= 0 and there is at least one step.
    """
    single = gaussian.sigma_of(epsilon, delta, 2 * radius)
    if steps == 1 or radius == 0:
        return single
    low = single
    while model_clipping_delta(epsilon, radius, steps, low) <= delta:
        low /= 2

    def apart(log: float) -> float:
        # The double of one step's noise is always enough: more steps tell less.
        return math.log(max(model_clipping_delta(epsilon, radius, steps, math.exp(log)), 1e-300)) - math.log(delta)

    root = brentq(apart, math.log(low), math.log(2 * single), xtol=1e-13, rtol=1e-13)
    return math.exp(root) * (1 + 1e-9)


def _log_expm1(value: float) -> float:
    if value == 0:
        return -math.inf
    return value + math.log(-math.expm1(-value))
