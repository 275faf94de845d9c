import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.coins import generator, order
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.build import build
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import adopt, train
from expunge.unlearn import Retrain
from expunge.unlearn.salun import SaliencyMasked
from expunge.unlearn.sparsity import Masked, Pruned
from expunge.unlearn.unrolling import UnrollingSGD, beginning, row_weights

WHOLE = UnrollingSGD(scale=1.0)


def rows(n=70, classes=4):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 6)
    return Records(x, y, [f"r{i}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": (8,)},
    optimiser_args={"lr": 0.05},
    epochs=3,
    batch_size=10,
    dtype="float64",
    seed=3,
)
FORGET = [f"r{i}" for i in range(20)]


def vector(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def gradient(module, records, loss=nn.functional.cross_entropy):
    """Of the summed losses."""
    total = loss(module(records.x), records.y) * len(records)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(module.parameters()))])


def removed(recipe, method, ids=FORGET, records=RECORDS):
    return method(train(recipe, records), records, Request.remove(ids), rng=generator(0))


def error(recipe, ids=FORGET, request=None):
    """Distance to exact retraining with the same coins."""
    trained = train(recipe, RECORDS)
    request = request or Request.remove(ids)
    ours, exact = (m(trained, RECORDS, request, rng=generator(0)).trained.module for m in (WHOLE, Retrain()))
    return float((vector(ours) - vector(exact)).norm())


# Oracles


def test_after_one_step_of_linear_regression_it_is_retraining():
    """One epoch, one batch: the expansion ends there, however long the step."""
    y = RECORDS.x @ torch.arange(6.0, dtype=torch.float64)
    records = Records(RECORDS.x, y, RECORDS.ids)
    recipe = replace(
        RECIPE, model="softmax", model_args={}, loss="mse", epochs=1, batch_size=100, optimiser_args={"lr": 0.3}
    )
    trained = train(recipe, records)
    ours, exact = (m(trained, records, Request.remove(FORGET), rng=generator(0)).trained for m in (WHOLE, Retrain()))
    torch.testing.assert_close(vector(ours.module), vector(exact.module), rtol=0, atol=1e-13)
    assert float((vector(ours.module) - vector(trained.module)).norm()) > 0.1
    w0 = build(trained.recipe)
    kept, left = records.without(FORGET), records.take(FORGET)

    def loss(out, y):
        return (out[:, 0] - y).square().mean()

    by_hand = vector(trained.module) + 0.3 * (
        gradient(w0, left, loss) / 70 + (1 / 70 - 1 / 50) * gradient(w0, kept, loss)
    )
    torch.testing.assert_close(vector(ours.module), by_hand, rtol=0, atol=1e-13)


def test_where_batches_are_whole_it_is_the_papers_formula():
    recipe = replace(RECIPE, schedule={"kind": "steps", "at": [1, 2], "factor": 0.5})
    result = removed(recipe, UnrollingSGD(scale=0.3))
    w0 = build(result.trained.recipe)
    moved = vector(result.trained.module) - vector(train(recipe, RECORDS).module)
    lr = 0.05 * (1 + 0.5 + 0.25)
    torch.testing.assert_close(moved, 0.3 * lr / 10 * gradient(w0, RECORDS.take(FORGET)), rtol=1e-10, atol=1e-14)
    assert result.cost.gradients == result.cost.rows_read == 20


def test_momentum_counts_for_all_the_steps_that_follow():
    recipe = replace(RECIPE, optimiser_args={"lr": 0.05, "momentum": 0.5}, epochs=40)
    result = removed(recipe, WHOLE)
    moved = vector(result.trained.module) - vector(train(recipe, RECORDS).module)
    papers = 40 * 0.05 / (1 - 0.5) / 10 * gradient(build(result.trained.recipe), RECORDS.take(FORGET))
    assert 0 < float((moved - papers).norm()) < 0.1 * float(papers.norm())


SETTINGS = {
    "plain": {},
    "short last batches": {"batch_size": 16},
    "weight decay": {"batch_size": 16, "weight_decay": 0.3},
    "momentum": {"batch_size": 16, "optimiser_args": {"lr": 1.0, "momentum": 0.9}},
    "nesterov": {"batch_size": 16, "optimiser_args": {"lr": 1.0, "momentum": 0.9, "nesterov": True}},
    "schedule": {"batch_size": 16, "optimiser_args": {"lr": 1.0, "momentum": 0.6}, "schedule": {"kind": "cosine"}},
    "pruned": {"batch_size": 16, "pruning": Pruning(sparsity=0.5, by="synflow", iterations=3)},
    "pruned at random": {"batch_size": 16, "pruning": Pruning(sparsity=0.5, by="random")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_error_is_of_second_order_in_the_learning_rate(name):
    recipe = replace(RECIPE, **SETTINGS[name])
    errors = []
    for lr in (1e-4, 1e-5):
        slow = replace(recipe, optimiser_args={**recipe.optimiser_args, "lr": lr})
        errors.append(error(slow))
        trained = train(slow, RECORDS)
        still = vector(trained.module) - vector(
            Retrain()(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained.module
        )
        assert errors[-1] < 0.05 * float(still.norm())
    assert 80 < errors[0] / errors[1] < 125


def test_the_papers_count_leaves_an_error_of_first_order_where_batches_are_short():
    errors = []
    for lr in (1e-4, 1e-5):
        recipe = replace(RECIPE, batch_size=16, optimiser_args={"lr": lr})
        trained = train(recipe, RECORDS)
        exact = Retrain()(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained.module
        w0 = build(trained.recipe)
        papers = vector(trained.module) + 3 * lr / 16 * gradient(w0, RECORDS.take(FORGET))
        errors.append(float((papers - vector(exact)).norm()))
    assert 9 < errors[0] / errors[1] < 11


def test_replacements_are_put_in_to_first_order():
    request = Request.replace_rows(FORGET[:5], RECORDS.x[:5] * -2, RECORDS.y[:5])
    recipe = replace(RECIPE, batch_size=16)
    errors = [error(replace(recipe, optimiser_args={"lr": lr}), request=request) for lr in (1e-4, 1e-5)]
    assert 80 < errors[0] / errors[1] < 125


def test_one_request_after_another_gives_what_all_at_once_would():
    recipe = replace(RECIPE, batch_size=16, weight_decay=0.1, optimiser_args={"lr": 0.05, "momentum": 0.9})
    model = train(recipe, RECORDS)
    for ids in (FORGET[:3], FORGET[3:11], FORGET[11:]):
        model = UnrollingSGD()(model, RECORDS, Request.remove(ids), rng=generator(0)).trained
    at_once = removed(recipe, UnrollingSGD()).trained
    torch.testing.assert_close(vector(model.module), vector(at_once.module), rtol=0, atol=1e-12)


@pytest.mark.parametrize("args", [{}, {"momentum": 0.7}, {"momentum": 0.7, "nesterov": True}])
@pytest.mark.parametrize("size", [7, 16, 100])
def test_row_weights_are_what_sgd_does_to_constant_gradients(args, size):
    recipe = replace(
        RECIPE, batch_size=size, optimiser_args={"lr": 0.05, **args}, schedule={"kind": "linear", "floor": 0.2}
    )
    keys = RECORDS.keys
    w, decay = nn.Parameter(torch.zeros(70, dtype=torch.float64)), nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimiser = torch.optim.SGD([w, decay], **recipe.optimiser_args)
    for epoch in range(recipe.epochs):
        optimiser.param_groups[0]["lr"] = 0.05 * recipe.lr_factor(epoch)
        for batch in torch.from_numpy(order(keys, recipe.seed, "order", "whole", epoch)).split(size):
            optimiser.zero_grad()
            (w[batch].mean() + decay).backward()
            optimiser.step()
    weights, of_decay = row_weights(recipe, keys)
    np.testing.assert_allclose(weights, -w.detach().numpy(), rtol=1e-12)
    assert of_decay == pytest.approx(-float(decay.detach()), rel=1e-12)


def test_only_rows_whose_weight_changes_are_read():
    plain = replace(RECIPE, batch_size=16)
    result = removed(plain, WHOLE)
    short = {len(RECORDS) % 16, 50 % 16}
    assert 20 < result.cost.rows_read <= 20 + 3 * sum(short)
    assert removed(replace(plain, optimiser_args={"lr": 0.05, "momentum": 0.9}), WHOLE).cost.rows_read == 70


def test_the_order_of_rows_changes_nothing_but_rounding():
    recipe = replace(RECIPE, batch_size=16)
    shuffled = RECORDS.select(torch.randperm(70, generator=generator(3)))
    one, other = (removed(recipe, WHOLE, FORGET, records).trained.module for records in (RECORDS, shuffled))
    torch.testing.assert_close(vector(one), vector(other), rtol=0, atol=1e-12)


def test_pruned_weights_stay_zero():
    recipe = replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random"))
    zero = train(recipe, RECORDS).module.get_parameter("body.0.weight") == 0
    assert int(zero.sum()) == 24
    after = removed(recipe, WHOLE).trained.module.get_parameter("body.0.weight")
    assert bool((after[zero] == 0).all())


@pytest.mark.parametrize("by", ["synflow", "random"])
def test_the_beginning_is_where_training_began(by):
    recipe = replace(RECIPE, pruning=Pruning(sparsity=0.5, by=by), optimiser_args={"lr": 1e-300})
    trained = train(recipe, RECORDS)
    began = vector(beginning(trained.recipe, RECORDS.device))
    assert torch.equal(began, vector(trained.module))
    assert int((began == 0).sum()) == 24
    assert not torch.equal(began, vector(build(trained.recipe)))


def test_the_beginning_of_a_model_pruned_by_magnitude_is_not_made_up():
    with pytest.raises(Misuse, match="began at trained weights"):
        beginning(replace(RECIPE, pruning=Pruning(sparsity=0.5)).completed(RECORDS), RECORDS.device)


def test_a_mask_found_after_a_dense_training_has_no_part_in_its_beginning():
    trained, request = train(RECIPE, RECORDS), Request.remove(FORGET)
    plain = WHOLE(trained, RECORDS, request, rng=generator(0)).trained
    after = Pruned(sparsity=0.5, then=WHOLE)(trained, RECORDS, request, rng=generator(0)).trained
    kept = vector(after.module) != 0
    assert int((~kept).sum()) == 24
    assert torch.equal(vector(after.module), kept * vector(plain.module))
    sparse = copy.deepcopy(trained.module)
    mask_of_zeros(after.module).prune_(sparse)
    masked = Masked(then=WHOLE)(replace(trained, module=sparse), RECORDS, request, rng=generator(0)).trained
    assert torch.equal(vector(masked.module), vector(after.module))


def test_a_saliency_mask_takes_the_steps_entries_and_changes_none():
    request, trained = Request.remove(FORGET), train(RECIPE, RECORDS)
    start = vector(trained.module)
    for then in (WHOLE, UnrollingSGD()):
        plain = vector(then(trained, RECORDS, request, rng=generator(0)).trained.module)
        part = SaliencyMasked(then=then, share=0.5)(trained, RECORDS, request, rng=generator(0)).trained
        moved = vector(part.module) != start
        assert int(moved.sum()) == round(0.5 * len(start))
        assert torch.equal(vector(part.module), torch.where(moved, plain, start))


# Refusals


def refused(recipe, match, trained=None):
    with pytest.raises(Unsupported, match=match):
        WHOLE(trained or train(recipe, RECORDS), RECORDS, Request.remove(FORGET), rng=generator(0))


def test_models_that_it_cannot_unroll_are_refused():
    refused(replace(RECIPE, optimiser="adam"), "trained by adam.*use amnesiac-unlearning, or gradient-ascent")
    refused(RECIPE, "trained elsewhere; use gradient-ascent", adopt(train(RECIPE, RECORDS).module, RECIPE, RECORDS))
    refused(replace(RECIPE, pruning=Pruning(sparsity=0.5)), "pruned by magnitude.*use gradient-ascent")
    refused(replace(RECIPE, model_args={"hidden": (8,), "norm": "batch"}), "depend on its batch; use amnesiac")
    refused(replace(RECIPE, sharding=Sharding(shards=2)), "use sisa or retrain")


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, math.nan])
def test_scales_that_mean_nothing_are_refused(scale):
    with pytest.raises(Misuse, match="scale must be > 0 and <= 1, got"):
        UnrollingSGD(scale=scale)
