"""Noise that is there, in every entry, with the spread that was asked for, and nobody's to compute again."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from expunge.certify.noise import add_noise, secret_normal
from expunge.core.errors import Misuse


def spread_problems(values, sigma):
    """What is wrong with numbers that should be N(0, sigma^2), at a false alarm of about one in a million."""
    z = np.asarray(values, dtype=np.float64).ravel() / sigma
    found = []
    if stats.kstest(z, "norm").pvalue < 1e-6:
        found.append("shape")
    n = len(z)
    if not stats.chi2.ppf(1e-7, n) < (z**2).sum() < stats.chi2.ppf(1 - 1e-7, n):
        found.append("spread")
    if len(np.unique(z)) < n:
        found.append("repeated")
    return found


def test_noise_is_standard_normal_to_the_tails():
    values = secret_normal((1000, 1000)).numpy()
    assert values.shape == (1000, 1000)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert spread_problems(values[:200], 1.0) == []
    for level in (2.0, 3.0, 4.0):
        count, expected = (np.abs(values) > level).sum(), 1e6 * 2 * stats.norm.sf(level)
        assert abs(count - expected) < 6 * np.sqrt(expected)
    assert abs((values > 0).mean() - 0.5) < 6 * 0.0005


@pytest.mark.parametrize(
    "fake",
    [
        lambda: np.random.default_rng(0).normal(0, 1.02, 200_000),
        lambda: np.random.default_rng(0).uniform(-np.sqrt(3), np.sqrt(3), 200_000),
        lambda: np.tile(np.random.default_rng(0).normal(0, 1, 100_000), 2),
        lambda: np.abs(np.random.default_rng(0).normal(0, 1, 200_000)),
    ],
    ids=["too wide", "uniform", "used twice", "one-sided"],
)
def test_noise_that_is_not_normal_would_be_noticed(fake):
    assert spread_problems(fake(), 1.0)


def test_no_seed_decides_it():
    torch.manual_seed(0)
    first = secret_normal((50,))
    torch.manual_seed(0)
    assert not bool((secret_normal((50,)) == first).any())


def test_the_ends_of_the_generator_are_finite_and_symmetrical(monkeypatch):
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("os.urandom", lambda n, byte=byte: byte * n)
        value = float(secret_normal((1,)))
        assert np.isfinite(value)
    monkeypatch.setattr("os.urandom", lambda n: b"\x00" * n)
    low = float(secret_normal((1,)))
    assert 8.2 < abs(low) < 8.4
    monkeypatch.setattr("os.urandom", lambda n: (b"\x01" + b"\x00" * 7) * (n // 8))
    assert float(secret_normal((1,))) == -low


def test_every_parameter_gets_noise_of_the_given_size_and_nothing_else_does():
    module = nn.Sequential(nn.Linear(100, 300), nn.BatchNorm1d(300))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    names = [name for name, _ in module.named_parameters()]
    add_noise(module, names, 0.05)
    for name, tensor in module.state_dict().items():
        change = (tensor.double() - before[name].double()).numpy()
        if name not in names:
            assert not change.any()
        elif change.size > 1000:
            assert [p for p in spread_problems(change, 0.05) if p != "repeated"] == []
        else:
            assert abs(change.std() / 0.05 - 1) < 0.3
            assert change.all()


def test_noise_in_double_precision_is_normal_to_the_last_entry():
    module = nn.Linear(400, 400, bias=False).double()
    before = module.weight.detach().clone()
    add_noise(module, ["weight"], 3.0)
    assert spread_problems((module.weight.detach() - before).numpy(), 3.0) == []


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_no_noise_is_refused(sigma):
    with pytest.raises(Misuse, match="sigma"):
        add_noise(nn.Linear(2, 2), ["weight"], sigma)


def test_what_takes_no_noise_is_refused_before_anything_changes():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = module[0].weight.detach().clone()
    for name in ("nowhere", "1.num_batches_tracked"):
        with pytest.raises(Misuse, match=name):
            add_noise(module, ["0.weight", name], 1.0)
    assert torch.equal(module[0].weight, before)
