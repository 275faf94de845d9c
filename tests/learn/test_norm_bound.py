"""Training in an L2 ball: the nearest point after every step, the same bytes however it is interrupted or retrained."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import BadRecipe, Unsupported
from expunge.core.mask import Mask
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.ball import norm_of, project
from expunge.learn.build import build
from expunge.learn.loop import Keep, Tally, fit, mean_loss, optimiser_of, reading_order
from expunge.learn.many import train_many
from expunge.learn.training import train
from expunge.unlearn import Retrain, Sisa

RADIUS = 2.0
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": [5]},
    optimiser_args={"lr": 0.2, "momentum": 0.9},
    epochs=3,
    batch_size=16,
    weight_decay=1e-3,
    max_norm=RADIUS,
)


def rows(n=90):
    x = torch.randn(n, 4, generator=generator(0))
    return Records(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), owners=[f"o{i % 13}" for i in range(n)], classes=3)


RECORDS = rows()


def vector(module):
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("radius", [0.3, 1.0, 7.3])
def test_the_projection_is_the_nearest_point_and_a_second_one_changes_no_byte(dtype, radius):
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(getattr(torch, dtype))
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(10.0 ** (k % 3) * torch.randn(parameter.shape, generator=generator(k), dtype=torch.float64))
    before = vector(module)
    project(module, radius)
    after = vector(module)
    assert radius * (1 - 1e-6) < float(after.norm()) <= radius
    torch.testing.assert_close(after, before * radius / before.norm(), rtol=3e-6, atol=0)  # the whole, no tensor alone
    held = copy.deepcopy(module.state_dict())
    project(module, radius)
    project(module, radius * 1.5)
    assert all(torch.equal(held[name], tensor) for name, tensor in module.state_dict().items())
    assert float(norm_of(module)) == pytest.approx(float(after.norm()), rel=1e-12)


def test_training_is_a_loop_of_steps_each_followed_by_a_projection():
    recipe = replace(RECIPE, dtype="float64").completed(RECORDS)
    module = build(recipe)
    project(module, RADIUS)
    optimiser, loss = optimiser_of(recipe, module), mean_loss(recipe)
    bound, free = 0, 0
    for epoch in range(recipe.epochs):
        for positions in reading_order(recipe, RECORDS, "whole", epoch).split(recipe.batch_size):
            optimiser.zero_grad()
            loss(module(RECORDS.x[positions].double()), RECORDS.y[positions]).backward()
            optimiser.step()
            outside = float(vector(module).norm()) > RADIUS
            bound, free = bound + outside, free + (not outside)
            project(module, RADIUS)
    assert bound > 5  # so that projecting at the end only would give another model
    trained = train(recipe, RECORDS)
    torch.testing.assert_close(vector(trained.module), vector(module), rtol=1e-12, atol=1e-12)
    late = train(replace(recipe, max_norm=None), RECORDS)
    project(late.module, RADIUS)
    assert float((vector(late.module) - vector(module)).norm()) > 1e-2


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_every_step_of_every_training_lies_in_the_ball(optimiser):
    args = {"lr": 0.2, "momentum": 0.9} if optimiser == "sgd" else {"lr": 0.05}
    recipe = replace(RECIPE, optimiser=optimiser, optimiser_args=args)
    log = train(recipe, RECORDS, keep=Keep(every=1)).log
    norms = [
        math.sqrt(sum(float(t.double().square().sum()) for t in state.values())) for state in log.checkpoints.values()
    ]
    assert len(norms) == log.steps
    assert max(norms) <= RADIUS
    assert max(norms) > RADIUS * (1 - 1e-5)
    free = train(replace(recipe, max_norm=None), RECORDS)
    assert float(norm_of(free.module)) > RADIUS * 1.2


def test_a_bound_that_is_never_reached_changes_no_byte():
    assert (
        train(replace(RECIPE, max_norm=1e3), RECORDS).digest()
        == train(replace(RECIPE, max_norm=None), RECORDS).digest()
    )


def test_a_training_of_no_step_lies_in_the_ball_too():
    assert float(norm_of(train(replace(RECIPE, epochs=0, max_norm=0.5), RECORDS).module)) <= 0.5


class Stop(Tally):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def saw(self, records, positions, x, y):
        super().saw(records, positions, x, y)
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [4, 9, 13])
def test_a_training_that_was_interrupted_ends_in_the_same_bytes(tmp_path, after):
    whole = train(RECIPE, RECORDS)
    with pytest.raises(Exception, match="interrupted at step"):
        train(RECIPE, RECORDS, resume=tmp_path / "run", save_every=2, tally=Stop(after))
    assert train(RECIPE, RECORDS, resume=tmp_path / "run", save_every=2).digest() == whole.digest()


SHARDED = replace(RECIPE, sharding=Sharding(shards=3, slices=2, salt="s"), max_norm=1.5)


@pytest.mark.parametrize(("recipe", "method"), [(RECIPE, Retrain()), (SHARDED, Retrain()), (SHARDED, Sisa())])
def test_exact_methods_give_the_bytes_of_a_training_without_the_rows(recipe, method):
    forget = RECORDS.ids[5:25]
    done = method(train(recipe, RECORDS), RECORDS, Request.remove(forget), rng=generator(0))
    assert done.trained.digest() == train(recipe, RECORDS.without(forget)).digest()
    assert done.trained.recipe.max_norm == recipe.max_norm


def test_each_shard_lies_in_the_ball_after_each_slice():
    trained = train(SHARDED, RECORDS)
    states = [state for part in trained.parts for state in part.log.slices]
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in state.values())) for state in states]
    assert len(norms) == 6
    assert max(norms) <= 1.5
    assert max(norms) > 1.49


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_pruned_training_lies_in_the_ball_and_its_zeros_stay_zero(by):
    recipe = replace(RECIPE, pruning=Pruning(sparsity=0.5, by=by), max_norm=1.5)
    trained = train(recipe, RECORDS)
    assert float(norm_of(trained.module)) <= 1.5
    assert int((trained.module.body[0].weight == 0).sum()) == 10
    assert Retrain()(trained, RECORDS, Request.remove(["3"]), rng=generator(0)).trained.digest() == (
        train(recipe, RECORDS.without(["3"])).digest()
    )


def test_a_mask_that_holds_other_values_than_zero_is_refused():
    recipe = RECIPE.completed(RECORDS)
    module = build(recipe)
    mask = Mask({"head.bias": torch.tensor([True, False, True])})
    with pytest.raises(BadRecipe, match=r"^max_norm scales all entries alike"):
        fit(module, recipe, RECORDS, mask=mask)
    with torch.no_grad():
        module.head.bias[1] = 0
    fit(module, recipe, RECORDS, mask=mask)
    assert float(module.head.bias.detach()[1]) == 0


def test_many_at_once_refuse_it():
    with pytest.raises(
        Unsupported, match=r"max_norm projects each model after each step; train the models one by one$"
    ):
        train_many(RECIPE, [RECORDS], [0])
