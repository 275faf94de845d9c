"""The linear head's derivatives against autograd, and its bounds against what they bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge import Misuse
from expunge.calculus.head import HeadObjective, softmax_hessian_lipschitz


def objective(loss="cross_entropy", n=700, width=5, outputs=3, seed=0, decay=0.1, scale=1.0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, width))) * scale
    x[:, -1] = 1
    y = torch.from_numpy(rng.integers(0, outputs, n) if loss == "cross_entropy" else rng.normal(size=(n, outputs)))
    keep = torch.from_numpy(rng.random(n) > 0.2)
    w = torch.from_numpy(rng.normal(size=(outputs, width)))
    return HeadObjective(x, y, outputs=outputs, weight_decay=decay, loss=loss, keep=keep), w


def plain(of, w):
    """The objective as a user would write it."""
    z, y = of.x[of.keep] @ w.T, of.y[of.keep]
    squared = of.loss == "mse"
    losses = (z - y).square().sum(1) if squared else torch.nn.functional.cross_entropy(z, y, reduction="none")
    return losses.mean() + of.weight_decay / 2 * w.square().sum()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_derivatives_are_those_of_the_plain_objective(loss):
    of, w = objective(loss)
    value, gradient = of.value_and_gradient(w)
    (expected,) = torch.autograd.grad(plain(of, leaf := w.clone().requires_grad_()), leaf)
    assert math.isclose(value, float(plain(of, w)), rel_tol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of.gradient(w), expected, rtol=1e-12, atol=1e-14)
    dense = torch.autograd.functional.hessian(lambda v: plain(of, v), w).reshape(w.numel(), -1)
    torch.testing.assert_close(of.hessian(w), dense, rtol=1e-11, atol=1e-13)
    v = torch.randn(4, *w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(of.product(w, v).flatten(1), v.flatten(1) @ dense, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(of.product(w, v[0]).flatten(), dense @ v[0].flatten(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gradients_of_single_rows_add_up(loss):
    of, w = objective(loss)
    total = of.rows_gradient(w, of.keep.nonzero().flatten())
    torch.testing.assert_close(total / of.count + of.weight_decay * w, of.gradient(w), rtol=1e-12, atol=1e-14)


def test_a_hessian_over_several_blocks_of_rows_is_the_same(monkeypatch):
    of, w = objective()
    whole = of.hessian(w)
    monkeypatch.setattr("expunge.calculus.head._MANY_ROWS", 64)
    torch.testing.assert_close(of.hessian(w), whole, rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_hessian_changes_no_faster_than_it_is_said_to(seed, scale):
    of, w = objective(seed=seed, n=40, scale=scale)
    way = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=tuple(w.shape))) * 0.1
    change = torch.linalg.matrix_norm(of.hessian(w + way) - of.hessian(w), 2)
    assert float(change) <= of.hessian_lipschitz * float(way.norm()) * (1 + 1e-9)


def test_two_equal_classes_attain_the_lipschitz_constant():
    p = (1 - 1 / math.sqrt(3)) / 2
    away, u = torch.tensor([math.log(p / (1 - p)), 0.0], dtype=torch.float64), torch.tensor([1.0, -1.0]) / math.sqrt(2)
    of = HeadObjective(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]), outputs=2, weight_decay=0.0)
    way, w = u.double()[:, None] * 1e-5, away[:, None]
    change = torch.linalg.matrix_norm(of.hessian(w + way) - of.hessian(w - way), 2) / (2 * 1e-5)
    assert float(change) == pytest.approx(softmax_hessian_lipschitz(1.0), rel=1e-6)


def in_long_double(of, w):
    """Gradient in 80-bit arithmetic: its own rounding is two thousand times smaller."""
    x = of.x[of.keep].numpy().astype(np.longdouble)
    y, w = of.y[of.keep].numpy(), w.numpy().astype(np.longdouble)
    z = x @ w.T
    if of.loss == "mse":
        slopes = 2 * (z - y)
    else:
        slopes = np.exp(z - z.max(1, keepdims=True))
        slopes /= slopes.sum(1, keepdims=True)
        slopes[np.arange(len(y)), y] -= 1
    return slopes.T @ x / len(x) + np.longdouble(of.weight_decay) * w


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rounding_stays_within_its_bound_and_the_bound_is_small(loss, scale):
    of, w = objective(loss, n=5_000, width=40, scale=scale)
    error = float(np.linalg.norm((of.gradient(w).numpy() - in_long_double(of, w)).astype(float)))
    assert 0 < error <= of.gradient_error(w) < 1e-7 * (1 + float(of.gradient(w).norm()))


def test_less_than_float64_and_empty_sets_are_refused():
    of, _ = objective()
    with pytest.raises(Misuse, match="float64"):
        HeadObjective(of.x.float(), of.y, outputs=3, weight_decay=0.1)
    with pytest.raises(Misuse, match="no row is kept"):
        HeadObjective(of.x, of.y, outputs=3, weight_decay=0.1, keep=torch.zeros(len(of.x), dtype=torch.bool))
    with pytest.raises(Misuse, match="loss must be"):
        HeadObjective(of.x, of.y, outputs=3, weight_decay=0.1, loss="hinge")


def test_one_enormous_row_does_not_hide_behind_the_others():
    """Means of products are not products of means: with squared error the largest row decides."""
    x = torch.cat([torch.rand(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))] * 5)
    x[:, -1] = 1
    x[70_000, 0] = 2.0**27
    of = HeadObjective(x, torch.ones(len(x), 1), outputs=1, weight_decay=0.1, loss="mse")
    w = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    error = float(np.linalg.norm((of.gradient(w).numpy() - in_long_double(of, w)).astype(float)))
    assert 0 < error <= of.gradient_error(w)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rounding_of_products_stays_within_its_bound(loss, scale):
    of, w = objective(loss, n=3_000, width=40, scale=scale)
    v = torch.from_numpy(np.random.default_rng(3).normal(size=tuple(w.shape)))
    x, wide, step = (t.numpy().astype(np.longdouble) for t in (of.x[of.keep], w, v))
    u = x @ step.T
    if loss == "mse":
        u = 2 * u
    else:
        p = np.exp(x @ wide.T - (x @ wide.T).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        u = p * (u - (p * u).sum(1, keepdims=True))
    true = u.T @ x / len(x) + np.longdouble(of.weight_decay) * step
    error = float(np.linalg.norm((of.product(w, v).numpy() - true).astype(float)))
    assert 0 < error <= of.product_error(w, v) < 1e-6 * (1 + float(np.linalg.norm(true.astype(float))))
