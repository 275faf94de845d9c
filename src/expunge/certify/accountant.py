"""What all certified removals of a model may tell together, and what they have spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.certify import gaussian
from expunge.certify.clipping import clipped_steps_mu, clipped_steps_sigma
from expunge.certify.composition import GaussianAccountant, SharedAccountant, mu_of_release
from expunge.core.claim import Spent
from expunge.core.errors import BudgetExhausted, Misuse
from expunge.core.events import Release

__all__ = ["Budget", "charge", "clipped_steps_mu", "clipped_steps_sigma", "mu_of_release"]


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


def charge(before: Sequence[Release], release: Release, budget: Budget) -> Spent:
    """What all releases have spent with this one; nothing is written anywhere.

    Releases that have a mu are composed exactly; those that have none get ``delta / requests`` each, and their epsilons
    are added (`SharedAccountant`).

    Raises:
        BudgetExhausted: if it would be more than the budget; the message names what can be done.
        Unsupported: if one is of DP-SGD and dp_accounting is not installed.
    """
    together = (*before, release)
    known = all(mu_of_release(one) is not None for one in together)
    mu = GaussianAccountant().mu(together) if known else None
    fits = len(together) <= budget.requests
    epsilon = SharedAccountant(max(budget.requests, len(together))).epsilon(together, budget.delta)
    if not fits or epsilon > budget.epsilon * (1 + 1e-6):
        over = f", and one more would come to epsilon {epsilon:.4g}" if fits else ", as many as were agreed on"
        raise BudgetExhausted(
            f"the budget (epsilon {budget.epsilon:g}, delta {budget.delta:g}) for {budget.requests} releases "
            f"is spent: {len(before)} were made{over}; retrain (exact, "
            f"spends nothing), collect requests into fewer releases, or agree on a new budget for a new transcript"
        )
    return Spent(
        epsilon=epsilon,
        delta=budget.delta,
        mu=mu,
        releases=len(together),
        budget_epsilon=budget.epsilon,
        budget_releases=budget.requests,
    )
