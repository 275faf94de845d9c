import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from expunge.certify import full_batch
from expunge.certify.accountant import Budget
from expunge.certify.descent import DERIVATIONS, DescentToDelete
from expunge.certify.full_batch import SoftmaxRows, accelerated, plain, shrinkage, steps_to
from expunge.certify.guarantee import GAUSSIAN_MU, recheck
from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.events import GaussianNoise, SecretKept
from expunge.core.recipe import Pruning, Recipe
from expunge.core.request import Request
from expunge.learn.loop import Tally
from expunge.learn.training import adopt, load, train
from expunge.testing import conformance
from expunge.testing.case import digits
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.retrain import Retrain

RECIPE = Recipe(model="softmax", epochs=20, batch_size=64, weight_decay=0.05, optimiser_args={"lr": 0.1})
METHOD = DescentToDelete(sigma=0.05, share=0.0125, radius=7.0, budget=Budget(requests=4))
RECORDS = digits().records
DERIVED = {one.name: one for one in (GAUSSIAN_MU, *DERIVATIONS)}


@cache
def model():
    return train(RECIPE, RECORDS)


def remove(trained, ids, method=METHOD):
    return method(trained, RECORDS, Request.remove(ids), rng=generator(0))


def vector(state):
    return torch.cat([state["head.weight"].double(), state["head.bias"].double()[:, None]], dim=1)


def optimum(records, weight_decay=0.05):
    """By Newton's method with the dense Hessian, written apart from what is tested."""
    x = torch.cat([records.x.double().flatten(1), torch.ones(len(records), 1, dtype=torch.float64)], dim=1)
    w = torch.zeros(10, x.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = (x @ w.T).softmax(1)
        gradient = (p - nn.functional.one_hot(records.y, 10)).T @ x / len(x) + weight_decay * w
        second = torch.einsum("ni,ij->nij", p, torch.eye(10, dtype=torch.float64)) - torch.einsum("ni,nj->nij", p, p)
        curved = torch.zeros(10, x.shape[1], 10, x.shape[1], dtype=torch.float64)
        for i in range(10):
            for j in range(10):
                curved[i, :, j, :] = (x * second[:, i, j, None]).T @ x / len(x)
        hessian = curved.reshape(w.numel(), w.numel()) + weight_decay * torch.eye(w.numel(), dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, gradient.flatten()).view_as(w)
        if gradient.norm() < 1e-13:
            break
    return w


def rows_of(records):
    return SoftmaxRows.of(records, 0, Tally())


def some(count, seed):
    order = torch.randperm(len(RECORDS), generator=torch.Generator().manual_seed(seed)).tolist()
    return [RECORDS.ids[i] for i in order[:count]]


def test_after_each_of_several_requests_the_weights_are_within_the_sensitivity_of_the_optimum_of_what_is_left():
    trained, warm = model(), 0
    for request in range(4):
        ids = [i for i in some(40, request) if i in trained.ids][:5]
        result = remove(trained, ids)
        trained = result.trained
        apart = float((vector(trained.secret) - optimum(RECORDS.without(trained.gone))).norm())
        assert 0 < apart <= result.guarantee.sensitivity
        warm += any(isinstance(event, SecretKept) for event in result.events)
    assert warm == 3  # the first begins at zero


@pytest.mark.parametrize("swift", [True, False])
def test_removing_a_whole_class_starts_from_zero_and_is_within_the_sensitivity_too(swift):
    ids = RECORDS.of_class(3).ids
    method = replace(METHOD, accelerated=swift, sigma=1.0)
    first = remove(model(), some(5, 1), method).trained
    result = remove(first, [i for i in ids if i in first.ids], method)
    apart = float((vector(result.trained.secret) - optimum(RECORDS.without(result.trained.gone))).norm())
    assert apart <= result.guarantee.sensitivity
    assert not any(isinstance(event, SecretKept) for event in result.events)
    assert result.cost.gradients == len(result.trained.ids) * method.plan(first)["cold_steps"].value


def test_a_smoothness_that_is_too_small_makes_the_check_fail_so_that_the_check_can_fail():
    goal = optimum(RECORDS)
    for step in (plain, accelerated):
        share, extent = 1e-3, math.sqrt(2 * math.log(10) / 0.05)
        for smoothness, holds in ((7.0**2 / 2, True), (7.0**2 / 2 / 40, False)):
            steps = steps_to(smoothness, 0.05, step is accelerated, share)
            w = step(rows_of(RECORDS), torch.zeros_like(goal), steps, smoothness=smoothness, weight_decay=0.05)
            assert (float((w - goal).norm()) <= share * extent) is holds


@pytest.mark.parametrize("swift", [0, 1])
def test_fewest_steps_are_the_fewest(swift):
    for smoothness, decay, share in ((24.5, 0.05, 1e-2), (100.0, 1e-3, 1e-6), (1.0, 1.0, 0.9)):
        steps = steps_to(smoothness, decay, swift, share)
        assert shrinkage(smoothness, decay, swift, steps) <= share
        assert steps == 1 or shrinkage(smoothness, decay, swift, steps - 1) > share


class Quadratic:
    """Losses ``curvature / 2 w^2``, whose optimum is zero."""

    def __init__(self, curvature):
        self.curvature = curvature

    def gradient(self, w, weight_decay):
        return (self.curvature + weight_decay) * w


def test_plain_steps_shrink_the_worst_quadratic_by_exactly_the_bound():
    for curvature in (0.0, 3.0):  # the least and the most curved that a row's loss may be
        w = plain(Quadratic(curvature), torch.ones(1, 1, dtype=torch.float64), 7, smoothness=3.0, weight_decay=0.2)
        assert abs(float(w)) == pytest.approx(shrinkage(3.0, 0.2, 0, 7), rel=1e-12)
        swift = accelerated(
            Quadratic(curvature), torch.ones(1, 1, dtype=torch.float64), 7, smoothness=3.0, weight_decay=0.2
        )
        potential = (curvature + 0.2) / 2 + 0.2 / 2
        assert 0.2 / 2 * float(swift) ** 2 <= shrinkage(3.0, 0.2, 1, 7) ** 2 * potential


def test_accelerated_steps_shrink_no_quadratic_by_less_than_the_bound():
    losses = Quadratic(torch.linspace(0, 9, 200, dtype=torch.float64)[None])
    start = torch.ones(1, 200, dtype=torch.float64)
    potential = (losses.curvature + 0.01) / 2 + 0.01 / 2
    for steps in (1, 5, 40, 200, 400):
        w = accelerated(losses, start, steps, smoothness=9.0, weight_decay=0.01)
        value = (losses.curvature + 0.01) / 2 * w**2
        assert bool((value <= shrinkage(9.0, 0.01, 1, steps) ** 2 * potential).all())
        assert not bool((value <= shrinkage(9.0, 0.01, 1, 3 * steps + 30) ** 2 * potential).all())


def test_the_optimum_moves_by_exactly_the_drift_when_linear_losses_pull_the_other_way():
    n, m, size, decay = 100, 3, 2.0, 0.1  # rows of gradient +size, of which m of gradient -size leave
    before, after = -size * (n - 2 * m) / n / decay, -size / decay
    known = DERIVED["descent-distance"]
    warm = shrinkage(5.0, decay, 0, 400)
    bound = known.compute(5.0, decay, size, 0, m / n, 1.0, 400, 10_000)
    assert bound == pytest.approx(warm * abs(after - before) / (1 - warm), rel=1e-9)


def test_the_gradient_and_hessian_of_any_row_are_within_the_constants_and_reach_them():
    known = full_batch.softmax_constants(model().recipe, 3.0)
    generator_ = torch.Generator().manual_seed(0)
    largest = [0.0, 0.0]
    for trial in range(200):
        x = torch.randn(4, generator=generator_, dtype=torch.float64)
        x = 3.0 * x / x.norm()
        z = torch.randn(3, generator=generator_, dtype=torch.float64) * (0.1 if trial % 2 else 30.0)
        z = z if trial % 3 else torch.tensor([0.0, 0.0, -50.0], dtype=torch.float64)
        p = z.softmax(0)
        gradient = torch.outer(p - nn.functional.one_hot(torch.tensor(trial % 3), 3), x).norm()
        hessian = torch.linalg.eigvalsh(torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x, x)))
        assert float(hessian.min()) >= -1e-12
        largest = [max(largest[0], float(gradient)), max(largest[1], float(hessian.max()))]
    assert 0.99 <= largest[0] / known["gradient"].value <= 1 + 1e-12
    assert 0.99 <= largest[1] / known["smoothness"].value <= 1 + 1e-12


@pytest.mark.parametrize("swift", [0, 1])
def test_what_stays_is_the_fixed_point_of_the_recursion_and_draws_all_that_is_below_it(swift):
    smoothness, decay, gradient, share, steps = 20.0, 0.1, 5.0, 0.01, 60
    left, drift = shrinkage(smoothness, decay, swift, steps), 2 * share * gradient / decay
    bound = DERIVED["descent-distance"].compute(smoothness, decay, gradient, swift, share, 1e-9, steps, 10_000)

    def after(a):
        return left * (math.sqrt(a**2 + 2 * drift * (a + drift) + (a + drift) ** 2) if swift else a + drift)

    assert after(bound) == pytest.approx(bound, rel=1e-12)
    for factor in (0.0, 0.5, 0.99):
        assert factor * bound < after(factor * bound) < bound
    assert after(1.01 * bound) < 1.01 * bound


def test_where_starting_from_zero_is_no_slower_it_starts_from_zero():
    method = replace(METHOD, share=0.1)
    first = remove(model(), some(5, 0), method).trained
    plan = method.plan(first)
    assert plan["steps"].value >= plan["cold_steps"].value
    result = remove(first, [min(first.ids)], method)
    assert not any(isinstance(event, SecretKept) for event in result.events)
    assert result.cost.gradients == len(result.trained.ids) * plan["cold_steps"].value


def test_no_optimum_is_longer_than_said():
    for records in (RECORDS, RECORDS.of_class(3), RECORDS.select([0])):
        extent = DERIVED["descent-extent"].compute(0.05, 10)
        assert 0 < float(optimum(records).norm()) <= extent


def test_plain_and_accelerated_steps_do_not_start_from_one_another():
    first = remove(model(), some(5, 0)).trained
    other = remove(first, [min(first.ids)], replace(METHOD, accelerated=False))
    assert not any(isinstance(event, SecretKept) for event in other.events)


def test_rows_gradient_is_autograds():
    records = RECORDS.select(range(30))
    module = copy.deepcopy(model().module).double()
    loss = nn.functional.cross_entropy(module(records.x.double()), records.y)
    loss = loss + 0.05 / 2 * sum(one.square().sum() for one in module.parameters())
    wanted = torch.autograd.grad(loss, list(module.parameters()))
    found = rows_of(records).gradient(vector(module.state_dict()), 0.05)
    assert torch.allclose(found, vector({"head.weight": wanted[0], "head.bias": wanted[1]}), rtol=0, atol=1e-14)


def test_all_that_the_guarantee_says_follows_from_settings():
    result = remove(model(), some(5, 0))
    known = result.guarantee.constants
    assert result.claim is Claim.CERTIFIED
    assert result.guarantee.basis == "proved"
    settings = {
        "method.radius": 7.0,
        "method.sigma": 0.05,
        "method.share": 0.0125,
        "method.accelerated": 1.0,
        "method.budget.epsilon": 1.0,
        "method.budget.delta": 1e-5,
        "method.budget.requests": 4.0,
        "recipe.weight_decay": 0.05,
        "recipe.classes": 10.0,
    }
    assert recheck(result.guarantee, DERIVED, settings) == ()
    assert recheck(result.guarantee, DERIVED, {**settings, "method.radius": 8.0})
    lying = replace(result.guarantee, constants={**known, "steps": replace(known["steps"], value=1.0)})
    assert recheck(lying, DERIVED, settings)
    assert known["sensitivity"].value <= known["cap"].value == METHOD.budget.cap(0.05)
    assert known["sensitivity"].value > 0.9 * known["cap"].value  # no step more than needed
    assert dict(remove(model(), some(9, 5)).guarantee.constants) == dict(known)
    assert result.guarantee.outside == ()


def test_every_parameter_carries_noise_of_sigma_and_never_the_same():
    one, other = remove(model(), some(5, 0)), remove(model(), some(5, 0))
    differences = []
    for name, parameter in one.trained.module.named_parameters():
        noise = parameter.detach().double() - one.trained.secret[name]
        assert bool((noise != 0).all())
        assert float(noise.std()) == pytest.approx(0.05, rel=0.1 if noise.numel() > 100 else 0.8)
        differences.append(not torch.equal(parameter, dict(other.trained.module.named_parameters())[name]))
        assert torch.equal(one.trained.secret[name], other.trained.secret[name])
    assert all(differences)


def test_a_model_that_was_loaded_has_no_secret_and_starts_from_zero(tmp_path):
    first = remove(model(), some(5, 0)).trained
    loaded = load(first.save(tmp_path / "model"))
    ids = [i for i in some(20, 1) if i in first.ids][:5]
    warm, cold = remove(first, ids), remove(loaded, ids)
    plan = METHOD.plan(first)
    left = len(warm.trained.ids)
    assert (warm.cost.gradients, cold.cost.gradients) == (left * plan["steps"].value, left * plan["cold_steps"].value)
    assert plan["steps"].value < plan["cold_steps"].value
    assert not torch.equal(vector(warm.trained.secret), vector(cold.trained.secret))
    assert len(cold.trained.releases) == 2
    assert warm.guarantee.to_json()["constants"] == cold.guarantee.to_json()["constants"]


def test_secret_weights_are_not_started_from_after_their_time_and_being_used_does_not_prolong_it(monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr(full_batch.time, "time", lambda: now[0])
    method, trained, kept = replace(METHOD, keep_s=100.0), model(), []
    for wait in (0, 0, 60, 60):
        now[0] += wait
        ids = [i for i in RECORDS.ids if i in trained.ids][:3]
        result = remove(trained, ids, method)
        trained = result.trained
        kept.append([event for event in result.events if isinstance(event, SecretKept)])
    assert [len(events) for events in kept] == [0, 1, 1, 0]
    assert [events[0].until for events in kept[1:3]] == [1_000_100.0, 1_000_100.0]
    assert [events[0].requests_left for events in kept[1:3]] == [2, 1]


def test_secret_weights_made_to_a_wider_cap_or_by_other_methods_are_not_started_from():
    wide = remove(model(), some(5, 0), replace(METHOD, sigma=0.5)).trained
    ids = [i for i in some(20, 1) if i in wide.ids][:4]
    strict = remove(wide, ids, replace(METHOD, sigma=0.05))
    assert not any(isinstance(event, SecretKept) for event in strict.events)
    stranger = replace(wide, secret={name: one for name, one in wide.secret.items() if not name.startswith(".")})
    assert not any(isinstance(event, SecretKept) for event in remove(stranger, ids).events)
    tuned = FineTune(epochs=1)(wide, RECORDS, Request.remove(ids), rng=generator(0)).trained
    assert tuned.secret == {}


def test_a_replaced_row_counts_as_one_removed():
    first = remove(model(), some(5, 0)).trained
    swap = [i for i in first.ids if RECORDS.y[RECORDS.positions([i])[0]] == 4][:3]
    old = RECORDS.take(swap)
    request = Request.replace_rows(list(old.ids), old.x.flip(1), (old.y + 1) % 10)
    result = METHOD(first, RECORDS, request, rng=generator(0))
    assert any(isinstance(event, SecretKept) for event in result.events)
    left = RECORDS.without(result.trained.gone)
    new = type(RECORDS)(old.x.flip(1), (old.y + 1) % 10, [f"new{i}" for i in range(3)], classes=10)
    apart = float((vector(result.trained.secret) - optimum(left.plus(new))).norm())
    assert apart <= result.guarantee.sensitivity


def test_the_budget_ends():
    trained, method = model(), replace(METHOD, budget=Budget(requests=2))
    for request in range(2):
        result = remove(trained, [[i for i in RECORDS.ids if i in trained.ids][request]], method)
        trained = result.trained
    assert result.guarantee.transcript.epsilon == pytest.approx(1, rel=0.02)
    assert all(isinstance(release, GaussianNoise) for release in trained.releases)
    with pytest.raises(BudgetExhausted, match="retrain"):
        remove(trained, [min(trained.ids)], method)
    clean = remove(trained, [min(trained.ids)], Retrain()).trained
    assert clean.secret == {}
    assert len(clean.releases) == 2


def test_rows_longer_than_the_radius_are_refused_also_among_those_that_leave():
    method = replace(METHOD, radius=4.5)
    long = [i for i, x in zip(RECORDS.ids, RECORDS.x, strict=True) if float(x.square().sum()) + 1 > 4.5**2]
    short = next(i for i in RECORDS.ids if i not in long)
    assert 0 < len(long) < len(RECORDS) / 2
    for ids in ([short], long):
        with pytest.raises(Misuse, match=r"norm .* radius is 4\.5"):
            remove(model(), ids, method)
    assert remove(model(), [short], replace(METHOD, radius=4.85)).claim is Claim.CERTIFIED


def test_without_a_radius_it_is_that_of_features_within_one():
    known = replace(METHOD, radius=None).plan(model())
    assert known["radius"].value == pytest.approx(math.sqrt(65))


def test_what_has_no_single_optimum_is_refused():
    for trained in (
        train(replace(RECIPE, weight_decay=0.0, epochs=1), RECORDS),
        train(replace(RECIPE, model="mlp", epochs=1), RECORDS),
        adopt(model().module, replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random")), RECORDS),
    ):
        with pytest.raises(Unsupported, match="weight_decay > 0"):
            remove(trained, ["row-000"])
    adopted = adopt(model().module, RECIPE, RECORDS)
    assert remove(adopted, ["row-000"]).claim is Claim.CERTIFIED


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": math.inf}, "sigma"),
        ({"share": 0.0}, "share"),
        ({"share": 1.5}, "share"),
        ({"radius": 1.0}, "radius"),
        ({"keep_s": -1.0}, "keep_s"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, why):
    with pytest.raises(Misuse, match=why):
        DescentToDelete(**settings)


def test_steps_that_float64_cannot_make_or_nobody_can_wait_for_are_refused():
    with pytest.raises(Misuse, match="finer"):
        remove(model(), ["row-000"], replace(METHOD, sigma=1e-9))
    slow = train(replace(RECIPE, weight_decay=1e-4, epochs=1), RECORDS)
    with pytest.raises(Misuse, match="steps"):
        remove(slow, ["row-000"], replace(METHOD, accelerated=False))


def test_so_much_noise_that_no_step_is_needed_is_called_vacuous():
    assert any(
        "vacuous" in remark for remark in remove(model(), ["row-000"], replace(METHOD, sigma=1e5)).guarantee.remarks
    )
    assert not any("vacuous" in remark for remark in remove(model(), ["row-000"]).guarantee.remarks)


def test_it_passes_every_check_of_the_conformance_suite():
    method = replace(METHOD, sigma=0.02, radius=5.0)
    recipe = replace(RECIPE, weight_decay=0.02, epochs=40, batch_size=32)  # long enough to come to its optimum
    report = conformance(method, case=replace(digits(), recipes=(recipe,)), seeds=range(3))
    assert report.passed, report


def test_two_accelerated_steps_are_nesterovs_worked_by_hand():
    """smoothness 3, decay 1, so that L is 4, its root share 1/2 and the momentum 1/3; curvature 1: steps halve."""
    w = accelerated(Quadratic(1.0), torch.ones(1, 1, dtype=torch.float64), 2, smoothness=3.0, weight_decay=1.0)
    assert float(w) == pytest.approx((0.5 + (0.5 - 1) / 3) / 2, rel=1e-12)
