"""Many models at once against each model alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import EmptyRetain, Misuse, Unsupported
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.learn.build import allow_code
from expunge.learn.loop import Tally
from expunge.learn.many import train_many
from expunge.learn.training import train

MODELS = {
    "softmax": ({}, (3,)),
    "mlp": ({"hidden": [7, 5]}, (2, 3)),
    "mlp group": ({"hidden": [8], "norm": "group"}, (3,)),
    "lenet": ({}, (16, 16)),
    "convnet3": ({"width": 4}, (1, 8, 8)),
}
OPTIMISERS = {
    "sgd": {"optimiser_args": {"lr": 0.1}},
    "sgd, decay": {"optimiser_args": {"lr": 0.1}, "weight_decay": 0.1},
    "momentum": {"optimiser_args": {"lr": 0.05, "momentum": 0.9}, "weight_decay": 0.01},
    "nesterov": {"optimiser_args": {"lr": 0.05, "momentum": 0.9, "nesterov": True}, "schedule": {"kind": "cosine"}},
    "adam": {"optimiser": "adam", "optimiser_args": {"lr": 0.01, "betas": [0.8, 0.99]}, "weight_decay": 0.01},
    "adam steps": {"optimiser": "adam", "optimiser_args": {"lr": 0.01}, "schedule": {"kind": "steps", "at": [1, 2]}},
}


def ragged(shape, sizes=(30, 17, 30, 9, 16), labels=None):
    """Subsets of one set that overlap, differ in size and in steps an epoch, and end in partial batches."""
    x = torch.randn(40, *shape, generator=generator(1), dtype=torch.float64)
    y = torch.arange(40) % 3 if labels is None else labels
    pool = Records(x, y, owners=[f"o{i % 7}" for i in range(40)])
    picks = [torch.randperm(40, generator=generator(k))[:size] for k, size in enumerate(sizes)]
    return [pool.select(pick) for pick in picks]


def recipe(name="softmax", **more):
    args = MODELS[name][0]
    return Recipe(
        **{"model": name.split()[0], "model_args": args, "epochs": 4, "batch_size": 8, "dtype": "float64", **more}
    )


def gap(one, other):
    pairs = zip(one.module.state_dict().values(), other.module.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def compare(wanted, subsets, seeds, tolerance):
    together = train_many(wanted, subsets, seeds)
    for trained, subset, seed in zip(together, subsets, seeds, strict=True):
        alone = train(replace(wanted, seed=seed), subset)
        assert gap(trained, alone) < tolerance
        assert (trained.recipe, trained.ids, trained.gone) == (alone.recipe, alone.ids, alone.gone)
        assert (trained.log.steps, trained.log.rows_read) == (alone.log.steps, alone.log.rows_read)
        assert not trained.module.training
        assert gap(trained, train(replace(wanted, seed=seed, epochs=0), subset)) > 0.01  # something was learnt
    return together


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", MODELS)
def test_each_model_is_the_one_that_it_would_be_alone(name, optimiser):
    epochs = 2 if name == "lenet" else 4
    compare(recipe(name, **OPTIMISERS[optimiser], epochs=epochs), ragged(MODELS[name][1]), [5, 5, 6, 7, 8], 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_float32_stays_near_for_twenty_steps(name):
    subsets = ragged(MODELS[name][1], sizes=(32, 31, 25))
    compare(recipe(name, dtype="float32", epochs=5), subsets, [1, 2, 3], 1e-4)


@pytest.mark.parametrize("targets", ["one", "column", "two"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_regression(targets, dtype, stored):
    y = torch.randn(40, 2, generator=generator(3), dtype=torch.float64).to(stored)
    labels = {"one": y[:, 0], "column": y[:, :1], "two": y}[targets]
    wanted = recipe("mlp", loss="mse", dtype=dtype, epochs=3, optimiser_args={"lr": 0.02, "momentum": 0.9})
    compare(wanted, ragged((2, 3), labels=labels), [1, 2, 3, 4, 5], 1e-9 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize("name", ["mlp", "convnet3"])
def test_the_size_of_chunks_is_irrelevant(name):
    subsets, seeds = ragged(MODELS[name][1]), [1, 2, 3, 4, 5]
    whole = train_many(recipe(name), subsets, seeds)
    for chunk in (1, 2, 3, 100):
        for one, other in zip(whole, train_many(recipe(name), subsets, seeds, chunk=chunk), strict=True):
            assert gap(one, other) < 1e-11


def test_order_of_the_models_is_kept_and_of_the_rows_irrelevant():
    subsets = ragged((3,))
    first = train_many(recipe(), subsets, [1, 2, 3, 4, 5])
    back = train_many(recipe(), [s.select(range(len(s) - 1, -1, -1)) for s in subsets[::-1]], [5, 4, 3, 2, 1])
    for one, other in zip(first, back[::-1], strict=True):
        assert gap(one, other) < 1e-12
        assert one.recipe == other.recipe


def test_pixels_and_one_whole_set():
    x = torch.randint(0, 256, (20, 2, 2), generator=generator(0), dtype=torch.uint8)
    whole = Records(x, [i % 2 for i in range(20)])
    compare(recipe(model_args={}), [whole, whole, whole.select(range(3))], [1, 2, 1], 1e-9)


def test_no_epochs_leave_the_initial_weights():
    subsets = ragged((3,))[:2]
    for trained, subset in zip(train_many(recipe(epochs=0), subsets, [1, 2]), subsets, strict=True):
        assert gap(trained, train(trained.recipe, subset)) == 0


def residual(shape, outputs):
    return Residual(shape[0], outputs)


class Residual(nn.Module):
    """Not a line of layers, and linear layers without bias."""

    def __init__(self, width, outputs):
        super().__init__()
        self.inner, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(x + self.inner(x).relu())


def line(shape, outputs):
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs, bias=False)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.parametrize(("make", "shape"), [(residual, (3,)), (line, (2, 3))])
def test_networks_of_ones_own(make, shape):
    compare(recipe(model=allow_code(make), model_args={}), ragged(shape), [1, 2, 3, 4, 5], 1e-9)


def drops(shape, outputs):
    return nn.Sequential(nn.Linear(shape[0], 4), nn.Dropout(0.1), nn.Linear(4, outputs))


def test_what_cannot_be_trained_together():
    subsets = ragged((3,))
    batch_norm = recipe("mlp", model_args={"hidden": [4], "norm": "batch"})
    with pytest.raises(Unsupported, match=r'^"body.1" is a batch norm, whose running statistics cannot be kept apart'):
        train_many(batch_norm, subsets, [1] * 5)
    with pytest.raises(
        Unsupported, match=r'^"1" drops out at random, with coins that many models would share; train one'
    ):
        train_many(recipe(model=allow_code(drops), model_args={}), subsets, [1] * 5)
    with pytest.raises(Unsupported, match=r"^a sharded recipe is several trainings already; give recipe.part\(i\), or"):
        train_many(recipe(sharding=Sharding(shards=2)), subsets, [1] * 5)
    with pytest.raises(Misuse, match=r"^give as many seeds as subsets and at least one, got 4 and 5$"):
        train_many(recipe(), subsets, [1] * 4)
    with pytest.raises(Misuse, match=r"^give as many seeds as subsets and at least one, got 0 and 0$"):
        train_many(recipe(), [], [])
    with pytest.raises(Misuse, match=r"^subsets must be selections of one set of records; make them with take"):
        train_many(recipe(), [subsets[0], ragged((3,))[1]], [1, 2])
    with pytest.raises(EmptyRetain, match=r"^a subset holds no rows; give each model at least one$"):
        train_many(recipe(), [subsets[0], subsets[0].select([])], [1, 2])
    streamed = Records.from_dataset([(row, 0) for row in torch.zeros(4, 3)], classes=3)
    with pytest.raises(Unsupported, match=r"^these rows are streamed from a data set"):
        train_many(recipe(), [streamed], [1])


def test_no_global_coin_is_drawn_and_the_work_is_counted():
    state, tally, told = torch.get_rng_state(), Tally(), []
    train_many(recipe(), ragged((3,)), [1, 2, 3, 4, 5], tally=tally, report=lambda *what: told.append(what), chunk=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert tally.gradients == tally.rows_read == 4 * (30 + 17 + 30 + 9 + 16)
    assert told[-1] == ("many", 16, 16)
