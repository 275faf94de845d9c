import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import Tally
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import adopt, train
from expunge.unlearn.dampening import mean_squares
from expunge.unlearn.fisher_forgetting import FisherForgetting, scores
from expunge.unlearn.method import Task


def rows(n=60, classes=4):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 6)
    return Records(x, y, [f"r{i}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=4, batch_size=16, dtype="float64", seed=3)
FORGET = [f"r{i}" for i in range(0, 40, 4)]
REMOVE = Request.remove(FORGET)
RETAIN = RECORDS.without(FORGET)


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


class Logistic(nn.Module):
    """Two classes, two parameters: the log odds are w.x."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x):
        odds = x @ self.w
        return torch.stack([torch.zeros_like(odds), odds], 1)


def logistic(w=(0.5, -2.0)):
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(40, 2)))
    records = Records(x, (x[:, 0] > 0).long(), classes=2)
    return adopt(Logistic(w).eval(), Recipe(model="x", dtype="float64"), records), records


def fisher_of(trained, records, tally=None):
    task = Task(trained=trained, forget=records, retain=records, tally=tally or Tally())
    return mean_squares(task, records, scores(trained), generator(0), "fisher", None)


def spread(trained, records, request, method, draws=200):
    """Variance of each parameter over so many coins."""
    runs = [method(trained, records, request, rng=generator(k)).trained.module for k in range(draws)]
    return {
        name: torch.stack([run.get_parameter(name) - p for run in runs]).square().mean(0).detach()
        for name, p in trained.module.named_parameters()
    }


# Oracles


def test_the_variance_on_a_logistic_model_is_the_formula():
    trained, records = logistic()
    method = FisherForgetting(alpha=0.03, most=1e6)
    x = records.without(["0", "7"]).x
    p = torch.sigmoid(x @ trained.module.w.detach())
    fisher = ((p * (1 - p))[:, None] * x.square()).mean(0)
    expected = 2 * 0.03 / 2 / fisher
    torch.testing.assert_close(method.variances({"w": fisher})["w"], expected)
    seen = spread(trained, records, Request.remove(["0", "7"]), method)["w"]
    # 200 draws of a variance: a standard error of 10 %.
    torch.testing.assert_close(seen, expected, rtol=0.35, atol=0)


def test_the_noise_costs_alpha_nats_to_second_order():
    trained, records = logistic(w=(0.3, -0.4))
    method, x = FisherForgetting(alpha=1e-4, most=1e6), records.without(["0"]).x
    before = trained.module(x).log_softmax(1).detach()
    costs = []
    for k in range(200):
        after = method(trained, records, Request.remove(["0"]), rng=generator(k)).trained.module(x).log_softmax(1)
        costs.append(float((before.exp() * (before - after)).sum(1).mean().detach()))
    assert np.mean(costs) == pytest.approx(1e-4, rel=0.3)


def test_of_a_pruned_model_all_of_alpha_is_spent_on_what_is_left():
    pruned = train(replace(RECIPE, pruning=Pruning(sparsity=0.9)), RECORDS)
    method = FisherForgetting(alpha=1e-3, rows=None)
    free = {name: torch.ones_like(p, dtype=torch.bool) for name, p in pruned.module.named_parameters()}
    free |= mask_of_zeros(pruned.module).moves
    fisher = fisher_of(pruned, RETAIN)
    left = torch.cat([one[free[name]] for name, one in fisher.items()])
    seen = spread(pruned, RECORDS, REMOVE, method)
    for name, one in fisher.items():
        expected = 2e-3 / len(left) * (1 / one).clamp(max=10 / float(left.mean()))
        torch.testing.assert_close(seen[name][free[name]], expected[free[name]], rtol=0.45, atol=0)
        assert not seen[name][~free[name]].any()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_fisher_matrix_is_that_of_the_models_own_distribution(loss):
    records = RECORDS if loss == "cross_entropy" else Records(RECORDS.x, RECORDS.x[:, :2], RECORDS.ids)
    trained = train(replace(RECIPE, loss=loss), records)
    tally = Tally()
    found = fisher_of(trained, records, tally)
    module = copy.deepcopy(trained.module)
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for x in records.x:
        out = module(x[None])[0]
        if loss == "cross_entropy":
            terms = [(p, log) for p, log in zip(out.softmax(0).tolist(), out.log_softmax(0), strict=True)]
        else:
            # log density of variance 1/2: -(f - y)^2; the square of its derivative, 2 (f - y) f', has mean 2 f'^2.
            terms = [(2.0, one) for one in out]
        for weight, term in terms:
            gradients = torch.autograd.grad(term, list(module.parameters()), retain_graph=True)
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += weight * gradient.square() / len(records)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-9, atol=1e-18)
    assert tally.rows_read == 60
    assert tally.gradients == 60 * (4 if loss == "cross_entropy" else 2)


def test_given_labels_change_nothing(trained):
    others = Records(RECORDS.x, (RECORDS.y + 1) % 4, RECORDS.ids, classes=4)
    for one, other in zip(fisher_of(trained, RECORDS).values(), fisher_of(trained, others).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_squares_are_of_rows_and_not_of_batch_means():
    trained, records = logistic(w=(0.0, 0.0))
    # At w = 0 each row's squared score is x^2 / 4, and that of the batch's mean is about 40 times smaller.
    torch.testing.assert_close(fisher_of(trained, records)["w"], records.x.square().mean(0) / 4)
    assert bool(((records.x.mean(0) / 2) ** 2 < 0.3 * records.x.square().mean(0) / 4).all())


def test_noise_grows_with_the_root_of_alpha_and_is_capped_by_most(trained):
    def noise(**settings):
        after = FisherForgetting(**settings)(trained, RECORDS, REMOVE, rng=generator(0)).trained.module
        return torch.cat(
            [(p - trained.module.get_parameter(name)).detach().flatten() for name, p in after.named_parameters()]
        )

    torch.testing.assert_close(noise(alpha=0.04), 2 * noise(alpha=0.01), rtol=1e-8, atol=1e-14)
    fisher = fisher_of(trained, RETAIN)
    flat = torch.cat([one.flatten() for one in fisher.values()])
    capped = torch.cat([one.flatten() for one in FisherForgetting(alpha=0.01, most=2).variances(fisher).values()])
    expected = 2 * 0.01 / len(flat) * torch.minimum(1 / flat, 2 / flat.mean())
    torch.testing.assert_close(capped, expected)
    assert 0 < int((capped == capped.max()).sum()) < len(flat)


def test_parameters_that_retained_rows_do_not_depend_on_get_the_cap_and_not_infinity():
    fisher = {"a": torch.tensor([0.0, 3.0], dtype=torch.float64)}
    variance = FisherForgetting(alpha=1.0, most=5.0).variances(fisher)["a"]
    torch.testing.assert_close(variance, torch.tensor([5 / 1.5, 1 / 3], dtype=torch.float64))
    with pytest.raises(Unsupported, match=r"mean Fisher information is 0.0.*use fine-tune"):
        FisherForgetting().variances({"a": torch.zeros(3)})


# What it does not do


def test_no_class_is_zeroed(trained):
    """Removing a class moves every row of the head by noise of the size that the formula says, and none to zero."""
    request = Request.remove([name for name, y in zip(RECORDS.ids, RECORDS.y.tolist(), strict=True) if y == 2])
    retain = RECORDS.without(request.named(RECORDS))
    variance = FisherForgetting().variances(fisher_of(trained, retain))
    after = FisherForgetting()(trained, RECORDS, request, rng=generator(1)).trained.module
    for name in ("head.weight", "head.bias"):
        moved = (after.get_parameter(name) - trained.module.get_parameter(name)).detach()
        z = moved / variance[name].sqrt()
        assert float(z.abs().max()) < 4.5
        assert 0.3 < float(z.square().mean()) < 2.5
        assert int((after.get_parameter(name) == 0).sum()) == 0


def test_removed_rows_are_not_read(trained):
    read = set()

    class Watching(Tally):
        def saw(self, records, positions, x, y):
            read.update(records.ids[i] for i in positions.tolist())
            super().saw(records, positions, x, y)

    tally = Watching()
    result = FisherForgetting()(trained, RECORDS, REMOVE, rng=generator(0), tally=tally)
    assert read == set(RETAIN.ids)
    assert (result.cost.rows_read, result.cost.gradients) == (50, 200)
    few = FisherForgetting(rows=20)(trained, RECORDS, REMOVE, rng=generator(0))
    assert (few.cost.rows_read, few.cost.gradients) == (20, 80)


def test_noise_is_of_each_parameter_and_request_its_own(trained):
    whole = {name: torch.ones_like(p, dtype=torch.float64) for name, p in trained.module.named_parameters()}
    first = FisherForgetting()(trained, RECORDS, REMOVE, rng=generator(0)).trained
    second = FisherForgetting()(first, RECORDS, Request.remove(["r1"]), rng=generator(0)).trained
    signs = []
    for before, after in ((trained, first), (first, second)):
        moved = [(after.module.get_parameter(n) - before.module.get_parameter(n)).detach() for n in whole]
        signs.append(torch.cat([one.flatten() for one in moved]).sign())
    agree = float((signs[0] == signs[1]).double().mean())
    assert 0.3 < agree < 0.7  # the same noise again would agree everywhere
    one, other = first.module.get_parameter("head.bias"), first.module.get_parameter("body.0.bias")
    start = trained.module
    shared = (one - start.get_parameter("head.bias")).sign() == (other - start.get_parameter("body.0.bias")).sign()[:4]
    assert not bool(shared.all())


def test_the_order_of_rows_changes_nothing_but_rounding(trained):
    shuffled = RECORDS.select(torch.randperm(60, generator=generator(3)))
    for method in (FisherForgetting(), FisherForgetting(rows=17)):
        one, other = (method(trained, r, REMOVE, rng=generator(0)).trained.module for r in (RECORDS, shuffled))
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_pruned_weights_stay_zero():
    model = train(replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random")), RECORDS)
    after = FisherForgetting()(model, RECORDS, REMOVE, rng=generator(0)).trained.module
    assert mask_of_zeros(after).held == mask_of_zeros(model.module).held == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha must be > 0, got 0"),
        ({"alpha": float("inf")}, "alpha must be > 0, got inf"),
        ({"most": -1.0}, "most must be > 0, got -1"),
        ({"rows": 0}, "rows must be an integer >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(Misuse, match=message):
        FisherForgetting(**settings)


def test_shards_are_refused_and_noise_too_small_to_see_is_not_called_done(trained):
    sharded = train(replace(RECIPE, sharding=Sharding(shards=2)), RECORDS)
    with pytest.raises(Unsupported, match="use sisa or retrain"):
        FisherForgetting()(sharded, RECORDS, REMOVE, rng=generator(0))
    with pytest.raises(NothingChanged):
        FisherForgetting(alpha=1e-300)(trained, RECORDS, REMOVE, rng=generator(0))
