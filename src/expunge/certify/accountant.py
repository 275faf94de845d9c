"""What releases of noise have spent, one by one and all together; accountants read events and never change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.certify import gaussian
from expunge.core.claim import Spent
from expunge.core.errors import BudgetExhausted, Misuse
from expunge.core.events import ClippedSteps, GaussianNoise, Release


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What all certified removals of a model together may tell, agreed on before the first request.

    Each of `requests` releases gets an equal share, ``mu / sqrt(requests)``, whatever it turns out to need, so that
    requests may be chosen with knowledge of all releases before. A request may name many rows: they count once.

    Attributes:
        epsilon: of the whole transcript, relative to a provider that retrains for every request and adds equal noise.
        delta: of the whole transcript.
        requests: how many releases there may be.
    """

    epsilon: float = 1.0
    delta: float = 1e-5
    requests: int = 100

    def __post_init__(self) -> None:
        checks = [
            (0 < self.epsilon < math.inf, f"epsilon must be > 0 and finite, got {self.epsilon}"),
            (0 < self.delta < 1, f"delta must be > 0 and < 1, got {self.delta}; usual is less than 1 / rows"),
            (
                isinstance(self.requests, int) and self.requests >= 1,
                f"requests must be an integer >= 1, got {self.requests}",
            ),
        ]
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    @property
    def mu(self) -> float:
        """Of the whole transcript."""
        return gaussian.mu_of(self.epsilon, self.delta)

    @property
    def mu_each(self) -> float:
        """The share of one release."""
        return self.mu / math.sqrt(self.requests)

    def cap(self, sigma: float) -> float:
        """The L2 distance from the reference that noise of this size hides within one release's share."""
        return self.mu_each * sigma


def mu_of_release(release: Release) -> float | None:
    """The Gaussian differential privacy parameter of one release, or None if its kind has none."""
    if isinstance(release, GaussianNoise):
        return release.sensitivity / release.sigma if release.sigma > 0 else math.inf
    if isinstance(release, ClippedSteps):
        return clipped_steps_mu(
            release.start, release.gradient, release.lr, release.weight_decay, release.steps, release.sigma
        )
    return None


def clipped_steps_mu(start: float, gradient: float, lr: float, weight_decay: float, steps: int, sigma: float) -> float:
    r"""The mu between two runs of noisy clipped steps on the same rows from starts that differ in any way.

    :math:`\mu^2 = (2 C_0 r^T + 2 \eta C_1 \sum_{k<T} r^k)^2 / (\sigma^2 \sum_{k<T} r^{2k})`, `r = 1 - lr weight_decay`.

    Proof: run both with the same noise, and pull the first towards the second by :math:`a_t` in step t. Who watches
    the noise sees Gaussians shifted by at most :math:`a_t`, chosen adaptively: mu is at most
    :math:`\sqrt{\sum a_t^2} / \sigma`. Their distance obeys :math:`z_{t+1} \le r z_t + 2 \eta C_1 - a_t` from
    :math:`z_0 \le 2 C_0`, and the smallest such sum with :math:`z_T = 0` is the one above (Cauchy-Schwarz). It is the
    Renyi bound of Koloskova et al. (2025), without the loss of going through Renyi divergence.

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


def charge(before: Sequence[Release], release: Release, budget: Budget) -> Spent:
    """What all releases have spent with this one; nothing is written anywhere.

    Raises:
        BudgetExhausted: if it would be more than the budget; the message names what can be done.
    """
    together = (*before, release)
    mus = [mu_of_release(one) for one in together]
    known = [mu for mu in mus if mu is not None]
    mu = gaussian.compose(known) if len(known) == len(mus) else None
    epsilon = math.inf if mu is None else gaussian.epsilon_of(mu, budget.delta)
    if len(together) > budget.requests or epsilon > budget.epsilon * (1 + 1e-6):
        raise BudgetExhausted(
            f"the budget (epsilon {budget.epsilon:g}, delta {budget.delta:g}) for {budget.requests} releases "
            f"is spent: {len(before)} were made, and one more would come to epsilon {epsilon:.4g}; retrain (exact, "
            f"spends nothing), collect requests into fewer releases, or agree on a new budget and begin a new transcript"
        )
    return Spent(
        epsilon=epsilon,
        delta=budget.delta,
        mu=mu,
        releases=len(together),
        budget_epsilon=budget.epsilon,
        budget_releases=budget.requests,
    )
