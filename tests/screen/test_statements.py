"""The statements that screens lean on: T1 (bounds), T2 (orders of influence errors), T3 (quadratics); T4 is with
facility location."""

import math

import pytest
import torch

from expunge import Misuse, Unsupported
from expunge.core.coins import generator
from expunge.screen import first_order_bound, probe_bounds, smoothness, step_bound, surely_lowers
from tests.screen import kit


def softmax_rows(seed, n=6, d=5, classes=4):
    rng = generator(seed)
    h = torch.randn(n, d, generator=rng, dtype=torch.float64) * 2
    w = torch.randn(classes, d + 1, generator=rng, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=rng)
    return h, w, y


def losses(w, h, y):
    ones = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
    return torch.nn.functional.cross_entropy(ones @ w.T, y, reduction="none")


def gradient(w, h, y):
    w = w.clone().requires_grad_()
    return torch.autograd.grad(losses(w, h, y).sum(), w)[0]


@pytest.mark.parametrize("seed", range(20))
def test_smoothness_is_above_every_curvature_and_cannot_be_halved(seed):
    h, w, y = softmax_rows(seed, n=1)
    hessian = torch.autograd.functional.hessian(lambda v: losses(v.view_as(w), h, y).sum(), w.reshape(-1))
    assert float(torch.linalg.eigvalsh(hessian)[-1]) <= float(smoothness(h)[0]) + 1e-9


def test_smoothness_is_reached_where_two_classes_share_all_probability():
    h, _, y = softmax_rows(0, n=1)
    w = torch.zeros(4, 6, dtype=torch.float64)
    w[2:, -1] = -60.0
    hessian = torch.autograd.functional.hessian(lambda v: losses(v.view_as(w), h, y).sum(), w.reshape(-1))
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(float(smoothness(h)[0]), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_t1_bounds_hold_of_any_step_and_of_first_order_steps(seed):
    h, w, y = softmax_rows(seed)
    for step in (1e-3, 0.1, 1.0, 10.0):
        for probe in range(1, 6):
            g, mine = gradient(w, h[:1], y[:1]), gradient(w, h[probe : probe + 1], y[probe : probe + 1])
            move = step * g
            before = losses(w, h[probe : probe + 1], y[probe : probe + 1])
            change = losses(w + move, h[probe : probe + 1], y[probe : probe + 1]) - before
            smooth = smoothness(h[probe : probe + 1])
            bound = step_bound((mine * move).sum()[None], float(move.norm()), smooth)
            assert float(change) <= float(bound) + 1e-9
            cosine = (mine * g).sum() / mine.norm() / g.norm()
            loose = first_order_bound(step, mine.norm(), g.norm(), cosine, smooth)
            assert float(bound) <= float(loose) + 1e-9


def test_t1_a_small_enough_step_surely_lowers_and_a_large_one_may_not():
    told, larger = 0, 0
    for seed in range(60):
        h, w, y = softmax_rows(seed, n=2)
        g, mine = gradient(w, h[:1], y[:1]), gradient(w, h[1:], y[1:])
        cosine = (mine * g).sum() / mine.norm() / g.norm()
        for step in (1e-3, 1e-2, 0.1, 1.0):
            sure = bool(surely_lowers(step, mine.norm(), g.norm(), cosine, smoothness(h[1:]))[0])
            fell = float(losses(w - step * g, h[1:], y[1:]) - losses(w, h[1:], y[1:])) < 0
            assert fell or not sure
            told += sure
            larger += not fell and float(cosine) > 0
    assert told > 20
    assert larger > 0


def test_harmless_probes_of_a_linear_softmax_are_proved_and_never_turn():
    scene, probes = kit.scene("softmax"), kit.unseen().select(range(100))
    x, y = next(scene.batches(probes, 100))
    rows = next(scene.batches(kit.records().select(range(30)), 100))
    g = scene.objective.gradient(*rows)
    here, spared = scene.objective.vector(), []
    for step in (1e-4, 1e-3, 1e-2, 1e-1):
        bounds = probe_bounds(scene, probes, step * g)
        assert bounds.basis == "proved"
        after = scene.objective.outputs(here + step * g, x).argmax(1)
        assert bool((after == y)[bounds.harmless].all())
        spared.append(int(bounds.harmless.sum()))
    assert spared[0] > 50
    assert spared == sorted(spared, reverse=True)
    assert spared[-1] < spared[0]
    assert "cannot turn" in str(bounds)


def test_a_deep_models_bound_is_called_an_estimate_and_a_regressions_is_refused():
    scene = kit.scene("mlp")
    bounds = probe_bounds(scene, kit.unseen().select(range(10)), torch.zeros_like(scene.objective.vector()))
    assert bounds.basis == "estimated"
    assert "should not" in str(bounds)
    assert torch.allclose(bounds.value, torch.zeros(10))
    assert torch.equal(bounds.harmless, bounds.room > 0)
    with pytest.raises(Misuse):
        first_order_bound(-1.0, *[torch.ones(1)] * 4)


def test_bounds_need_classes():
    from expunge import Recipe, Records, train
    from expunge.screen import Scene

    x = torch.randn(30, 2, generator=generator(0))
    records = Records(x, x.sum(1))
    trained = train(Recipe(model="softmax", loss="mse", epochs=1, batch_size=30, optimiser_args={"lr": 0.01}), records)
    scene = Scene(trained, records)
    with pytest.raises(Unsupported, match="cross-entropy"):
        probe_bounds(scene, records, scene.objective.vector())


def logistic(x, y, weight, decay=1e-2, start=None):
    """Minimiser of ``(1/n) sum w_i log(1 + exp(-y_i x_i t)) + decay / 2 |t|^2`` by Newton, n the number of all rows."""
    n, t = len(x), torch.zeros(x.shape[1], dtype=x.dtype) if start is None else start.clone()
    for _ in range(50):
        g, h = slopes(x, y, weight, t, decay)
        step = torch.linalg.solve(h, g)
        t = t - step
        if float(step.norm()) < 1e-14:
            break
    assert n == len(y)
    return t


def slopes(x, y, weight, t, decay):
    s = torch.sigmoid(-y * (x @ t))
    g = -(weight * s * y) @ x / len(x) + decay * t
    h = (x * (weight * s * (1 - s))[:, None]).T @ x / len(x) + decay * torch.eye(len(t), dtype=x.dtype)
    return g, h


def orders(sizes, removed):
    """Slopes in n, on log scales, of the change by a removal and of three predictions' errors."""
    found = []
    for n in sizes:
        rng = generator(11)
        x = torch.randn(max(sizes), 4, generator=rng, dtype=torch.float64)
        noise = torch.randn(max(sizes), generator=rng, dtype=torch.float64)
        y = torch.sign(x @ torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64) + noise)
        x, y, w = x[:n], y[:n], torch.ones(n, dtype=torch.float64)
        t = logistic(x, y, w)
        errors = []
        for first in range(0, 40, removed):
            less = w.clone()
            less[first : first + removed] = 0
            exact = logistic(x, y, less, start=t)
            g, h = slopes(x, y, w - less, t, 0.0)[0], slopes(x, y, w, t, 1e-2)[1]
            newton = -torch.linalg.solve(slopes(x, y, less, t, 1e-2)[1], slopes(x, y, less, t, 1e-2)[0])
            influence = torch.linalg.solve(h, g)
            errors.append([float((one - exact).norm()) for one in (t, t + influence, t + newton)])
        found.append(torch.tensor(errors).mean(0))
    logs = torch.stack(found).log()
    span = math.log(sizes[-1] / sizes[0])
    return ((logs[-1] - logs[0]) / span).tolist()


def test_t2_influence_errs_by_one_over_n_squared_and_the_change_is_one_over_n():
    change, influence, newton = orders([200, 400, 800, 1600, 3200], 1)
    assert change == pytest.approx(-1, abs=0.15)
    assert influence == pytest.approx(-2, abs=0.2)
    assert -2.6 < newton < -1.8


def test_t2_the_error_grows_with_the_square_of_the_number_removed():
    x = torch.randn(2000, 3, generator=generator(3), dtype=torch.float64)
    y = torch.sign(x[:, 0] + 0.5 * torch.randn(2000, generator=generator(4), dtype=torch.float64))
    x[:32], y[:32] = torch.tensor([-1.0, 1.0, 0.5], dtype=torch.float64), 1.0  # copies, so that all pull alike
    w = torch.ones(2000, dtype=torch.float64)
    t, errors = logistic(x, y, w), []
    h = slopes(x, y, w, t, 1e-2)[1]
    for k in (4, 8, 16, 32):
        less = w.clone()
        less[:k] = 0
        moved = t + torch.linalg.solve(h, slopes(x, y, w - less, t, 0.0)[0])
        errors.append(float((moved - logistic(x, y, less, start=t)).norm()))
    slope = math.log(errors[-1] / errors[0]) / math.log(8)
    assert slope == pytest.approx(2, abs=0.3)


def test_t3_on_a_quadratic_one_newton_step_is_exact_and_influence_over_one_less_the_leverage_too():
    x = torch.randn(50, 4, generator=generator(0), dtype=torch.float64)
    y = x @ torch.ones(4, dtype=torch.float64) + torch.randn(50, generator=generator(1), dtype=torch.float64)
    ridge = 0.3 * torch.eye(4, dtype=torch.float64)
    h = x.T @ x + ridge
    t = torch.linalg.solve(h, x.T @ y)
    for out in ([0], [3, 9, 20]):
        kept = torch.ones(50, dtype=torch.bool)
        kept[out] = False
        exact = torch.linalg.solve(x[kept].T @ x[kept] + ridge, x[kept].T @ y[kept])
        g = x[out].T @ (x[out] @ t - y[out])
        newton = t + torch.linalg.solve(x[kept].T @ x[kept] + ridge, g)
        assert torch.allclose(newton, exact, atol=1e-12)
        influence = torch.linalg.solve(h, g)
        assert not torch.allclose(t + influence, exact, atol=1e-6)
        if len(out) == 1:
            leverage = x[out] @ torch.linalg.solve(h, x[out].T)
            assert torch.allclose(t + influence / (1 - leverage[0, 0]), exact, atol=1e-12)
