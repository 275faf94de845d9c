import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.coins import child, generator, order
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import Tally
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import adopt, train
from expunge.testing.case import Case, digits
from expunge.testing.nearer import NearerThanStandingStill
from expunge.testing.trial import Trial
from expunge.unlearn.dampening import SelectiveSynapticDampening, loss_gradients, mean_squares
from expunge.unlearn.method import Task


def rows(n=60, classes=4):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 6)
    return Records(x, y, [f"r{i}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=4, batch_size=16, dtype="float64", seed=3)
FORGET = [name for name, label in zip(RECORDS.ids, RECORDS.y.tolist(), strict=True) if label == 1]
REMOVE = Request.remove(FORGET)


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


def task_of(trained, forget, retain):
    return Task(trained=trained, forget=forget, retain=retain, tally=Tally())


def brute(trained, records):
    """Mean over rows of squared gradients, a row at a time."""
    module, total = copy.deepcopy(trained.module), None
    for x, y in zip(records.x, records.y, strict=True):
        out = module(x[None])
        if trained.recipe.loss == "mse":
            loss = (out[0] - y).square().sum()
        else:
            loss = nn.functional.cross_entropy(out, y[None])
        found = [g.square() for g in torch.autograd.grad(loss, list(module.parameters()))]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    names = [name for name, _ in module.named_parameters()]
    return {name: one / len(records) for name, one in zip(names, total, strict=True)}


def squares(trained, records, most=None, rng=None):
    task = task_of(trained, records, records)
    return mean_squares(task, records, loss_gradients(task), rng or generator(0), "t", most), task.tally


def assert_same(one, other, rtol=1e-10):
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name].double(), rtol=rtol, atol=1e-18)


# The mean squares, which Fisher forgetting uses as well


def test_squares_are_of_single_rows_and_not_of_batch_means(trained):
    found, tally = squares(trained, RECORDS)
    assert_same(found, brute(trained, RECORDS))
    assert (tally.gradients, tally.rows_read) == (60, 60)
    module = copy.deepcopy(trained.module)
    mean = torch.autograd.grad(nn.functional.cross_entropy(module(RECORDS.x), RECORDS.y), list(module.parameters()))
    assert sum(float(g.square().sum()) for g in mean) < 0.5 * sum(float(one.sum()) for one in found.values())


IMAGES = {
    "lenet": {},
    "convnet3": {"width": 8},
    "resnet20": {"width": 8},
    "allcnn": {"width": 8},
    "softmax": {},
}


@pytest.mark.parametrize("name", IMAGES)
def test_layer_by_layer_and_row_by_row_are_brute_force(name):
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=generator(1))
    records = Records(x, torch.tensor([0, 1, 2, 1, 0]), classes=3)
    model = train(Recipe(model=name, model_args=IMAGES[name], epochs=1, dtype="float64"), records)
    expected = brute(model, records)
    assert_same(squares(model, records)[0], expected, rtol=1e-8)
    elsewhere = adopt(Wrapped(model.module).eval(), model.recipe, records)
    assert_same(squares(elsewhere, records)[0], {f"inner.{name}": one for name, one in expected.items()}, rtol=1e-8)


class Wrapped(nn.Module):
    """No network of expunge's own, so that nothing is known of how it calls its layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Tied(nn.Module):
    """Uses one layer twice, and once more as a function: only gradients of rows see all of it."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.first, self.head = nn.Linear(shape[0], shape[0]), nn.Linear(shape[0], outputs)

    def forward(self, x):
        hidden = torch.relu_(self.first(torch.relu_(self.first(x))))
        return self.head(hidden @ self.first.weight.T)


def test_layers_that_are_used_more_than_once_are_counted_whole():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Tied((6,), 4).double().eval()
    model = adopt(module, RECIPE, RECORDS)
    assert_same(squares(model, RECORDS)[0], brute(model, RECORDS))


def test_frozen_parameters_have_no_importance(trained):
    module = copy.deepcopy(trained.module)
    module.body.requires_grad_(False)
    model = adopt(module, RECIPE, RECORDS)
    expected = {name: one for name, one in brute(trained, RECORDS).items() if name.startswith("head")}
    assert_same(squares(model, RECORDS)[0], expected)
    after = SelectiveSynapticDampening(alpha=1.5)(model, RECORDS, REMOVE, rng=generator(0)).trained.module
    for name, parameter in module.named_parameters():
        assert torch.equal(after.get_parameter(name), parameter) == name.startswith("body")


def test_rows_are_chosen_by_coins_and_not_by_position(trained):
    some, tally = squares(trained, RECORDS, most=20)
    assert tally.rows_read == 20
    assert_same(some, brute(trained, RECORDS.select(order(RECORDS.keys, 0, "squares", "t")[:20])))
    shuffled = RECORDS.select(torch.randperm(60, generator=generator(9)))
    assert_same(squares(trained, shuffled, most=20)[0], some)
    others = squares(trained, RECORDS, most=20, rng=generator(1))[0]
    assert any(not torch.allclose(some[name], others[name]) for name in some)


# The method


def test_dampening_is_the_papers_rule_on_brute_force_importances(trained):
    method = SelectiveSynapticDampening(alpha=1.5, dampening=0.7)
    result = method(trained, RECORDS, REMOVE, rng=generator(0))
    of_forget, of_all = brute(trained, RECORDS.take(FORGET)), brute(trained, RECORDS)
    shrunk = kept = 0
    for name, parameter in result.trained.module.named_parameters():
        old, i_f, i_d = trained.module.get_parameter(name), of_forget[name], of_all[name]
        much = i_f > 1.5 * i_d
        expected = torch.where(much, old * torch.clamp(0.7 * i_d / i_f, max=1), old)
        torch.testing.assert_close(parameter, expected, rtol=1e-10, atol=0)
        assert torch.equal(parameter[~much], old[~much])
        shrunk, kept = shrunk + int(much.sum()), kept + int((~much).sum())
    assert shrunk > 20
    assert kept > 20
    assert result.cost.gradients == result.cost.rows_read == 60


def test_no_parameter_ever_grows(trained):
    result = SelectiveSynapticDampening(alpha=1.2, dampening=1.6)(trained, RECORDS, REMOVE, rng=generator(0))
    of_forget, of_all = brute(trained, RECORDS.take(FORGET)), brute(trained, RECORDS)
    for name, parameter in result.trained.module.named_parameters():
        old = trained.module.get_parameter(name)
        ratio = 1.6 * of_all[name] / of_forget[name]
        assert bool((parameter.abs() <= old.abs() * (1 + 1e-12)).all())
        assert torch.equal(parameter[ratio > 1], old[ratio > 1])


def test_all_rows_are_weighed_as_often_as_they_are_there_even_if_few_are_read(trained):
    retain = RECORDS.without(FORGET)
    method = SelectiveSynapticDampening(alpha=1.5, rows=10)
    result = method(trained, RECORDS, REMOVE, rng=generator(4))
    assert result.cost.rows_read == 20
    task = task_of(trained, RECORDS.take(FORGET), retain)
    parts = [
        mean_squares(task, part, loss_gradients(task), generator(4), name, 10)
        for part, name in ((task.forget, "forget"), (retain, "retain"))
    ]
    share = len(FORGET) / 60
    name, old = next(iter(trained.module.named_parameters()))
    i_f, i_d = parts[0][name], share * parts[0][name] + (1 - share) * parts[1][name]
    expected = torch.where(i_f > 1.5 * i_d, old * (i_d / i_f).clamp(max=1), old)
    torch.testing.assert_close(result.trained.module.get_parameter(name), expected, rtol=1e-10, atol=0)


def test_regression_works():
    targets = Records(RECORDS.x, RECORDS.x[:, :2] * 3, RECORDS.ids)
    model = train(replace(RECIPE, loss="mse"), targets)
    assert_same(squares(model, targets)[0], brute(model, targets))
    result = SelectiveSynapticDampening(alpha=1.2)(model, targets, REMOVE, rng=generator(0))
    assert result.trained.digest() != model.digest()


def test_pruned_weights_stay_zero():
    model = train(replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random")), RECORDS)
    after = SelectiveSynapticDampening(alpha=1.5)(model, RECORDS, REMOVE, rng=generator(0)).trained.module
    assert mask_of_zeros(after).held == mask_of_zeros(model.module).held == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha must be > 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be > 0"),
        ({"dampening": -1.0}, "dampening must be >= 0, got -1"),
        ({"rows": 0}, "rows must be an integer >= 1, or None for all, got 0"),
        ({"rows": 2.5}, "rows must be an integer"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(Misuse, match=message):
        SelectiveSynapticDampening(**settings)


def test_an_alpha_that_no_parameter_can_reach_is_refused_before_work(trained):
    tally = Tally()
    most = 60 / len(FORGET)
    with pytest.raises(Misuse, match=rf"all; give an alpha below {most:.3g}"):
        SelectiveSynapticDampening(alpha=most)(trained, RECORDS, REMOVE, rng=generator(0), tally=tally)
    assert tally.rows_read == 0
    with pytest.raises(NothingChanged, match=r"no parameter is .* lower alpha"):
        SelectiveSynapticDampening(alpha=most - 1e-9)(trained, RECORDS, REMOVE, rng=generator(0))


def test_shards_are_refused():
    sharded = train(replace(RECIPE, sharding=Sharding(shards=2)), RECORDS)
    with pytest.raises(Unsupported, match="use sisa or retrain"):
        SelectiveSynapticDampening()(sharded, RECORDS, REMOVE, rng=generator(0))


def class_removed(label):
    """The suite's case without its wrong labels; a whole class is removed."""
    whole = digits()
    clean = whole.retain
    request = Request.remove(clean.of_class(label).ids)
    return Case(records=clean, test=whole.test, recipes=whole.recipes, request=request)


def test_removing_a_class_comes_nearer_to_retraining():
    trial = Trial(method=SelectiveSynapticDampening(), case=class_removed(5), train=train, seeds=tuple(range(4)))
    verdict = NearerThanStandingStill()(trial, rng=child(generator(0), "class"))
    assert verdict.passed, verdict
