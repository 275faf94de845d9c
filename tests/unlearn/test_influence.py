"""The influence step against ridge regression in closed form, and against dense matrices in float64."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from expunge.calculus import Objective, dense, row_gradients
from expunge.calculus.factored import maker
from expunge.core import coins
from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import Tally
from expunge.learn.training import train
from expunge.unlearn import influence
from expunge.unlearn.influence import InfluenceUnlearning

DECAY = 0.05
FORGET = [f"r{i}" for i in range(0, 40, 4)]
FORMS = (
    InfluenceUnlearning(),
    InfluenceUnlearning(curvature="fisher", step=0.1),
    InfluenceUnlearning(curvature="hessian", damping=300.0),
)


def rows(n=72, classes=3):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 4))) + nn.functional.one_hot(y, 4)
    return Records(x, y, [f"r{i}" for i in range(n)], classes=classes)


RECORDS = rows()
TARGETS = Records(RECORDS.x, RECORDS.x @ torch.tensor([1.0, -2, 0, 1]).double() + RECORDS.y, RECORDS.ids)
RECIPE = Recipe(model="mlp", model_args={"hidden": (4,)}, epochs=3, batch_size=16, weight_decay=DECAY, dtype="float64")
LINEAR = replace(RECIPE, model="softmax", model_args={}, loss="mse")


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


@pytest.fixture(scope="module")
def linear():
    return train(LINEAR, TARGETS)


def vector(trained):
    return torch.cat([parameter.detach().flatten() for parameter in trained.module.parameters()])


def run(method, trained, records, ids=FORGET, seed=0):
    return method(trained, records, Request.remove(ids), rng=generator(seed)).trained


def ridge(records):
    """The minimum of the mean squared error plus decay / 2 |w|^2, the bias included, by the normal equations."""
    a = torch.cat([records.x, torch.ones(len(records), 1, dtype=torch.float64)], 1)
    matrix = 2 * a.T @ a / len(a) + DECAY * torch.eye(5, dtype=torch.float64)
    return torch.linalg.solve(matrix, 2 * a.T @ records.y / len(a))


def at(trained, where):
    module = copy.deepcopy(trained.module)
    nn.utils.vector_to_parameters(where.clone(), module.parameters())
    return replace(trained, module=module)


def test_newtons_step_is_exact_retraining_on_a_quadratic_wherever_it_starts(linear):
    method = InfluenceUnlearning(curvature="hessian", damping=0.0, rows=None, tolerance=1e-12)
    right = ridge(TARGETS.without(FORGET))
    assert float((vector(linear) - ridge(TARGETS)).norm()) > 1e-3  # training did not get to the minimum
    for start in (linear, at(linear, ridge(TARGETS)), at(linear, torch.full((5,), 3.0, dtype=torch.float64))):
        torch.testing.assert_close(vector(run(method, start, TARGETS)), right, rtol=0, atol=1e-8)


def test_the_difference_of_gradients_is_exact_on_a_quadratic_at_its_minimum_only(linear):
    method = InfluenceUnlearning(damping=0.0, rows=None, tolerance=1e-12)
    right = ridge(TARGETS.without(FORGET))
    there = vector(run(method, at(linear, ridge(TARGETS)), TARGETS))
    torch.testing.assert_close(there, right, rtol=0, atol=1e-8)
    away = vector(run(method, linear, TARGETS))
    # Elsewhere it takes back the rows and keeps, of what training had left undone, what the retained rows make of it.
    assert 1e-3 < float((away - right).norm()) < 2 * float((vector(linear) - ridge(TARGETS)).norm())


@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_the_fisher_form_is_not_exact_even_on_a_quadratic(damping, linear):
    method = InfluenceUnlearning(curvature="fisher", damping=damping, rows=None)
    found = vector(run(method, at(linear, ridge(TARGETS)), TARGETS))
    right = ridge(TARGETS.without(FORGET))
    assert float((found - right).norm()) > 0.1 * float((ridge(TARGETS) - right).norm())


def mean_gradient(objective, records):
    return objective.gradient(records.x, records.y) / len(records)


def cross_entropy(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("sampled", [None, 20])
@pytest.mark.parametrize("curvature", ["gauss-newton", "fisher", "hessian"])
def test_the_step_solves_the_system_that_the_docstring_names(curvature, sampled, trained):
    method = InfluenceUnlearning(curvature=curvature, damping=300.0, step=0.7, rows=sampled, tolerance=1e-12)
    method = replace(method, iterations=500)
    moved = vector(run(method, trained, RECORDS, seed=6)) - vector(trained)
    objective = Objective(copy.deepcopy(trained.module), cross_entropy)
    forget, retain = RECORDS.take(FORGET), RECORDS.without(FORGET)
    chosen = retain.select(coins.order(retain.keys, 6, "curvature")[:sampled])
    x, y, n, p = chosen.x, chosen.y, len(chosen), objective.size
    matrix = {
        "fisher": lambda: objective.gradients(x, y).T @ objective.gradients(x, y),
        "hessian": lambda: dense(lambda v: objective.hessian_product(x, y, v), p, objective.vector()),
        "gauss-newton": lambda: dense(lambda v: objective.gauss_newton_product(x, y, v), p, objective.vector()),
    }[curvature]() / n
    right = 10 / 72 * (mean_gradient(objective, forget) - mean_gradient(objective, retain))
    if curvature == "hessian":
        right = -mean_gradient(objective, retain) - DECAY * objective.vector()
    # What lambda is, is the one free number left: all of (C + decay I) moved - right must lie along moved.
    lacking = right - (matrix + DECAY * torch.eye(p, dtype=torch.float64)) @ (moved / 0.7)
    damping = float(lacking @ moved / (moved @ moved)) * 0.7
    torch.testing.assert_close(lacking, damping * moved / 0.7, rtol=1e-6, atol=1e-9)
    share = damping / 300 / (float(matrix.trace()) / p)
    assert share == pytest.approx(1, rel=1e-6 if curvature == "fisher" else 0.7)


def test_the_gradient_difference_is_that_of_the_two_objectives(trained):
    objective = Objective(copy.deepcopy(trained.module), cross_entropy)
    forget, retain = RECORDS.take(FORGET), RECORDS.without(FORGET)
    weights = torch.cat([torch.full((10,), 1 / 72), torch.full((62,), 1 / 72 - 1 / 62)]).double()
    assert float(weights.sum()) == pytest.approx(0, abs=1e-7)
    x, y = torch.cat([forget.x, retain.x]), torch.cat([forget.y, retain.y])
    formula = 10 / 72 * (mean_gradient(objective, forget) - mean_gradient(objective, retain))
    torch.testing.assert_close(objective.gradient(x, y, weights=weights), formula, rtol=0, atol=1e-8)


def test_the_drawn_rows_belong_to_rows_and_not_to_positions(trained):
    method = InfluenceUnlearning(rows=20)
    shuffled = RECORDS.select(torch.arange(71, -1, -1))
    assert run(method, trained, RECORDS).digest() == run(method, trained, shuffled).digest()
    assert run(method, trained, RECORDS).digest() != run(method, trained, RECORDS, seed=1).digest()


@pytest.mark.parametrize("method", FORMS)
def test_pruned_weights_stay_zero_and_the_others_solve_their_own_system(method):
    model = train(replace(RECIPE, pruning=Pruning(sparsity=0.5, by="synflow", iterations=5)), RECORDS)
    after = run(method, model, RECORDS)
    zeros = model.module.body[0].weight == 0
    assert int(zeros.sum()) == 8
    assert torch.equal(after.module.body[0].weight == 0, zeros)
    if method.curvature != "fisher":
        return
    objective = Objective(copy.deepcopy(model.module), cross_entropy)
    moves = vector(model) != 0
    forget, retain = RECORDS.take(FORGET), RECORDS.without(FORGET)
    gradients = objective.gradients(retain.x, retain.y)[:, moves]
    matrix = gradients.T @ gradients / 62
    matrix += (10 * matrix.trace() / len(matrix) + DECAY) * torch.eye(len(matrix), dtype=torch.float64)
    v = 10 / 72 * (mean_gradient(objective, forget) - mean_gradient(objective, retain))[moves]
    expected = 0.1 * torch.linalg.solve(matrix, v)
    torch.testing.assert_close((vector(after) - vector(model))[moves], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", FORMS)
def test_batch_statistics_do_not_move_and_the_input_is_not_written_to(method):
    model = train(replace(RECIPE, model_args={"hidden": (4,), "norm": "batch"}), RECORDS)
    before, digest = {name: b.clone() for name, b in model.module.named_buffers()}, model.digest()
    after = run(method, model, RECORDS)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in after.module.named_buffers())
    assert not any(part.training for part in after.module.modules())
    assert model.digest() == digest


class Spy(Tally):
    """Passes over the retained rows' sample, told by what is read."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def saw(self, records, positions, x, y):
        self.passes += len(records) == 20
        super().saw(records, positions, x, y)


def test_work_is_counted(trained):
    fisher = InfluenceUnlearning(curvature="fisher", rows=20)
    result = fisher(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert result.cost.gradients == result.cost.rows_read == 62 + 10 + 20
    assert result.claim is Claim.NONE


@pytest.mark.parametrize(("curvature", "each"), [("gauss-newton", 3), ("hessian", 4)])
def test_a_product_counts_as_the_gradients_that_it_costs(curvature, each, trained):
    spy, method = Spy(), InfluenceUnlearning(curvature=curvature, damping=300.0, rows=20)
    cost = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0), tally=spy).cost
    assert spy.passes > 9  # the probes, one product, and the residual
    base = 62 if curvature == "hessian" else 72
    assert cost.rows_read == base + 20 * spy.passes
    assert cost.gradients == base + 20 * spy.passes * each


def test_gradients_that_are_made_again_are_counted_and_their_rows_read_once(trained, monkeypatch):
    monkeypatch.setattr(influence, "row_gradients", partial(row_gradients, most=10 * 40))
    _, each = maker(Objective(copy.deepcopy(trained.module), cross_entropy), RECORDS.x, RECORDS.y)
    block = 400 // (2 * each)
    sizes = [len(part) for part in torch.arange(20).split(block)]
    again = sum(size * (place + 1) for place, size in enumerate(sizes))  # a block meets all that come before it
    assert again > 20
    fisher = InfluenceUnlearning(curvature="fisher", rows=20)
    cost = fisher(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).cost
    assert cost.rows_read == 62 + 10 + 20
    assert cost.gradients == 62 + 10 + again + 20 + 20  # and G v, and G' c


REPLACED = Request.replace_rows(FORGET, TARGETS.x[:10] + 1.5, TARGETS.y[:10] - 4)


def with_replacements(ids=FORGET):
    rest = TARGETS.without(ids)
    x, y = torch.cat([rest.x, REPLACED.x]), torch.cat([rest.y, REPLACED.y])
    return Records(x, y, [*rest.ids, *(f"{one}~2" for one in FORGET)], [*rest.owners, *FORGET])


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_replacements_are_rows_that_were_not_trained_on(curvature, linear):
    method = InfluenceUnlearning(curvature=curvature, damping=0.0, rows=None, tolerance=1e-12)
    start = at(linear, ridge(TARGETS))
    after = method(start, TARGETS, REPLACED, rng=generator(0)).trained
    right = ridge(with_replacements())
    torch.testing.assert_close(vector(after), right, rtol=0, atol=1e-8)
    assert float((right - ridge(TARGETS.without(FORGET))).norm()) > 0.1
    # Now that they have been trained on, they are rows like others.
    later = method(after, with_replacements(), Request.remove(["r1", "r8~2"]), rng=generator(0)).trained
    torch.testing.assert_close(vector(later), ridge(with_replacements().without(["r1", "r8~2"])), rtol=0, atol=1e-8)


def test_all_rows_may_be_replaced(linear):
    few = TARGETS.take(FORGET)
    model = at(replace(linear, ids=frozenset(FORGET), seal=None), ridge(few))
    method = InfluenceUnlearning(damping=0.0, rows=None, tolerance=1e-12)
    after = method(model, few, REPLACED, rng=generator(0)).trained
    torch.testing.assert_close(vector(after), ridge(Records(REPLACED.x, REPLACED.y)), rtol=0, atol=1e-8)


def test_the_fisher_form_of_a_replacement_solves_for_the_difference_of_the_two_objectives(trained):
    request = Request.replace_rows(FORGET, RECORDS.x[:10] * 2, RECORDS.y[:10])
    method = InfluenceUnlearning(curvature="fisher", step=0.1, rows=None)
    moved = vector(method(trained, RECORDS, request, rng=generator(0)).trained) - vector(trained)
    objective = Objective(copy.deepcopy(trained.module), cross_entropy)
    rest = RECORDS.without(FORGET)
    x, y = torch.cat([rest.x, RECORDS.x[:10] * 2]), torch.cat([rest.y, RECORDS.y[:10]])
    gradients = objective.gradients(x, y)
    matrix = gradients.T @ gradients / 72
    matrix += (10 * matrix.trace() / len(matrix) + DECAY) * torch.eye(len(matrix), dtype=torch.float64)
    right = mean_gradient(objective, RECORDS) - gradients.mean(0)
    torch.testing.assert_close(moved, 0.1 * torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_damping_is_in_mean_eigenvalues_of_the_curvature(curvature, linear):
    """Five parameters are no more than there are probes, so that the unit is exact."""
    method = InfluenceUnlearning(curvature=curvature, damping=2.0, rows=None, tolerance=1e-12)
    moved = vector(run(method, at(linear, ridge(TARGETS)), TARGETS)) - ridge(TARGETS)
    retain = TARGETS.without(FORGET)
    a = torch.cat([retain.x, torch.ones(len(retain), 1, dtype=torch.float64)], 1)
    matrix, eye = 2 * a.T @ a / len(a), torch.eye(5, dtype=torch.float64)
    right = -(matrix @ ridge(TARGETS) - 2 * a.T @ retain.y / len(a) + DECAY * ridge(TARGETS))
    wanted = torch.linalg.solve(matrix + (2 * matrix.trace() / 5 + DECAY) * eye, right)
    torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-12)


def test_an_indefinite_hessian_says_how_much_to_damp_and_a_slow_system_that_it_is_not_solved(trained):
    wild = at(trained, 3 * vector(trained))
    with pytest.raises(Misuse, match=r"the curvature is -.* raise damping above \d"):
        run(InfluenceUnlearning(curvature="hessian", damping=1e-3), wild, RECORDS)
    with pytest.raises(Misuse, match=r"after 2 products the residual is .* above the tolerance 1e-09; raise damping"):
        run(InfluenceUnlearning(damping=0.01, iterations=2, tolerance=1e-9), trained, RECORDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "kfac"}, 'curvature must be one of gauss-newton, fisher, hessian, got "kfac"'),
        ({"damping": -1.0}, "damping must be >= 0, got -1"),
        ({"damping": float("nan")}, "damping must be >= 0, got nan"),
        ({"damping": 0.0, "curvature": "fisher"}, "damping must be > 0, got 0"),
        ({"step": 0.0}, "step must be > 0, got 0"),
        ({"rows": 0}, "rows must be None or an integer >= 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be > 0 and < 1, got 0"),
        ({"iterations": 0}, "iterations must be an integer >= 1, got 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(Misuse, match=message):
        InfluenceUnlearning(**settings)


def test_shards_are_refused():
    sharded = train(replace(RECIPE, sharding=Sharding(shards=2)), RECORDS)
    with pytest.raises(Unsupported, match="2 shards; use sisa or retrain"):
        run(InfluenceUnlearning(), sharded, RECORDS)
