"""Votes and means against counting by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from expunge.learn.ensemble import ShardEnsemble


class Fixed(nn.Module):
    """Gives the same outputs to every row."""

    def __init__(self, *outputs):
        super().__init__()
        self.register_buffer("outputs", torch.tensor(outputs, dtype=torch.float64))

    def forward(self, x):
        return self.outputs.expand(len(x), -1)


X = torch.zeros(2, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_votes_and_ties_by_brute_force(count):
    for choice in itertools.product(range(3), repeat=count):
        parts = [Fixed(*(float(label == vote) for label in range(3))) for vote in choice]
        ensemble = ShardEnsemble(parts, 3, "cross_entropy", "vote")
        tally = [choice.count(label) for label in range(3)]
        assert ensemble.votes(X).tolist() == [tally] * 2
        assert ensemble(X).argmax(1).tolist() == [tally.index(max(tally))] * 2  # ties go to the lowest class
        shares = [max(votes / count, 1e-6) for votes in tally]
        assert ensemble(X)[0].exp().tolist() == pytest.approx(shares)


def test_a_part_that_cannot_decide_votes_for_its_lowest_class():
    assert ShardEnsemble([Fixed(0.0, 3.0, 3.0)], 3, "cross_entropy", "vote").votes(X)[0].tolist() == [0, 1, 0]


def test_votes_are_equal_however_sure_a_part_is():
    sure, unsure = Fixed(100.0, 0.0), Fixed(0.0, 1e-9)
    assert ShardEnsemble([sure, unsure, unsure], 2, "cross_entropy", "vote")(X).argmax(1).tolist() == [1, 1]
    assert ShardEnsemble([sure, unsure, unsure], 2, "cross_entropy", "mean")(X).argmax(1).tolist() == [0, 0]


def test_mean_is_the_log_of_the_mean_probability():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ensemble = ShardEnsemble([Fixed(*row.tolist()) for row in logits], 4, "cross_entropy", "mean")
    torch.testing.assert_close(ensemble(X)[0].exp(), logits.softmax(1).mean(0), rtol=1e-14, atol=1e-14)
    far = ShardEnsemble([Fixed(1e4, 0.0), Fixed(1e4, 0.0)], 2, "cross_entropy", "mean")
    assert far(X)[0].tolist() == [0.0, -1e4]


def test_regression_is_the_mean_output():
    ensemble = ShardEnsemble([Fixed(1.0, 2.0), Fixed(3.0, -2.0)], 2, "mse", "vote")
    assert ensemble(X).tolist() == [[2.0, 0.0]] * 2
    assert math.isfinite(float(ensemble(X).sum()))
