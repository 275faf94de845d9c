"""Fine-tuning with a price on the size of weights: its schedule, both kinds of step, and the zeros it leaves."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import train
from expunge.testing import conformance
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.l1_sparse import L1Sparse, penalised, soften_


def rows(n=96, classes=4):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 10)[:, :6].double()
    return Records(x, y, [f"r{i}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(
    model="mlp", model_args={"hidden": (8,)}, epochs=4, batch_size=16, weight_decay=1e-3, dtype="float64", seed=3
)
FORGET = [f"r{i}" for i in range(0, 40, 4)]
REQUEST = Request.remove(FORGET)


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


def after(method, trained, records=RECORDS, request=REQUEST):
    return method(trained, records, request, rng=generator(0)).trained.module


def gradients(module, records):
    loss = nn.functional.cross_entropy(module(records.x), records.y)
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(module.parameters())), strict=True))


# The schedule


@pytest.mark.parametrize("plain", [0, 3, 10])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_price_of_each_epoch_is_the_closed_form(plain, steps):
    method = L1Sparse(epochs=10, plain_epochs=plain, gamma=0.3)
    priced = 10 - plain
    by_epoch = [0.3 * (1 - t / priced) if t < priced else 0.0 for t in range(10)]
    expected = [gamma for gamma in by_epoch for _ in range(steps)]
    assert method.gammas(steps) == pytest.approx(expected, rel=1e-15, abs=0)


def test_the_papers_table_for_ten_epochs():
    assert L1Sparse(epochs=10, gamma=1.0).gammas(1) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    three = [1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0, 0, 0]
    assert L1Sparse(epochs=10, gamma=1.0, plain_epochs=3).gammas(1) == pytest.approx(three)
    assert L1Sparse(epochs=10, gamma=1.0, plain_epochs=10).gammas(1) == [0.0] * 10


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_growing_is_the_mirror_image_of_decaying_and_constant_is_constant(per):
    kind = {"epochs": 5, "plain_epochs": 1, "gamma": 0.2, "per": per}
    decay, grow, constant = (L1Sparse(schedule=s, **kind).gammas(3) for s in ("decay", "grow", "constant"))
    assert grow[:12] == pytest.approx(decay[:12][::-1])
    assert constant == [0.2] * 12 + [0.0] * 3
    assert decay[12:] == grow[12:] == [0.0] * 3


def test_by_step_the_price_falls_with_each_step():
    gammas = L1Sparse(epochs=2, gamma=1.0, per="step").gammas(4)
    assert gammas == pytest.approx([1 - k / 8 for k in range(8)])


# The steps


@pytest.mark.parametrize("mode", ["proximal", "subgradient"])
def test_without_a_price_it_is_fine_tuning_to_the_byte(trained, mode):
    pace = {"epochs": 3, "lr": 0.03, "momentum": 0.9}
    tuned = FineTune(**pace)(trained, RECORDS, REQUEST, rng=generator(0)).trained.digest()
    for free in (L1Sparse(gamma=0.0, mode=mode, **pace), L1Sparse(gamma=9.0, plain_epochs=3, mode=mode, **pace)):
        assert free(trained, RECORDS, REQUEST, rng=generator(0)).trained.digest() == tuned
    priced = L1Sparse(gamma=1e-3, mode=mode, **pace)(trained, RECORDS, REQUEST, rng=generator(0)).trained
    assert priced.digest() != tuned


def one_step(mode, **more):
    return L1Sparse(epochs=1, lr=0.2, momentum=0.0, gamma=0.05, batch_size=96, mode=mode, **more)


@pytest.mark.parametrize("which", ["weights", "all"])
def test_a_proximal_step_is_a_gradient_step_and_then_soft_thresholding(trained, which):
    found = dict(after(one_step("proximal", which=which), trained).named_parameters())
    slopes = gradients(trained.module, RECORDS.without(FORGET))
    for name, before in trained.module.named_parameters():
        stepped = (before - 0.2 * (slopes[name] + 1e-3 * before)).detach()
        if which == "all" or name.endswith("weight"):
            stepped = stepped.sign() * (stepped.abs() - 0.2 * 0.05).clamp_min(0)
        torch.testing.assert_close(found[name].detach(), stepped, rtol=0, atol=1e-14)


@pytest.mark.parametrize("which", ["weights", "all"])
def test_a_subgradient_step_adds_the_signs(trained, which):
    found = dict(after(one_step("subgradient", which=which), trained).named_parameters())
    slopes = gradients(trained.module, RECORDS.without(FORGET))
    for name, before in trained.module.named_parameters():
        slope = slopes[name] + 1e-3 * before
        if which == "all" or name.endswith("weight"):
            slope = slope + 0.05 * before.sign()
        torch.testing.assert_close(found[name].detach(), (before - 0.2 * slope).detach(), rtol=0, atol=1e-14)


def test_soft_thresholding_minimises_a_diagonal_quadratic():
    centre = torch.tensor([-0.9, -0.2, 0.0, 0.1, 0.35, 2.0], dtype=torch.float64)
    parameter = nn.Parameter(centre.clone())
    soften_([parameter], 0.3)
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)  # brute force, one coordinate at a time
    objective = (grid[None] - centre[:, None]).square() / 2 + 0.3 * grid.abs()
    torch.testing.assert_close(parameter.detach(), grid[objective.argmin(1)], rtol=0, atol=1e-4)
    assert (parameter == 0).tolist() == [False, True, True, True, False, False]


def test_proximal_steps_reach_the_lasso_solution_of_a_diagonal_regression():
    """Rows e_1 ... e_4 and a linear model without bias: the objective is diagonal, its minimum a soft threshold."""
    scale = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    x = torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])  # both signs: bias stays 0
    y = torch.cat([scale, -scale])
    extra = Records(torch.cat([x, x[:1]]), torch.cat([y, y[:1]]), [f"r{i}" for i in range(9)])
    recipe = Recipe(model="softmax", loss="mse", epochs=1, batch_size=9, dtype="float64")
    start = train(recipe, extra)
    method = L1Sparse(epochs=400, lr=0.5, momentum=0.0, gamma=0.1, schedule="constant", batch_size=9)
    found = after(method, start, extra, Request.remove(["r8"]))
    weight = next(found.parameters()).detach().flatten()
    # mean over 8 rows of (w_i - s_i)^2, each i twice: (1/4) (w_i - s_i)^2, so the threshold is gamma * 2.
    torch.testing.assert_close(weight, (scale - 0.2).clamp_min(0), rtol=0, atol=1e-9)
    assert float(weight[3]) == 0


def test_more_price_leaves_more_zeros_and_subgradients_leave_none(trained):
    def zeros(**settings):
        return mask_of_zeros(after(L1Sparse(epochs=6, lr=0.05, schedule="constant", **settings), trained)).sparsity

    shares = [zeros(gamma=gamma) for gamma in (0.0, 0.05, 0.15, 0.4)]
    assert shares == sorted(set(shares))
    assert shares[0] == 0
    assert zeros(gamma=0.04, mode="subgradient") == 0


def test_pruned_weights_stay_zero_and_count_as_zeros():
    pruned = train(replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random")), RECORDS)
    held = mask_of_zeros(pruned.module)
    for mode in ("proximal", "subgradient"):
        module = after(L1Sparse(epochs=2, gamma=0.01, mode=mode), pruned)
        for parameter, moves in held.parameters(module):
            assert not parameter[~moves].any()
        assert mask_of_zeros(module).sparsity >= held.sparsity == 0.5


# The pull


def free_fall(mode, momentum, steps, epochs=3):
    """How far a weight goes that starts far from zero and that no gradient holds, step by step by hand."""
    method = L1Sparse(epochs=epochs, lr=0.1, momentum=momentum, gamma=0.2, mode=mode)
    weight, speed = 100.0, 0.0
    for gamma in method.gammas(steps):
        if mode == "proximal":
            weight -= 0.1 * gamma
        else:
            speed = momentum * speed + gamma
            weight -= 0.1 * speed
    return 100.0 - weight, method.pull(steps)


def test_the_pull_is_how_far_a_free_weight_goes():
    for mode in ("proximal", "subgradient"):
        gone, pull = free_fall(mode, 0.0, 7)
        assert gone == pytest.approx(pull)
    gone, pull = free_fall("proximal", 0.9, 7)
    assert gone == pytest.approx(pull)
    gone, pull = free_fall("subgradient", 0.9, 700)
    assert gone == pytest.approx(pull, rel=0.02)
    assert gone < pull


# The rest


def test_the_price_is_on_matrices_and_kernels_and_on_neither_biases_nor_scales():
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.LayerNorm((2, 4, 4)), nn.Flatten(), nn.Linear(32, 3)
    )
    assert [tuple(p.shape) for p in penalised(module)] == [(2, 1, 3, 3), (3, 32)]
    assert len(penalised(module, "all")) == len(list(module.parameters())) == 8
    module[0].weight.requires_grad_(False)
    assert [tuple(p.shape) for p in penalised(module)] == [(3, 32)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, "gamma must be"),
        ({"gamma": math.inf}, "gamma must be"),
        ({"gamma": math.nan}, "gamma must be"),
        ({"plain_epochs": 11}, "plain_epochs must be"),
        ({"plain_epochs": -1}, "plain_epochs must be"),
        ({"plain_epochs": 1.5}, "plain_epochs must be"),
        ({"schedule": "cosine"}, "schedule must be one of decay, constant, grow"),
        ({"per": "row"}, "per must be"),
        ({"mode": "soft"}, "mode must be"),
        ({"which": "biases"}, "which must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"epochs": 0}, "epochs must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(Misuse, match=message):
        L1Sparse(**settings)


def test_shards_are_refused():
    sharded = train(RECIPE, RECORDS, shards=3)
    with pytest.raises(Unsupported, match="use sisa or retrain"):
        L1Sparse()(sharded, RECORDS, REQUEST, rng=generator(0))


def test_it_passes_the_suite_under_its_name():
    assert L1Sparse().name == "l1-sparse"
    found = conformance(L1Sparse())
    assert found.passed, str(found)


def test_the_work_is_counted(trained):
    result = L1Sparse(epochs=3)(trained, RECORDS, REQUEST, rng=generator(0))
    assert result.cost.gradients == result.cost.rows_read == 3 * 86
