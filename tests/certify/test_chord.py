"""Bounds on the distance to the minimiser, against minimisers found otherwise, in every one of 1,000 removals."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from expunge import Unsupported
from expunge.calculus.head import HeadObjective
from expunge.certify import chord
from expunge.certify.chord import factorise, gradient_bound, kantorovich_bound, solve


@cache
def digits(loss="cross_entropy", rows=500, classes=10, decay=1e-2):
    """Real digits of the first classes on 17 coarse features, with the minimiser of all of them and its factor."""
    source = load_digits()
    chosen = np.flatnonzero(source.target < classes)[:rows]
    coarse = source.images[chosen].reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 16
    x = torch.from_numpy(np.column_stack([coarse, np.ones(len(chosen))]))
    y = torch.from_numpy(source.target[chosen])
    labels = y if loss == "cross_entropy" else torch.nn.functional.one_hot(y, classes).double()
    of = HeadObjective(x, labels, outputs=classes, weight_decay=decay, loss=loss)
    w = exact(of, torch.zeros(classes, 17, dtype=torch.float64))
    return of, w, factorise(of, w)


def exact(of, w):
    """The minimiser, by full Newton steps on a dense Hessian until the gradient is rounding alone."""
    for _ in range(60):
        gradient = of.gradient(w)
        step = torch.linalg.solve(of.hessian(w), gradient.flatten()).view(w.shape)
        size = 1.0
        while of.gradient(w - size * step).norm() > gradient.norm() and size > 1e-3:
            size /= 2
        if gradient.norm() < 1e-15 * math.sqrt(w.numel()):
            break
        w = w - size * step
    return w


def without(of, rows):
    keep = torch.ones(len(of.x), dtype=torch.bool)
    keep[rows] = False
    return HeadObjective(of.x, of.y, outputs=of.outputs, weight_decay=of.weight_decay, loss=of.loss, keep=keep)


def removal(of, draw):
    """Rows to remove: some at random, or (nearly) a whole class, or the ones that matter most."""
    seed, kind, count = draw
    rng = np.random.default_rng(seed)
    if kind == "class" and of.loss == "cross_entropy":
        return np.flatnonzero(of.y.numpy() == rng.integers(of.outputs))
    if kind == "largest":
        return np.argsort(-of.x.norm(dim=1).numpy())[:count]
    return rng.choice(len(of.x), count, replace=False)


REMOVALS = st.tuples(st.integers(0, 10**6), st.sampled_from(["rows", "class", "largest"]), st.integers(1, 120))


@pytest.mark.parametrize(
    ("loss", "classes", "decay", "examples"),
    [("cross_entropy", 10, 1e-2, 400), ("cross_entropy", 2, 1e-3, 400), ("mse", 3, 1e-2, 200)],
    ids=["softmax", "logistic", "ridge"],
)
def test_both_bounds_hold_in_every_removal_rounding_included(loss, classes, decay, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(draw=REMOVALS, steps=st.integers(0, 5))
    def holds(draw, steps):
        of, w, factor = digits(loss, 500 if classes == 10 else 300, classes, decay)
        kept = without(of, removal(of, draw))
        for _ in range(steps):
            w = w - chord.newton_step(kept, w, kept.gradient(w), factor)
        gradient = kept.gradient(w)
        step = chord.newton_step(kept, w, gradient, factor)
        true = float((w - exact(kept, w)).norm())
        floor = kept.gradient_error(w) / decay  # as far as the reference itself can be trusted
        assert true <= gradient_bound(kept, w, gradient) + floor
        assert true <= kantorovich_bound(kept, w, gradient, step) + floor
        assert true <= kantorovich_bound(kept, w, gradient, step, factor) + floor

    holds()


def test_the_kantorovich_bound_is_within_half_of_the_true_distance_at_the_median():
    of, w, factor = digits()
    sharp, plain = [], []
    for seed in range(60):
        kept = without(of, removal(of, (seed, "rows", 1 + seed % 30)))
        near = w - chord.newton_step(kept, w, kept.gradient(w), factor)
        gradient = kept.gradient(near)
        true = float((near - exact(kept, near)).norm())
        assert true > 10 * kept.gradient_error(near) / kept.weight_decay, "below the rounding floor nothing is shown"
        step = chord.newton_step(kept, near, gradient, factor)
        sharp.append(kantorovich_bound(kept, near, gradient, step, factor) / true)
        plain.append(gradient_bound(kept, near, gradient) / true)
    assert 1 <= np.median(sharp) < 1.5
    assert np.median(plain) > 2 * np.median(sharp)


@pytest.mark.parametrize("factor_known", [True, False])
def test_solving_ends_within_the_cap_wherever_it_starts(factor_known):
    of, w, factor = digits()
    kept = without(of, np.arange(100))
    best = exact(kept, w)
    for cap in (1e-2, 1e-5, 1e-9):
        for start in (w, torch.zeros_like(w), torch.full_like(w, 3.0)):
            solved = solve(kept, start, cap, factor=factor if factor_known else None)
            assert float((solved.w - best).norm()) <= solved.bound.value <= cap


def test_a_wrong_guess_of_the_gradient_costs_steps_and_never_correctness():
    of, w, factor = digits()
    kept = without(of, np.arange(40))
    best = exact(kept, w)
    for guess in (torch.zeros_like(w), 100 * torch.ones_like(w)):
        solved = solve(kept, w, 1e-7, factor=factor, guess=guess)
        assert float((solved.w - best).norm()) <= 1e-7


def test_large_heads_are_solved_without_a_factor(monkeypatch):
    monkeypatch.setattr(chord, "DENSE", 50)
    of, w, _ = digits()
    kept = without(of, np.arange(40))
    solved = solve(kept, w, 1e-8)
    assert solved.factor is None
    assert float((solved.w - exact(kept, w)).norm()) <= 1e-8


def test_a_cap_below_rounding_is_refused_before_any_step():
    of, w, factor = digits()
    with pytest.raises(Unsupported, match="below what float64 can vouch for"):
        solve(of, w, 1e-18, factor=factor)


def test_giving_up_says_so():
    of, w, _ = digits()
    with pytest.raises(Unsupported, match="did not come within the cap"):
        solve(of, torch.full_like(w, 50.0), 1e-9, factor=torch.eye(w.numel()), most=1)


def test_the_undamped_full_step_is_retraining_on_a_quadratic():
    of, w, _ = digits("mse", 300, 3)
    kept = without(of, np.arange(60))
    step = torch.linalg.solve(kept.hessian(w), kept.gradient(w).flatten()).view(w.shape)
    retrained = exact(kept, torch.zeros_like(w))
    torch.testing.assert_close(w - step, retrained, rtol=0, atol=1e-11)
    with_all = torch.linalg.solve(of.hessian(w), kept.gradient(w).flatten()).view(w.shape)
    assert float((w - with_all - retrained).norm()) > 1e-4, "the Hessian must be that of the rows that stay"


def test_a_planted_constant_breaks_the_bound(monkeypatch):
    """The liar: a provider that says its head is a hundred times as convex as it is."""
    of, w, factor = digits()
    kept = without(of, removal(of, (0, "rows", 60)))
    near = w - chord.newton_step(kept, w, kept.gradient(w), factor)
    true = float((near - exact(kept, near)).norm())
    assert true <= gradient_bound(kept, near, kept.gradient(near))
    kept.weight_decay *= 100
    lied = float(torch.linalg.vector_norm(kept.gradient(near) - 0.99 * kept.weight_decay * near)) / kept.weight_decay
    assert true > lied


def test_each_root_is_the_one_of_its_own_equation():
    """Either alone must be right: the smaller of the two would hide that the other is too small."""
    of, _, _ = digits()
    ratio = of.hessian_lipschitz / of.weight_decay
    for length in (1e-6 / ratio, 0.1 / ratio, 0.45 / ratio):
        t = chord._lipschitz_root(length, of)
        assert t == pytest.approx(length + ratio / 2 * t * t, rel=1e-9)
        assert length < t < 1 / ratio, "the smaller of the two roots"
    assert math.isinf(chord._lipschitz_root(0.6 / ratio, of))
    rate = math.sqrt(2) * max(math.hypot(*row) for row in of.x.tolist())
    for length, local in ((1e-9, 1e-9), (1e-3, 4e-3), (0.02, 0.05)):
        t = chord._concordant_root(length, local, of)
        psi = (math.exp(rate * t) - 1) / (rate * t) - 1
        assert t == pytest.approx(length + psi / (1 - psi) * local, rel=1e-6)
    assert math.isinf(chord._concordant_root(1.0, 100.0, of))


def two_points(norm, decay):
    """One row of two classes with one feature: everything about it has a closed form."""
    x = torch.tensor([[norm]], dtype=torch.float64)
    return HeadObjective(x, torch.tensor([0]), outputs=2, weight_decay=decay)


@pytest.mark.parametrize("norm", [1.0, 30.0])
def test_the_change_of_the_hessian_is_bounded_where_it_is_fastest(norm):
    """Between two classes, along the line that trades one for the other, the concordant factor is nearly attained."""
    of, decay = two_points(norm, 1e-9), 1e-9
    way = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) / math.sqrt(2)
    far = way * (12 / norm)
    here, there = (float(of.hessian(far + way * t)[0, 0]) - decay for t in (0.0, 1e-3 / norm))
    rate = -math.log(there / here) / (1e-3 / norm)
    most = math.sqrt(2) * float(of.norms.max())
    assert 0.99 * most < rate <= most * (1 + 1e-6)
