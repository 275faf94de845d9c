r"""The rank test: an owner's secret trigger among fresh draws of such triggers, on one model and the same queries.

Let s_0 be the hits of the owner's trigger and s_1 to s_m those of fresh draws with the same target. If the model and
the queries are independent of the owner's trigger given its target (deleted, or never trained), then all m + 1 triggers
are iid given model and queries, and so (s_0, ..., s_m) is exchangeable. The p-value is

    p = (1 + #{i >= 1: s_i >= s_0}) / (m + 1) = c_0 / (m + 1),   c_j = #{i >= 0: s_i >= s_j}.

Claim: P(p <= alpha) <= floor(alpha (m + 1)) / (m + 1) <= alpha, for every model, every choice of queries, and every
pattern of ties. Proof: let r = floor(alpha (m + 1)) and J = {j: c_j <= r}. If J is not empty, let j in J have the
smallest s. Every i in J has s_i >= s_j and is counted by c_j, so |J| <= c_j <= r. By exchangeability each j is in J
with the same probability, so P(p <= alpha) = P(0 in J) = E|J| / (m + 1) <= r / (m + 1). Ties make J smaller, never
larger; without ties |J| = r and equality holds.

Any statistic that treats all triggers alike will do. Given a reference model that knows none of them, s_i is the hits
less those on the reference, which takes away what a trigger does to any model; that p compares s_0 to s_i, or the hits
of the owner's trigger to s_i plus its own hits on the reference, is the same.

No binomial law, no known rate and no bound on how rates differ between triggers are assumed. Without the "1 +" the
owner's own place is not counted, c_0 is too small by one, and the error is up to 1 / (m + 1) too large.

For several owners, s_i is the sum over owners of the hits of the i-th draw of each; the vectors of triggers are iid
given the targets, so the same proof holds. Combining owners' p-values as if independent (Fisher, Stouffer) would not
be valid: they share a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from expunge.core.errors import Misuse
from expunge.verify.binomial import hits_of_several, lower

_TRIES = 100
_MOST_QUERIES = 5_000


def rank_p_value(secret: int, draws: Int[Tensor, " m"]) -> float:
    """``(1 + #{draws >= secret}) / (m + 1)``: proof above."""
    if draws.dim() != 1 or not len(draws):
        raise Misuse(f"a rank needs one draw or more, got shape {tuple(draws.shape)}")
    return (1 + int((draws >= secret).sum())) / (len(draws) + 1)


def least_draws(alpha: float) -> int:
    """Draws that an alpha takes at least: with fewer, no p-value can be as small."""
    if not 0 < alpha < 1:
        raise Misuse(f"alpha must lie between 0 and 1, got {alpha}")
    m = max(1, math.floor(1 / alpha) - 2)
    while 1 / (m + 1) > alpha:
        m += 1
    return m


def critical_hits(draws: Int[Tensor, "m *tries"], alpha: float) -> Int[Tensor, "*tries"]:
    """The fewest hits with which the rank test rejects, given those of the draws: one more than the r-th best draw's.

    Raises:
        Misuse: for fewer draws than `least_draws`.
    """
    return _bar(draws, alpha) + 1


def _bar(draws: Tensor, alpha: float) -> Tensor:
    """What the secret trigger must exceed: the r-th best draw, r = floor(alpha (m + 1))."""
    total = len(draws) + 1
    if len(draws) < least_draws(alpha):
        raise Misuse(f"alpha = {alpha:g} takes {least_draws(alpha):,} draws or more, got {len(draws):,}")
    places = math.floor(alpha * total) + 1
    while places / total > alpha:  # the same division as in the p-value, so that both decide alike
        places -= 1
    return draws.topk(places, dim=0).values[-1]


def noticed_for_sure(n: tuple[int, ...], rates: tuple[float, ...], missed: float) -> int:
    """kappa = max{k: P(sum of Bin(n_i, rate_i) < k) <= missed}: hits that a trigger which works is sure to reach."""
    below = torch.from_numpy(hits_of_several(n, rates)).cumsum(0)  # P(K < k + 1)
    return int((below <= missed).sum())


def rank_queries_needed(
    hits: Sequence[Int[Tensor, "m queries"]],
    success: Sequence[float],
    *,
    alpha: float,
    beta: float,
    rng: Generator,
    often: float = 0.9,
) -> int | None:
    """Queries per owner, before as well as after deletion, with which a verdict would be decisive: by simulation.

    Queries are drawn again with replacement out of those asked, so that what they do to all draws at once is kept, 100
    times for each number; numbers grow by a fifth. The draws' rates are taken to be after as they were before, and the
    owners' own triggers to go on succeeding as they did.

    Args:
        hits: for each owner, which draw (rows) hit on which query (columns).
        success: share of the queries on which each owner's own trigger hit.
        alpha: of the rank test.
        beta: half of it for the bounds of the rates of success, half for `noticed_for_sure`.
        rng: names the coins; is drawn from.
        often: share of the simulated tests that are decisive.

    Returns:
        The first number tried that suffices; None if 5,000 do not, or draws do as well as the
        triggers. An estimate, no bound.

    Cost: one matrix product of (m, queries) by (queries, 100) for each number tried.
    """
    rates_of_draws = torch.stack([one.double().mean(1) for one in hits]).sum(0)
    if float(_bar(rates_of_draws, alpha)) >= sum(success):
        return None
    n = 4
    while n < _MOST_QUERIES:
        n = math.ceil(1.2 * n)
        rates = lowest([round(share * n) for share in success], [n] * len(success), beta / 2)
        sure = noticed_for_sure((n,) * len(rates), rates, beta / 2)
        if float((critical_hits(_resampled(hits, n, rng), alpha) <= sure).double().mean()) >= often:
            return n
    return None


def lowest(hits: Sequence[int], asked: Sequence[int], error: float) -> tuple[float, ...]:
    """Lower bounds of several owners' rates: that any is too high has probability `error` at most (Bonferroni)."""
    return tuple(lower(k, n, error / len(hits)) for k, n in zip(hits, asked, strict=True))


def _resampled(hits: Sequence[Tensor], n: int, rng: Generator) -> Tensor:
    total = torch.zeros(len(hits[0]), _TRIES)
    for one in hits:
        drawn = torch.randint(one.shape[1], (n, _TRIES), generator=rng)
        times = torch.zeros(one.shape[1], _TRIES).scatter_add_(0, drawn, torch.ones(n, _TRIES))
        total += one.float() @ times
    return total.round().long()
