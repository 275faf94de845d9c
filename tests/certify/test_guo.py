"""Removal from perturbed linear models: residuals, determinants and figures against brute force, and promises."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi
from sklearn.linear_model import LogisticRegression
from torch.func import jacrev

from expunge.certify import gaussian, guo_linear
from expunge.certify.accountant import Budget
from expunge.certify.guarantee import recheck
from expunge.certify.guo import DERIVATIONS, GuoRemoval
from expunge.certify.guo_bound import (
    determinant,
    noise_radius,
    norm_epsilon,
    paper_cap,
    paper_epsilon,
    worst_case_epsilon,
    worst_determinant,
    worst_residual,
    worst_step,
)
from expunge.certify.guo_linear import Perturbed, features, removal, residual_bound, spectral_norm
from expunge.core.claim import Claim, Constant, Guarantee
from expunge.core.coins import generator
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.training import load, train
from expunge.testing import conformance, digits
from expunge.testing.contract import CONTRACT
from expunge.unlearn import Retrain

KNOWN = {derivation.name: derivation for derivation in DERIVATIONS}
RECIPE = Recipe(model="softmax", weight_decay=0.5)
WORST = GuoRemoval(sigma=20.0, rows=550, removals=4)
PAPER = GuoRemoval(sigma=5.0, bound="paper")


def rows(n=600, size=4, classes=3, seed=0, length=1.0):
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, size))) + 2 * torch.nn.functional.one_hot(y, size)
    return Records(length * x / x.norm(dim=1).max(), y, [f"r{i}" for i in range(n)], classes=classes)


ROWS = rows()


def problem(records, b, decay=0.5):
    return Perturbed(features(records, 9.0), records.y, len(b), decay, b)


def weights(trained):
    head = trained.module.head
    return torch.cat([head.weight.detach(), head.bias.detach()[:, None]], 1)


def left_over(trained, records):
    """The true residual: what the perturbed objective's gradient is, on the rows that the model stands on."""
    b = trained.secret[".b"]
    kept = records.take(sorted(trained.ids))
    return float(problem(kept, b, trained.recipe.weight_decay).gradient(weights(trained)).norm())


def forget(method, trained, records, ids):
    return method(trained, records, Request.remove(ids), rng=generator(0))


def hessian(part, w):
    return jacrev(lambda flat: part.pull(flat.view_as(w)).flatten())(w.flatten())


def test_the_objective_is_what_it_says_and_training_ends_at_its_minimum():
    b = torch.randn(3, 5, generator=generator(0), dtype=torch.float64)
    part = problem(ROWS, b)
    w = torch.randn(3, 5, generator=generator(1), dtype=torch.float64)
    x = torch.cat([ROWS.x, torch.ones(600, 1, dtype=torch.float64)], 1)

    def value(at):
        losses = torch.nn.functional.cross_entropy(x @ at.T, ROWS.y, reduction="sum")
        return losses + 600 * 0.5 / 2 * at.square().sum() + (b * at).sum()

    assert part.value(w) == pytest.approx(float(value(w)), rel=1e-12)
    torch.testing.assert_close(part.gradient(w), jacrev(value)(w), rtol=1e-10, atol=1e-9)
    right = torch.randn(3, 5, generator=generator(2), dtype=torch.float64)
    dense = torch.linalg.solve(hessian(part, w), right.flatten()).view(3, 5)
    torch.testing.assert_close(part.solve(w, right, 1e-13), dense, rtol=1e-9, atol=1e-12)
    best = part.minimum(torch.zeros_like(b))
    assert float(part.gradient(best).norm()) < 1e-7
    assert part.value(best) < part.value(best + 0.01 * right)


def test_with_two_classes_it_is_binary_logistic_regression():
    two = rows(classes=2, n=200)
    x = features(two, 1.0)
    w = Perturbed(x, two.y, 2, 0.01, torch.zeros(2, 5, dtype=torch.float64)).minimum(
        torch.zeros(2, 5, dtype=torch.float64)
    )
    torch.testing.assert_close(w[0], -w[1], rtol=0, atol=1e-8)
    # |w0|^2 + |w1|^2 is half of |w1 - w0|^2
    other = LogisticRegression(C=2 / (0.01 * 200), fit_intercept=False, tol=1e-10, max_iter=10_000)
    other.fit(x.numpy(), two.y.numpy())
    np.testing.assert_allclose((w[1] - w[0]).numpy(), other.coef_[0], atol=1e-5)


def test_fit_draws_noise_of_the_stated_size_and_ends_at_the_minimum_for_it():
    method = replace(PAPER, sigma=3.0)
    records = rows(n=120, size=60)
    one, other = (method.fit(RECIPE, records) for _ in range(2))
    noise = one.secret[".b"]
    assert noise.shape == (3, 61)
    assert not torch.equal(noise, other.secret[".b"])
    assert float(noise.std()) == pytest.approx(3.0, abs=5 * 3 / math.sqrt(2 * 183))
    assert left_over(one, records) < 1e-7
    assert float(one.secret[".residual"]) == pytest.approx(left_over(one, records), rel=1e-6)
    assert float(one.secret[".removed"]) == 0
    assert (one.standing, one.exactness, one.recipe.dtype) == (Claim.EXACT, "in law", "float64")
    assert one.module.head.weight.dtype is torch.float64


@pytest.mark.parametrize("seed", range(6))
def test_the_residual_of_a_removal_is_within_its_bound(seed):
    rng = generator(seed)
    decay = [0.5, 0.05, 0.002][seed % 3]
    b = 3 * torch.randn(3, 5, generator=rng, dtype=torch.float64)
    count = [1, 20, 250][seed // 2]
    ids = [ROWS.ids[i] for i in torch.randperm(600, generator=rng)[:count].tolist()]
    if seed == 5:
        ids = list(ROWS.of_class(1).ids)  # a whole class
    whole, kept, gone = (problem(part, b, decay) for part in (ROWS, ROWS.without(ids), ROWS.take(ids)))
    w = whole.minimum(torch.zeros_like(b))
    after, step, bound = removal(kept, gone, w)
    true = float(kept.gradient(after).norm())
    assert true <= bound
    assert true > 1e-3 * bound  # of the right size, so that a bound that is off by a factor is seen elsewhere
    dense = torch.linalg.solve(hessian(kept, w), gone.pull(w).flatten())
    torch.testing.assert_close(step.flatten(), dense, rtol=1e-8, atol=1e-11)
    # Newton's step against the exact minimum with the same noise: within residual / (weight_decay n).
    exact = kept.minimum(w)
    assert float((after - exact).norm()) <= bound / kept.ridge
    assert float((after - exact).norm()) < float((w - exact).norm())


def test_what_the_solver_missed_is_in_the_bound(monkeypatch):
    monkeypatch.setattr(guo_linear, "_SOLVED", 0.3)
    b = torch.randn(3, 5, generator=generator(0), dtype=torch.float64)
    whole, kept, gone = (problem(part, b) for part in (ROWS, ROWS.without(["r1"]), ROWS.take(["r1"])))
    after, step, bound = removal(kept, gone, whole.minimum(torch.zeros_like(b)))
    true = float(kept.gradient(after).norm())
    assert residual_bound(kept.x, step) < true <= bound < 2 * true


def test_the_residual_bound_is_nearly_reached_and_half_of_it_fails():
    # Rows alike, logits at the point where the third derivative is largest, and a step along it.
    p = (1 - 1 / math.sqrt(3)) / 2
    x = torch.ones(50, 1, dtype=torch.float64)
    w = torch.tensor([[math.log(p)], [math.log(1 - p)]], dtype=torch.float64)
    step = 1e-3 * torch.tensor([[1.0], [-1.0]], dtype=torch.float64) / math.sqrt(2)
    part = Perturbed(x, torch.zeros(50, dtype=torch.int64), 2, 1e-9, torch.zeros_like(w))
    curved = hessian(part, w) @ step.flatten()
    true = float((part.pull(w + step) - part.pull(w) - curved.view_as(w)).norm())
    assert 0.99 * residual_bound(x, step) < true <= residual_bound(x, step)


def test_the_spectral_norm_is_never_too_small_as_the_power_method_is():
    for seed in range(5):
        x = torch.randn(200, 30, generator=generator(seed), dtype=torch.float64)
        true = float(torch.linalg.matrix_norm(x, 2))
        assert true <= spectral_norm(x) <= true * (1 + 1e-9)
        vector = torch.ones(30, dtype=torch.float64)
        for _ in range(20):
            vector = x.T @ (x @ vector)
            vector /= vector.norm()
        assert float((x @ vector).norm()) < true * (1 - 1e-6)


def maps(seed, n=60, count=3, decay=0.3):
    """The map of the noise that a removal makes, its derivative, and what the determinant's bound takes."""
    records = rows(n=n, seed=seed)
    ids = records.ids[:count]
    b = torch.randn(3, 5, generator=generator(seed), dtype=torch.float64)
    whole, kept, gone = (problem(part, b, decay) for part in (records, records.without(ids), records.take(ids)))
    w = whole.minimum(torch.zeros_like(b))
    zero = torch.zeros_like(b)

    def after(flat):
        at = flat.view_as(b)
        step = torch.linalg.solve(
            jacrev(lambda one: kept.pull(one.view_as(b)).flatten())(flat), gone.pull(at).flatten()
        )
        return -kept.pull(at + step.view_as(b)).flatten()

    slope = jacrev(after)(w.flatten()) @ torch.linalg.inv(-hessian(whole, w))
    step = kept.solve(w, gone.pull(w), 1e-13)
    changes = kept.x @ step.T
    x = float((changes.max(1).values - changes.min(1).values).max())
    share = float(torch.linalg.solve(hessian(whole, w), hessian(gone, w)).trace())
    assert zero.numel() == 15
    return b, after(w.flatten()).view_as(b), slope, x, share


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 1), (2, 3), (3, 6)])
def test_the_determinant_of_the_noise_s_map_is_within_its_bound(seed, count):
    b, moved, slope, x, share = maps(seed, count=count)
    log = float(torch.linalg.slogdet(slope)[1])
    assert float(torch.linalg.slogdet(slope)[0]) == 1
    assert 5e-4 * determinant(x, 15, share) < abs(log) <= determinant(x, 15, share)
    assert x <= math.sqrt(2) * math.sqrt(2) * worst_step(60 - count, count, math.sqrt(2), 0.3, float(b.norm()))
    assert share <= count * (2 / 0.3 + 15) / (60 - count)
    assert float((b - moved).norm()) > 0
    assert determinant(0.7, 15, 0.1) == math.inf
    assert determinant(x, 15, share) - determinant(x, 15, 0.0) == pytest.approx(x * share)


@pytest.mark.parametrize("length", [0.1, 0.5, 1.5])
def test_along_a_step_the_hessian_and_its_derivative_change_by_no_more_than_the_change_of_logits_allows(length):
    part = problem(ROWS, torch.zeros(3, 5, dtype=torch.float64), decay=1e-9)
    w = 3 * torch.randn(3, 5, generator=generator(4), dtype=torch.float64)
    s = length * torch.randn(3, 5, generator=generator(5), dtype=torch.float64)
    changes = part.x @ s.T
    x = float((changes.max(1).values - changes.min(1).values).max())
    here, there = hessian(part, w), hessian(part, w + s)
    third = (jacrev(lambda at: hessian(part, at))(w) * s).sum((2, 3))
    scale = torch.linalg.eigh(here)
    kept = scale.eigenvalues > 1e-4  # not along a shift of all classes, where nothing changes
    half = scale.eigenvectors[:, kept] / scale.eigenvalues[kept].sqrt()

    def largest(matrix):
        return float(torch.linalg.matrix_norm(half.T @ matrix @ half, 2))

    assert 0.1 * x < largest(third) <= x
    assert 0.1 * x < largest(there - here) <= math.expm1(x)
    assert 0.01 * x * x < largest(there - here - third) <= math.expm1(x) - x


def test_the_privacy_loss_of_real_removals_is_within_the_proved_epsilon():
    delta, sigma = 1e-3, 4.0
    proved = worst_case_epsilon(58, 2, math.sqrt(2), 20.0, sigma, delta, 15)
    assert proved < 3
    losses = []
    for seed in range(5):
        b, moved, slope, *_ = maps(seed, count=2, decay=20.0)
        square = float(moved.square().sum() - b.square().sum()) / (2 * sigma**2)
        losses.append(abs(square - float(torch.linalg.slogdet(slope)[1])))
        assert float((b - moved).norm()) <= worst_residual(58, 2, math.sqrt(2), 20.0, sigma, delta, 15)
    assert 0 < max(losses) <= proved


def test_a_residual_along_the_noise_breaks_the_papers_formula():
    # u = beta b / |b|: the law of |b - u| against that of |b|, exactly, in many dimensions.
    d, sigma, beta, delta = 2000, 1.0, 0.5, 1e-5
    epsilon = paper_epsilon(beta, sigma, delta)
    edges = np.linspace(chi.ppf(1e-9, d), chi.isf(1e-9, d), 4001)
    given = chi.cdf(edges + beta, d) - math.exp(epsilon) * chi.cdf(edges, d)
    assert given.max() > 1.5 * delta  # the textbook's formula has some slack, which this uses up
    # The exact Gaussian mechanism has none: its delta at epsilon 1 is passed five times over.
    tight = gaussian.delta_of(beta / sigma, 1.0)
    assert (chi.cdf(edges + beta, d) - math.e * chi.cdf(edges, d)).max() > 5 * tight
    noise = torch.randn(200_000, 20, generator=generator(0), dtype=torch.float64).norm(dim=1)
    hits = float((noise - beta < 3.2).double().mean()) - math.exp(0.2) * chi.cdf(3.2, 20)
    assert hits == pytest.approx(chi.cdf(3.2 + beta, 20) - math.exp(0.2) * chi.cdf(3.2, 20), abs=0.005)


def test_of_the_size_of_the_residual_alone_nothing_follows():
    # u = b less its nearest grid point: never longer than beta, and yet b - u lies where a fresh b never does.
    d, beta, delta = 50, 0.5, 1e-5
    cell = 2 * beta / math.sqrt(d)
    b = torch.randn(1000, d, generator=generator(0), dtype=torch.float64)
    moved = (b / cell).round() * cell
    fresh = torch.randn(1000, d, generator=generator(1), dtype=torch.float64)

    def on_grid(points):
        return float(((points / cell - (points / cell).round()).abs() < 1e-9).all(1).double().mean())

    assert float((b - moved).norm(dim=1).max()) <= beta
    assert (on_grid(moved), on_grid(fresh)) == (1.0, 0.0)
    for figure in (paper_epsilon(beta, 1.0, delta), norm_epsilon(beta, 1.0, delta, d)):
        assert on_grid(moved) > math.exp(figure) * on_grid(fresh) + delta


def test_the_figures_have_their_closed_forms():
    assert paper_epsilon(2.0, 10.0, 1e-5) == pytest.approx(0.2 * math.sqrt(2 * math.log(1.5e5)))
    assert paper_epsilon(paper_cap(0.7, 10.0, 1e-5), 10.0, 1e-5) == pytest.approx(0.7)
    assert noise_radius(3.0, 0.5, 1) == pytest.approx(3 * 0.674490, rel=1e-5)
    radius = noise_radius(2.0, 1e-5, 1000)
    assert norm_epsilon(0.3, 2.0, 1e-5, 1000) == pytest.approx(0.3 * radius / 4 + 0.09 / 8)
    assert norm_epsilon(0.3, 2.0, 1e-5, 1000) > 5 * paper_epsilon(0.3, 2.0, 1e-5)
    given = (60_000, 1, math.sqrt(2), 0.1, 100.0, 1e-5, 7850)
    assert worst_residual(*given) == pytest.approx(0.0119, rel=0.01)
    assert worst_determinant(*given) == pytest.approx(0.0245, rel=0.01)
    assert worst_case_epsilon(*given) == pytest.approx(0.03535, rel=0.01)
    assert worst_case_epsilon(60_000, 1, math.sqrt(2), 0.0, 100.0, 1e-5, 7850) == math.inf
    assert worst_case_epsilon(60_000, 30_000, math.sqrt(2), 0.1, 100.0, 1e-5, 7850) == math.inf


def test_one_request_for_all_rows_is_worst():
    for split in ((1, 9), (5, 5), (3, 7)):
        for figure in (worst_residual, worst_determinant):
            parts = [figure(5000, m, 1.4, 0.3, 30.0, 1e-5, 200) for m in split]
            assert sum(parts) <= figure(5000, 10, 1.4, 0.3, 30.0, 1e-5, 200) * (1 + 1e-12)


@pytest.mark.parametrize("method", [WORST, PAPER])
def test_a_removal_is_certified_and_leaves_less_over_than_is_booked(method):
    trained = method.fit(RECIPE, ROWS)
    done = forget(method, trained, ROWS, ["r3", "r8"])
    again = forget(method, done.trained, ROWS, ["r100"])
    for result, count in ((done, 2), (again, 3)):
        assert result.claim is Claim.CERTIFIED
        held = result.trained.secret
        assert left_over(result.trained, ROWS) <= float(held[".residual"]) <= result.guarantee.sensitivity
        assert float(held[".removed"]) == count
        assert torch.equal(held[".b"], trained.secret[".b"])
        assert not {"head.weight", "head.bias"} & set(held)
        assert result.guarantee.transcript is None
        assert result.guarantee.releases == "current"
        assert result.guarantee.epsilon <= 1 + 1e-9
        assert result.guarantee.mu is None
        assert recheck(result.guarantee, KNOWN) == ()
        assert "share their noise" in result.guarantee.remarks[0]
    assert done.guarantee == again.guarantee  # nothing of the rows is in it
    assert float(again.trained.secret[".residual"]) > float(done.trained.secret[".residual"]) > 1e-9
    assert done.guarantee.basis == ("proved" if method is WORST else "conditional")
    told = done.guarantee.to_json()
    assert Guarantee.from_json(json.loads(json.dumps(told, allow_nan=False))) == done.guarantee


def test_the_result_is_nearer_to_the_minimum_without_the_rows():
    trained = PAPER.fit(RECIPE, ROWS)
    ids = [f"r{i}" for i in range(40)]
    done = forget(PAPER, trained, ROWS, ids)
    exact = problem(ROWS.without(ids), trained.secret[".b"]).minimum(weights(trained))
    before, after = (float((weights(one) - exact).norm()) for one in (trained, done.trained))
    assert after < 0.05 * before


def test_both_figures_are_told():
    worst, paper = (m.guarantee_for(m.fit(RECIPE, ROWS).recipe, m.fit(RECIPE, ROWS).module) for m in (WORST, PAPER))
    assert f"epsilon {paper_epsilon(worst.sensitivity, 20.0, 1e-5):.4g}" in worst.remarks[-1]
    assert worst.epsilon > 2 * paper_epsilon(worst.sensitivity, 20.0, 1e-5)
    assert f"epsilon {norm_epsilon(paper.sensitivity, 5.0, 1e-5, 15):.4g}" in paper.remarks[-1]
    assert paper.constants["independence"] == Constant(1.0, "supplied")
    assert paper.epsilon == pytest.approx(1.0)


def test_constants_called_proved_are_computed_again_by_whoever_doubts_them():
    trained = WORST.fit(RECIPE, ROWS)
    guarantee = WORST.guarantee_for(trained.recipe, trained.module)
    for name in ("sensitivity", "epsilon", "radius"):
        held = guarantee.constants
        lied = {**held, name: Constant(held[name].value / 2, "proved", held[name].derivation)}
        assert recheck(replace(guarantee, constants=lied), KNOWN), name


def test_the_budget_of_rows_is_kept_whatever_the_rows():
    trained = WORST.fit(RECIPE, ROWS)
    first = forget(WORST, trained, ROWS, ["r1", "r2", "r3"]).trained
    with pytest.raises(BudgetExhausted, match=r"^4 rows may be removed, and this would make 5; train anew"):
        forget(WORST, first, ROWS, ["r4", "r5"])
    assert forget(WORST, first, ROWS, ["r4"]).trained.gone == {"r1", "r2", "r3", "r4"}
    few = GuoRemoval(sigma=20.0, rows=599, removals=4)
    with pytest.raises(Unsupported, match=r"promised at least 599 rows, got 598; lower rows$"):
        forget(few, few.fit(RECIPE, ROWS), ROWS, ["r1", "r2"])
    with pytest.raises(Unsupported, match=r"promised at least 601 rows, got 600"):
        replace(few, rows=601).fit(RECIPE, ROWS)


def test_the_budget_of_residuals_is_spent_and_training_anew_restores_it():
    method = GuoRemoval(sigma=0.05, bound="paper")
    trained = method.fit(RECIPE, ROWS)
    done, spent = trained, None
    for count in range(100):
        try:
            done = forget(method, done, ROWS, [f"r{2 * count}", f"r{2 * count + 1}"]).trained
        except BudgetExhausted as error:
            spent = str(error)
            break
    assert spent is not None
    assert spent.startswith("this removal would leave more over than the noise hides; train anew")
    assert count >= 1
    cap = paper_cap(1.0, 0.05, 1e-5)
    assert float(done.secret[".residual"]) <= cap
    anew = method.fit(RECIPE, ROWS.without(done.gone), gone=done.gone)
    assert forget(method, anew, ROWS, ["r599"]).trained.gone == done.gone | {"r599"}


def test_without_its_secret_a_model_is_not_touched(tmp_path):
    trained = WORST.fit(RECIPE, ROWS)
    trained.save(tmp_path / "model")
    lost = load(tmp_path / "model")
    assert lost.digest() == trained.digest()
    for one in (lost, train(replace(RECIPE, epochs=1), ROWS), replace(trained, secret={".b": trained.secret[".b"]})):
        with pytest.raises(Unsupported, match=r"^guo-removal needs the noise .* never saved, .* GuoRemoval\.fit"):
            forget(WORST, one, ROWS, ["r1"])


def test_what_it_cannot_do_is_refused():
    trained = WORST.fit(RECIPE, ROWS)
    ask = Request.replace_rows(["r1"], ROWS.x[:1] / 2, ROWS.y[:1])
    with pytest.raises(Unsupported, match=r"cannot take new ones in; use retrain$"):
        WORST(trained, ROWS, ask, rng=generator(0))
    for change in ({"model": "mlp"}, {"loss": "mse"}, {"sharding": Sharding(shards=2)}, {"max_norm": 1.0}):
        records = ROWS if "loss" not in change else Records(ROWS.x, ROWS.x[:, 0], ROWS.ids)
        with pytest.raises(Unsupported, match=r'is for the model "softmax"'):
            WORST.fit(replace(RECIPE, **change), records)
    with pytest.raises(Unsupported, match=r'is for the model "softmax"'):
        WORST.fit(replace(RECIPE, pruning=Pruning(sparsity=0.5)), ROWS)
    for method in (WORST, PAPER):
        with pytest.raises(Misuse, match="needs weight_decay > 0"):
            method.fit(replace(RECIPE, weight_decay=0.0), ROWS)
    with pytest.raises(Misuse, match=r"^a row is longer than feature_radius 0\.5"):
        replace(PAPER, feature_radius=0.5).fit(RECIPE, ROWS)
    with pytest.raises(Misuse, match=r"^with these settings epsilon is \d.*, above the budget's 0\.001; raise sigma"):
        replace(WORST, budget=Budget(epsilon=1e-3)).fit(RECIPE, ROWS)
    with pytest.raises(Misuse, match=r"^with these settings epsilon is inf"):
        replace(WORST, removals=500).fit(RECIPE, ROWS)
    for name, value in (("sigma", 0.0), ("feature_radius", 0.0), ("bound", "both"), ("rows", 0), ("removals", 1.5)):
        with pytest.raises(Misuse, match=name):
            GuoRemoval(**{name: value})


def test_retraining_ends_the_perturbed_line():
    trained = WORST.fit(RECIPE, ROWS)
    done = Retrain()(trained, ROWS, Request.remove(["r1"]), rng=generator(0))
    assert not done.trained.secret
    with pytest.raises(Unsupported):
        forget(WORST, done.trained, ROWS, ["r2"])


def test_it_conforms_but_for_new_noise_which_it_does_not_draw():
    method = GuoRemoval(sigma=100.0, bound="paper", feature_radius=8.0, budget=Budget(epsilon=500.0))
    case = replace(digits(), recipes=(replace(RECIPE, weight_decay=0.1),))
    report = conformance(
        method, case=case, train=method.fit, checks=CONTRACT, exceptions={"deterministic": "noise is drawn at training"}
    )
    assert report.passed, report
