"""The damped Newton step: its bound term by term, its solvers against closed forms, its noise, its claims."""

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expunge.calculus import Objective, lissa
from expunge.calculus.head import softmax_hessian_lipschitz
from expunge.certify import gaussian
from expunge.certify.accountant import Budget
from expunge.certify.guarantee import GAUSSIAN_MU, recheck
from expunge.certify.newton import DERIVATIONS, NewtonUnlearning
from expunge.certify.newton_bound import Smoothness, zhang_bound
from expunge.certify.newton_step import NewtonStep, estimate_smoothness, lanczos
from expunge.core.claim import Claim, Constant, Guarantee
from expunge.core.coins import generator
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.events import GaussianNoise
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.ball import norm_of, project
from expunge.learn.loop import Tally, row_losses
from expunge.learn.training import adopt, load, train
from expunge.testing import conformance, digits
from expunge.testing.contract import CONTRACT
from expunge.unlearn import Retrain
from expunge.unlearn.method import Task

KNOWN = {derivation.name: derivation for derivation in (*DERIVATIONS, GAUSSIAN_MU)}
WIDE = Budget(epsilon=1e9, delta=1e-5, requests=5)


def linear_rows(n=60, seed=0):
    """Regression with two targets."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n, 5)))
    y = x @ torch.from_numpy(rng.normal(size=(5, 2))) + torch.from_numpy(rng.normal(size=(n, 2)))
    return Records(x, y, [f"r{i}" for i in range(n)])


def class_rows(n=80, seed=1, size=4, length=1.0):
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(rng.integers(0, 3, n))
    x = torch.from_numpy(rng.normal(size=(n, size))) + 2 * nn.functional.one_hot(y, size)
    return Records(length * x / x.norm(dim=1).max(), y, [f"r{i}" for i in range(n)], classes=3)


LINEAR = linear_rows()
RIDGE = Recipe(
    model="softmax", loss="mse", optimiser_args={"lr": 0.01}, epochs=2, weight_decay=0.1, dtype="float64", max_norm=50.0
)
ROWS = class_rows()
SOFT = replace(RIDGE, loss="cross_entropy", weight_decay=0.05, max_norm=10.0)
DEEP = Recipe(model="mlp", model_args={"hidden": [6]}, epochs=5, weight_decay=1e-3, max_norm=5.0, dtype="float64")
FORGET = [f"r{i}" for i in range(3, 19, 2)]
ASK = Request.remove(FORGET)
EXACT_RIDGE = Smoothness(hessian_lipschitz=0.0, lambda_min=0.1)


def vector(state):
    return torch.cat([state[name].double().flatten() for name in state])


def minimum(recipe, records):
    """The weights that minimise mean loss plus weight decay: Newton's method with dense Hessians, many times."""
    module = train(replace(recipe, epochs=0, max_norm=None), records).module.eval()
    objective = Objective(module, row_losses(recipe))
    x, y = records.x.double(), records.y
    eye = torch.eye(objective.size, dtype=torch.float64)
    for _ in range(60):
        here = objective.vector()
        slope = objective.gradient(x, y) / len(x) + recipe.weight_decay * here
        matrix = torch.stack([objective.hessian_product(x, y, one) for one in eye]) / len(x) + recipe.weight_decay * eye
        objective.put(here - torch.linalg.solve(matrix, slope))
        if float(slope.norm()) < 1e-13:
            break
    return module, objective.vector()


def unlearn(method, trained, records, request=ASK, seed=0):
    return method(trained, records, request, rng=generator(seed))


def before_noise(done):
    return vector({name: done.trained.secret[name] for name in done.trained.module.state_dict()})


def test_the_bound_has_the_numbers_of_the_notes():
    assert zhang_bound(21, 1, 2000) == pytest.approx(42.441, abs=1e-9)
    assert zhang_bound(10, 1, 200) == pytest.approx(21)
    assert zhang_bound(20, 1, 0.01) == pytest.approx(80_040)
    assert zhang_bound(21, 1, 2000, 0, 3.0) == pytest.approx(42.441 + 3 / 2000)
    assert zhang_bound(21, 1, 1.0, -1.0) == math.inf
    series = zhang_bound(2, 1, 3, 0.5, 0.25, gradient_lipschitz=1.5, dimension=1000, rho=1e-3)
    slope = 2 * 1.5 * 2 + 0.25
    assert series == pytest.approx(
        (2 * 2 * (1 * 2 + 3) + 0.25) / 3.5 + (16 * math.sqrt(math.log(1e6)) / 3.5 + 1 / 16) * slope
    )
    inexact = zhang_bound(2, 1, 3, 0.5, 0.25, gradient_lipschitz=1.5, tolerance=0.1)
    assert inexact - zhang_bound(2, 1, 3, 0.5, 0.25) == pytest.approx(0.1 * slope / 3.5)


positive = st.floats(1e-3, 1e3)


@given(positive, positive, st.floats(0, 1e6), st.floats(-1e2, 1e3))
@settings(max_examples=300, deadline=None)
def test_the_bound_is_below_the_ball_s_diameter_exactly_where_the_least_eigenvalue_passes_m_c(c, m, damping, least):
    bound = zhang_bound(c, m, damping, least)
    if m * c >= least:
        assert bound >= 2 * c * (1 - 1e-12)
    else:
        assert bound <= 2 * c * (1 + 1e-12)


@pytest.mark.parametrize(("damping", "share"), [(0.0, 1.0), (0.7, 0.76)])
def test_the_bound_holds_and_is_nearly_reached_where_it_says_something(damping, share):
    # A loss of one weight with Hessian h + M w on [-C, C]; the start and the minimum at opposite ends of the ball.
    c, m, h = 1.0, 0.5, 3.0

    def slope(w, at):
        return h * w + m * w * w / 2 - (h * at + m * at * at / 2)  # zero at `at`

    worst = 0.0
    for start, end in itertools.product(np.linspace(-c, c, 41), repeat=2):
        step = start - slope(start, end) / (h + m * start + damping)
        worst = max(worst, abs(step - end))
    bound = zhang_bound(c, m, damping, h - m * c)
    assert bound < 2 * c
    assert 0.99 * share * bound < worst <= bound * (1 + 1e-12)


def test_at_an_active_constraint_the_bound_fails_unless_it_counts_the_gradient_there():
    at, c = 3.0, 1.0  # (w - 3)^2 / 2 on [-1, 1]: retraining ends at 1, where the gradient is -2
    step = c - (c - at) / 1.0
    assert abs(step - c) > zhang_bound(c, 0.0, 0.0, 1.0)
    assert abs(step - c) <= zhang_bound(c, 0.0, 0.0, 1.0, 2.0)


def third(p, u):
    return float((p * (u - (p * u).sum()) ** 3).sum())


def test_the_hessian_of_the_softmax_changes_no_faster_than_the_constant_and_can_come_near_it():
    rng = np.random.default_rng(0)
    worst = 0.0
    for k in (2, 3, 10):
        for _ in range(2000):
            u = rng.normal(size=k)
            p = rng.dirichlet(np.full(k, 0.3))
            worst = max(worst, abs(third(p, u / np.linalg.norm(u))))
    p = (1 - 1 / math.sqrt(3)) / 2
    reached = abs(third(np.array([p, 1 - p]), np.array([1, -1]) / math.sqrt(2)))
    assert reached == pytest.approx(softmax_hessian_lipschitz(1.0), rel=1e-12)
    assert 0.8 * reached < worst <= reached
    assert softmax_hessian_lipschitz(3.0) == pytest.approx(27 * math.sqrt(2 / 27))


def test_hessians_of_the_softmax_objective_differ_by_no_more_than_the_constants_allow():
    trained = train(SOFT, ROWS)
    done = unlearn(NewtonUnlearning(feature_radius=1.0, damping=1.0), trained, ROWS)
    constants = {name: one.value for name, one in done.guarantee.constants.items()}
    assert constants["radius"] == pytest.approx(math.sqrt(2))
    module = copy.deepcopy(trained.module)
    objective, x, y = Objective(module, row_losses(SOFT)), ROWS.x, ROWS.y
    eye = torch.eye(objective.size, dtype=torch.float64)

    def hessian(at):
        objective.put(at)
        return torch.stack([objective.hessian_product(x, y, one) for one in eye]) / len(x) + SOFT.weight_decay * eye

    ratios, values = [], []
    for seed in range(4):
        one, other = (
            torch.randn(objective.size, generator=generator(2 * seed + k), dtype=torch.float64) for k in (0, 1)
        )
        first, second = hessian(one), hessian(one + 0.05 * other)
        ratios.append(float(torch.linalg.matrix_norm(first - second, 2)) / float(0.05 * other.norm()))
        values += torch.linalg.eigvalsh(first).tolist()
    assert 0.02 * constants["hessian_lipschitz"] < max(ratios) <= constants["hessian_lipschitz"]
    assert constants["lambda_min"] <= min(values) * (1 + 1e-9)
    assert max(values) <= constants["gradient_lipschitz"]


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_on_a_quadratic_one_undamped_step_from_anywhere_is_retraining(solver):
    method = NewtonUnlearning(
        damping=0.0,
        solver=solver,
        tolerance=1e-13,
        smoothness=replace(EXACT_RIDGE, gradient_lipschitz=50.0),
        sigma=1e-3,
        budget=WIDE,
    )
    for epochs in (0, 2):
        trained = train(replace(RIDGE, epochs=epochs), LINEAR)
        done = unlearn(method, trained, LINEAR)
        wanted = minimum(RIDGE, LINEAR.without(FORGET))[1]
        assert float((before_noise(done) - wanted).norm()) < 1e-10
        assert float((vector(trained.module.state_dict()) - wanted).norm()) > 0.1
    assert float((minimum(RIDGE, LINEAR)[1] - wanted).norm()) > 1e-3  # it is not the model of all rows


def test_the_regulariser_s_share_is_in_the_gradient_and_in_the_hessian():
    trained = train(RIDGE, LINEAR)
    step = NewtonStep(NewtonUnlearning(sigma=1.0), _task(trained, LINEAR), trained.module.eval(), generator(0))
    x = torch.cat([LINEAR.without(FORGET).x, torch.ones(len(LINEAR) - len(FORGET), 1, dtype=torch.float64)], 1)
    weights = torch.cat([trained.module.head.weight, trained.module.head.bias[:, None]], 1).detach()
    residual = x @ weights.T - LINEAR.without(FORGET).y
    slope = 2 * residual.T @ x / len(x) + 0.1 * weights
    wanted = torch.cat([slope[:, :-1].flatten(), slope[:, -1]])
    torch.testing.assert_close(step.gradient(), wanted, rtol=1e-12, atol=1e-12)
    v = torch.randn(12, generator=generator(3), dtype=torch.float64)
    turned = torch.cat([v[:10].view(2, 5), v[10:, None]], 1)
    image = 2 * turned @ (x.T @ x) / len(x) + 0.1 * turned
    torch.testing.assert_close(
        step.product(v), torch.cat([image[:, :-1].flatten(), image[:, -1]]), rtol=1e-12, atol=1e-12
    )


def _task(trained, records):
    split = ASK.split(records, ids=trained.ids)
    return Task(trained=trained, forget=split.forget, retain=split.retain, tally=Tally())


def test_at_the_minimum_the_retained_rows_pull_as_the_removed_ones_push_and_elsewhere_not():
    module, best = minimum(SOFT, ROWS)

    def sides(at):
        objective = Objective(copy.deepcopy(module), row_losses(SOFT))
        objective.put(at)
        grads = []
        for records in (ROWS.take(FORGET), ROWS.without(FORGET)):
            mean = objective.gradient(records.x, records.y) / len(records)
            grads.append(mean + SOFT.weight_decay * objective.vector())
        m, n = len(FORGET), len(ROWS)
        return grads[1], -(m / (n - m)) * grads[0]

    one, other = sides(best)
    assert float((one - other).norm()) < 1e-12
    assert float(one.norm()) > 1e-4
    one, other = sides(best + 0.05)
    assert float((one - other).norm()) > 0.1 * float(one.norm())


def test_all_solvers_agree_where_the_series_is_long_enough():
    trained = train(SOFT, ROWS)
    given = {"sigma": 1e-6, "damping": 0.5}
    exact = before_noise(unlearn(NewtonUnlearning(solver="exact", **given), trained, ROWS))
    cg = before_noise(unlearn(NewtonUnlearning(solver="cg", tolerance=1e-12, **given), trained, ROWS))
    moved = float((exact - vector(trained.module.state_dict())).norm())
    assert moved > 0.1
    assert float((exact - cg).norm()) < 1e-10
    whole = {"solver": "lissa", "scale": 1.2, "batch_size": len(ROWS), **given}
    series = before_noise(unlearn(NewtonUnlearning(steps=45, **whole), trained, ROWS))
    assert float((exact - series).norm()) < 1e-8
    short = before_noise(unlearn(NewtonUnlearning(steps=1, **whole), trained, ROWS))
    assert float((exact - short).norm()) > 0.1 * moved
    noisy = [NewtonUnlearning(solver="lissa", scale=1.5, batch_size=16, steps=30, samples=k, **given) for k in (1, 12)]
    apart = [float((exact - before_noise(unlearn(one, trained, ROWS))).norm()) for one in noisy]
    assert 0 < apart[1] < apart[0] < 0.5 * moved


@pytest.mark.parametrize(("x", "wanted"), [(0.01, 0.99601), (0.1, 0.95258), (1.0, 0.63268), (10.0, 0.1)])
def test_the_truncated_series_is_no_inverse_of_small_eigenvalues(x, wanted):
    b = torch.ones(1, dtype=torch.float64)
    found = lissa(itertools.repeat(lambda v: 0.4 * x * v, 1000), b, scale=1000.0, damping=0.6 * x, unit=1.0).x
    assert float(found) == pytest.approx((1 - (1 - x / 1000) ** 1001) / x, rel=1e-9)
    assert float(found) == pytest.approx(wanted, abs=2e-5)


def test_the_method_s_series_is_that_one():
    trained = train(replace(SOFT, weight_decay=0.0), ROWS)
    method = NewtonUnlearning(solver="lissa", damping=0.01, scale=30.0, steps=20, sigma=1.0, batch_size=200)
    step = NewtonStep(method, _task(trained, ROWS), trained.module.eval(), generator(0))
    # Along a shift of all classes' weights the loss is constant, so that the damping is the whole eigenvalue.
    b = torch.zeros(15, dtype=torch.float64)
    b[12:] = 1.0
    assert float(step.solve(b)[12]) == pytest.approx((1 - (1 - 0.01 / 30) ** 21) / 0.01, rel=1e-9)


def test_noise_of_the_stated_size_is_in_every_parameter():
    records = Records(torch.rand(50, 40), torch.arange(50) % 3, [f"r{i}" for i in range(50)], classes=40)
    recipe = replace(DEEP, model_args={"hidden": [80, 80]}, epochs=1, dtype="float32")
    done = unlearn(NewtonUnlearning(damping=5.0, sigma=0.3, tolerance=1e-3), train(recipe, records), records)
    shares = {}
    for name, parameter in done.trained.module.named_parameters():
        noise = parameter.detach().double() - done.trained.secret[name]
        shares[name] = float(noise.square().mean().sqrt()) / 0.3
        n = noise.numel()
        assert 1 - 5 / math.sqrt(2 * n) < shares[name] < 1 + 5 / math.sqrt(2 * n), name
        assert int((noise == 0).sum()) == 0
    assert len(shares) == 6
    again = unlearn(NewtonUnlearning(damping=5.0, sigma=0.3, tolerance=1e-3), train(recipe, records), records)
    assert torch.equal(before_noise(done), before_noise(again))
    assert done.trained.digest() != again.trained.digest()


@pytest.mark.parametrize(
    ("recipe", "settings", "basis"),
    [
        (SOFT, {"feature_radius": 1.0}, "proved"),
        (SOFT, {"feature_radius": 1.0, "solver": "exact"}, "proved"),
        (SOFT, {"feature_radius": 1.0, "solver": "lissa", "scale": 4.0, "steps": 12}, "conditional"),
        (SOFT, {"feature_radius": 1.0, "solver": "lissa", "scale": 4.0, "steps": 5}, "none"),
        (SOFT, {"feature_radius": 1.0, "solver": "lissa", "scale": 2.5, "steps": 12}, "none"),
        (replace(SOFT, max_norm=5.0), {"feature_radius": 1.0}, "none"),  # the minimum may lie outside the ball
        (DEEP, {"smoothness": Smoothness(hessian_lipschitz=2.0, lambda_min=-1.0), "solver": "exact"}, "conditional"),
        (DEEP, {"smoothness": Smoothness(hessian_lipschitz=2.0, lambda_min=-1.0)}, "none"),  # cg needs L
        (DEEP, {"smoothness": Smoothness(hessian_lipschitz=2.0, lambda_min=-9.0), "solver": "exact"}, "none"),
        (
            DEEP,
            {"smoothness": Smoothness(hessian_lipschitz=2.0, lambda_min=-1.0, source="estimated"), "solver": "exact"},
            "none",
        ),
        (DEEP, {"sigma": 0.01}, "none"),
    ],
)
def test_what_is_claimed_follows_from_where_the_constants_come_from(recipe, settings, basis):
    trained = train(recipe, ROWS)
    done = unlearn(NewtonUnlearning(damping=4.0 if recipe is DEEP else 2.0, **settings), trained, ROWS)
    assert done.guarantee.basis == basis
    assert done.claim is (Claim.NONE if basis == "none" else Claim.CERTIFIED)
    assert recheck(done.guarantee, KNOWN) == ()
    assert Guarantee.from_json(json.loads(json.dumps(done.guarantee.to_json(), allow_nan=False))) == done.guarantee
    radius = recipe.max_norm
    (release,) = done.trained.releases
    assert isinstance(release, GaussianNoise)
    assert release.sigma == done.guarantee.sigma
    assert (done.guarantee.transcript is None) == (basis == "none")
    assert "stationary" in done.guarantee.reference
    assert "active" in done.guarantee.remarks[0]
    assert any(text.startswith("Vacuous") for text in done.guarantee.remarks)
    if basis == "none":
        assert release.sensitivity == 2 * radius
    else:
        assert release.sensitivity == done.guarantee.sensitivity >= 2 * radius


def test_constants_called_proved_are_computed_again_by_whoever_doubts_them():
    done = unlearn(NewtonUnlearning(feature_radius=1.0), train(SOFT, ROWS), ROWS)
    for name in ("hessian_lipschitz", "sensitivity", "sigma", "mu", "radius"):
        held = done.guarantee.constants
        lied = {**held, name: Constant(held[name].value / 2, "proved", held[name].derivation)}
        assert recheck(replace(done.guarantee, constants=lied), KNOWN), name


def test_a_bound_below_the_diameter_is_not_called_vacuous_and_gives_less_noise():
    method = NewtonUnlearning(damping=0.0, solver="exact", smoothness=replace(EXACT_RIDGE, gradient_norm=0.01))
    guarantee = method.guarantee_for(train(RIDGE, LINEAR))
    assert guarantee.sensitivity == pytest.approx(0.1)
    assert guarantee.sigma == pytest.approx(0.1 / Budget().mu_each)
    assert guarantee.mu == pytest.approx(Budget().mu_each)
    assert guarantee.basis == "conditional"
    assert not any("Vacuous" in text for text in guarantee.remarks)
    assert gaussian.epsilon_of(guarantee.mu * 10, 1e-5) == pytest.approx(1.0, rel=1e-6)


def test_a_given_sigma_has_the_epsilon_that_is_honest_and_the_budget_must_allow_it():
    trained = train(SOFT, ROWS)
    tiny = NewtonUnlearning(feature_radius=1.0, sigma=0.01)
    with pytest.raises(BudgetExhausted):
        unlearn(tiny, trained, ROWS)
    done = unlearn(replace(tiny, budget=WIDE), trained, ROWS)
    assert done.guarantee.epsilon > 1e6
    assert done.guarantee.epsilon == pytest.approx(gaussian.epsilon_of(done.guarantee.sensitivity / 0.01, 1e-5))


def test_of_lissa_the_chance_to_miss_the_bound_is_paid_for():
    method = NewtonUnlearning(feature_radius=1.0, solver="lissa", scale=4.0, steps=12, damping=2.0, rho=1e-8)
    trained = train(SOFT, ROWS)
    done = unlearn(method, trained, ROWS)
    guarantee = done.guarantee
    assert guarantee.mu is None
    plain = gaussian.epsilon_of(guarantee.sensitivity / guarantee.sigma, 1e-5 - 1e-8)
    assert guarantee.epsilon == pytest.approx(plain - math.log1p(-1e-8), rel=1e-9)
    assert guarantee.constants["rho"] == Constant(1e-8, "supplied")
    left = Budget(epsilon=1 + 100 * math.log1p(-1e-8), delta=1e-5 - 1e-6)
    assert guarantee.sigma == pytest.approx(guarantee.sensitivity / left.mu_each)
    assert guarantee.sensitivity == pytest.approx(
        zhang_bound(
            10.0, softmax_hessian_lipschitz(math.sqrt(2)), 2.0, 0.05, gradient_lipschitz=1.05, dimension=15, rho=1e-8
        )
    )
    assert guarantee.transcript.delta == 1e-5
    assert guarantee.transcript.mu is None
    assert 100 * 1e-8 < guarantee.transcript.epsilon < 1
    with pytest.raises(Misuse, match=r"^rho 2e-07 for 100 releases leaves no budget"):
        unlearn(replace(method, rho=2e-7), trained, ROWS)


def test_requests_in_sequence_start_from_the_weights_before_noise_under_the_same_bound(tmp_path):
    method = NewtonUnlearning(
        feature_radius=1.0, damping=1.0, solver="exact", sigma=200.0, budget=replace(WIDE, requests=2)
    )
    trained = train(SOFT, ROWS)
    first = unlearn(method, trained, ROWS, Request.remove(FORGET[:4]))
    second = unlearn(method, first.trained, ROWS, Request.remove(FORGET[4:]))
    assert first.guarantee.sensitivity == second.guarantee.sensitivity
    assert second.guarantee.transcript.releases == 2
    assert second.guarantee.transcript.mu == pytest.approx(math.sqrt(2) * second.guarantee.mu)
    # The second is a step from the first's un-noised weights, on what remains of both.
    plain = copy.deepcopy(trained.module)
    plain.load_state_dict(dict(first.trained.secret))
    again = unlearn(method, replace(trained, module=plain, secret={}), ROWS, ASK)
    assert float((before_noise(second) - before_noise(again)).norm()) < 1e-9
    with pytest.raises(BudgetExhausted):
        unlearn(method, second.trained, ROWS, Request.remove(["r0"]))
    # Read from disk there is no secret: it starts from what was given out, clipped to the ball.
    first.trained.save(tmp_path / "model")
    lost = load(tmp_path / "model")
    assert not lost.secret
    assert lost.releases == first.trained.releases
    assert float(norm_of(lost.module)) > 10
    slower = unlearn(method, lost, ROWS, Request.remove(FORGET[4:]))
    assert slower.guarantee.sensitivity == first.guarantee.sensitivity
    assert math.sqrt(sum(float(one.square().sum()) for one in slower.trained.secret.values())) <= 10.0


def test_the_result_before_noise_lies_in_the_ball_wherever_the_step_leads():
    records = Records(50 * LINEAR.x, 1000 * LINEAR.y, LINEAR.ids)
    recipe = replace(RIDGE, weight_decay=1e-6, max_norm=0.5, optimiser_args={"lr": 1e-5})
    done = unlearn(NewtonUnlearning(damping=1e-3, sigma=1.0), train(recipe, records), records)
    assert float(before_noise(done).norm()) == pytest.approx(0.5, rel=1e-9)
    assert float(before_noise(done).norm()) <= 0.5


def test_models_and_settings_that_it_cannot_vouch_for_are_refused():
    refused = {
        "no max_norm": (replace(DEEP, max_norm=None), {"sigma": 1.0}),
        "running statistics": (replace(DEEP, model_args={"hidden": [6], "norm": "batch"}), {"sigma": 1.0}),
        "mask of a pruned model": (replace(DEEP, pruning=Pruning(sparsity=0.5)), {"sigma": 1.0}),
        "for the model softmax only": (DEEP, {"feature_radius": 1.0}),
        "cannot size the noise": (DEEP, {}),
        "has 2 shards": (replace(DEEP, sharding=Sharding(shards=2)), {"sigma": 1.0}),
    }
    for why, (recipe, how) in refused.items():
        trained = train(recipe, ROWS)
        method = NewtonUnlearning(**how)
        assert why in str(method.supports(trained))
        with pytest.raises(Unsupported, match=why):
            unlearn(method, trained, ROWS)
    with pytest.raises(Misuse, match=r"^a row is longer than feature_radius 0\.9"):
        unlearn(NewtonUnlearning(feature_radius=0.9), train(SOFT, ROWS), ROWS)
    bad = [("damping", -1), ("solver", "qr"), ("sigma", 0.0), ("steps", 0), ("rho", 1.0), ("scale", 0.0)]
    bad += [("tolerance", 0.0), ("batch_size", 0), ("samples", True), ("feature_radius", 0.0)]
    for name, value in bad:
        with pytest.raises(Misuse, match=name):
            NewtonUnlearning(**{name: value})
    with pytest.raises(Misuse, match="not both"):
        NewtonUnlearning(smoothness=EXACT_RIDGE, feature_radius=1.0)
    with pytest.raises(Misuse):
        Smoothness(hessian_lipschitz=-1.0, lambda_min=0.0)


@pytest.mark.parametrize("settings", [{"solver": "cg"}, {"solver": "exact"}])
def test_a_hessian_that_is_not_positive_definite_is_refused_without_a_number_that_the_rows_decide(settings):
    trained = train(replace(DEEP, epochs=1), ROWS)
    with pytest.raises(Misuse, match=r"^the Hessian plus damping 1e-06 is not positive definite; raise damping$"):
        unlearn(NewtonUnlearning(damping=1e-6, sigma=1.0, **settings), trained, ROWS)
    with pytest.raises(Misuse, match=r"^2 products did not reach the tolerance 1e-06; raise iterations"):
        unlearn(NewtonUnlearning(damping=10.0, sigma=1.0, iterations=2), trained, ROWS)
    with pytest.raises(Misuse, match=r"^LiSSA diverged: raise its scale, now 0\.1$"):
        unlearn(NewtonUnlearning(damping=10.0, sigma=1.0, solver="lissa", scale=0.1), trained, ROWS)


def test_lanczos_finds_the_ends_of_a_spectrum():
    matrix = torch.randn(40, 40, generator=generator(0), dtype=torch.float64)
    matrix = matrix + matrix.T
    values = torch.linalg.eigvalsh(matrix)
    low, high = lanczos(lambda v: matrix @ v, matrix[0], generator(1), 40)
    assert (low, high) == pytest.approx((float(values[0]), float(values[-1])), rel=1e-9)
    inside = lanczos(lambda v: matrix @ v, matrix[0], generator(1), 8)
    assert float(values[0]) < inside[0] < inside[1] < float(values[-1])


def test_estimates_are_of_the_objective_and_prove_nothing():
    found = estimate_smoothness(train(RIDGE, LINEAR), LINEAR, rng=generator(0))
    x = torch.cat([LINEAR.x, torch.ones(len(LINEAR), 1, dtype=torch.float64)], 1)
    values = torch.linalg.eigvalsh(2 * x.T @ x / len(x)) + 0.1
    assert found.lambda_min == pytest.approx(float(values[0]), rel=1e-6)
    assert found.gradient_lipschitz == pytest.approx(float(values[-1]), rel=1e-9)
    assert found.hessian_lipschitz < 1e-9
    assert {one.source for one in found.constants().values()} == {"estimated"}
    soft = estimate_smoothness(train(SOFT, ROWS), ROWS, rng=generator(0))
    assert 0.01 < soft.hessian_lipschitz / softmax_hessian_lipschitz(math.sqrt(2)) < 1
    network = estimate_smoothness(train(DEEP, ROWS), ROWS, rng=generator(0))
    assert network.lambda_min < 0.0 < network.hessian_lipschitz
    done = unlearn(NewtonUnlearning(smoothness=network, damping=4.0), train(DEEP, ROWS), ROWS)
    assert (done.guarantee.basis, done.claim) == ("none", Claim.NONE)


def test_a_model_made_elsewhere_is_clipped_first():
    module = copy.deepcopy(train(replace(DEEP, max_norm=None), ROWS).module)
    with torch.no_grad():
        module.head.weight.mul_(10)
    adopted = adopt(module, DEEP, ROWS)
    assert float(norm_of(module)) > 5
    method = NewtonUnlearning(damping=60.0, sigma=0.1)
    done = unlearn(method, adopted, ROWS)
    assert float(before_noise(done).norm()) <= 5
    project(module, 5.0)
    again = unlearn(method, adopt(module, DEEP, ROWS), ROWS)
    assert float((before_noise(done) - before_noise(again)).norm()) < 1e-9


def test_it_conforms_on_networks_and_on_softmax_models():
    deep = Recipe(model="mlp", epochs=30, batch_size=32, weight_decay=1e-3, max_norm=8.0)
    report = conformance(
        NewtonUnlearning(damping=1.0, tolerance=1e-2, sigma=1e-3), case=replace(digits(), recipes=(deep,))
    )
    assert report.passed, report
    soft = Recipe(model="softmax", epochs=10, batch_size=32, weight_decay=0.05, max_norm=10.0, dtype="float64")
    case = replace(digits(), recipes=(soft,))
    report = conformance(NewtonUnlearning(damping=1.0, feature_radius=8.0), case=case, checks=CONTRACT)
    assert report.passed, report


def test_retraining_takes_the_noise_back_and_the_transcript_stays():
    done = unlearn(NewtonUnlearning(feature_radius=1.0), train(SOFT, ROWS), ROWS)
    again = Retrain()(done.trained, ROWS, Request.remove(["r0"]), rng=generator(0))
    assert again.trained.digest() == train(SOFT, ROWS.without([*FORGET, "r0"])).digest()
    assert again.trained.releases == done.trained.releases
    assert isinstance(again.trained, Trained)
