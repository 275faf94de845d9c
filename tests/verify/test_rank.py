"""The rank test: its size by enumeration and by simulation, its critical hits, and the queries that it takes."""

import itertools

import numpy as np
import pytest
import torch

from expunge import generator
from expunge.core.errors import Misuse
from expunge.verify.binomial import BinomialTest, at_least, below, lower
from expunge.verify.rank import critical_hits, least_draws, noticed_for_sure, rank_p_value, rank_queries_needed


def share_rejected(scores, alpha, p_value=rank_p_value):
    """The test's exact size given the multiset of scores: each of them is the owner's with the same chance."""
    values = torch.tensor(scores)
    rejected = [p_value(int(values[j]), torch.cat([values[:j], values[j + 1 :]])) <= alpha for j in range(len(scores))]
    return sum(rejected) / len(scores)


def forgets_the_one(secret, draws):
    return int((draws >= secret).sum()) / len(draws)


def does_not_count_ties(secret, draws):
    return (1 + int((draws > secret).sum())) / (len(draws) + 1)


def patterns():
    """All score multisets of 4 to 7 triggers with up to 4 values, ties and all."""
    for size in range(4, 8):
        yield from itertools.combinations_with_replacement(range(4), size)


ALPHAS = (0.05, 0.15, 0.2, 0.25, 1 / 3, 0.5, 0.9)


def test_the_size_is_exact_without_ties_and_never_above_alpha_with_them():
    for scores, alpha in itertools.product(patterns(), ALPHAS):
        total = len(scores)
        allowed = max(r for r in range(total + 1) if r / total <= alpha) / total
        assert share_rejected(scores, alpha) <= allowed <= alpha
        assert share_rejected(range(total), alpha) == allowed


@pytest.mark.parametrize("liar", [forgets_the_one, does_not_count_ties])
def test_a_rank_that_forgets_the_one_or_the_ties_accuses_too_often(liar):
    assert any(share_rejected(scores, 0.2, liar) > 0.2 for scores in patterns())


def test_size_over_models_whose_triggers_differ_and_share_queries_where_a_binomial_test_accuses_too_often():
    rng, m, n, tries, alpha = np.random.default_rng(0), 39, 20, 2000, 0.05
    rank = naive = 0
    for _ in range(tries):
        luck, ease = rng.normal(-2, 1.5, m + 1), rng.normal(0, 1, n)  # of each trigger, and of each query for all
        hits = (luck[:, None] + ease + rng.logistic(size=(m + 1, n)) > 0).sum(1)
        rank += rank_p_value(int(hits[0]), torch.from_numpy(hits[1:])) <= alpha
        naive += BinomialTest(n=n, q=float(hits[1:].mean()) / n, p=1.0, alpha=alpha).accuses(int(hits[0]))
    assert rank / tries <= alpha + 3 * (alpha / tries) ** 0.5
    assert naive / tries > 2 * alpha


def test_critical_hits_and_p_value_decide_alike():
    rng = generator(0)
    for m, alpha in ((19, 0.05), (20, 0.05), (39, 0.07), (999, 0.001), (99, 0.29)):
        draws = torch.randint(0, 12, (m,), generator=rng)
        critical = int(critical_hits(draws, alpha))
        for secret in range(14):
            assert (rank_p_value(secret, draws) <= alpha) == (secret >= critical)


@pytest.mark.parametrize(("alpha", "draws"), [(0.5, 1), (0.05, 19), (1e-3, 999), (1e-4, 9999), (0.3, 3), (1 / 3, 2)])
def test_least_draws(alpha, draws):
    assert least_draws(alpha) == draws
    assert 1 / (draws + 1) <= alpha < 1 / draws


def test_hits_that_are_sure_are_those_of_the_binomial():
    for n, p, missed in ((30, 0.8, 1e-3), (10, 0.5, 0.05), (5, 0.1, 0.01), (4, 1.0, 0.01)):
        sure = noticed_for_sure((n,), (p,), missed)
        assert below(n, sure, p) <= missed < below(n, sure + 1, p)
    assert noticed_for_sure((10, 20), (0.5, 0.5), 0.01) == noticed_for_sure((30,), (0.5,), 0.01)


def test_queries_needed_fall_with_the_triggers_success_and_rise_with_the_luck_of_draws():
    rng = generator(3)
    quiet = (torch.rand(199, 60, generator=rng) < 0.05).long()
    loud = (torch.rand(199, 60, generator=rng) < 0.3).long()

    def needed(hits, success):
        return rank_queries_needed([hits], [success], alpha=0.01, beta=0.01, rng=generator(0))

    assert needed(quiet, 0.95) < needed(quiet, 0.6) < needed(loud, 0.6)
    assert needed(loud, 0.3) is None
    asked = needed(quiet, 0.6)
    rate = lower(round(0.6 * asked), asked, 0.005)
    assert at_least(asked, 1 + int(0.05 * asked), rate) > 0.99  # a necessary condition, by another way


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: rank_p_value(1, torch.zeros(0)), "one draw"),
        (lambda: critical_hits(torch.zeros(18), 0.05), "19 draws"),
        (lambda: least_draws(1.0), "between 0 and 1"),
    ],
)
def test_misuse_is_refused_in_one_line(call, what):
    with pytest.raises(Misuse, match=what) as caught:
        call()
    assert "\n" not in str(caught.value)
