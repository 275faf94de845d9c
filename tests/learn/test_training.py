"""Training: a function of the recipe, the rows' content and their owners, and of nothing else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.coins import generator, order, seed_of
from expunge.core.errors import BadRecipe, BadRecords, EmptyRetain, Misuse, Stopped
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn import training
from expunge.learn.build import allow_code, build
from expunge.learn.loop import Keep, Tally, fit, mean_loss, optimiser_of, prepare, reading_order, row_losses
from expunge.learn.training import adopt, train

ADAM = {"optimiser": "adam", "optimiser_args": {"lr": 0.01}}
NESTEROV = {"optimiser_args": {"lr": 0.05, "momentum": 0.9, "nesterov": True}}


def records(n=50, *, labels=3, shape=(4,), owners=11):
    x = torch.randn(n, *shape, generator=generator(n))
    return Records(x, [i % labels for i in range(n)], owners=[f"o{i % owners}" for i in range(n)], classes=labels)


def recipe(**more):
    return Recipe(**{"model": "mlp", "model_args": {"hidden": [6]}, "epochs": 3, "batch_size": 16, **more})


def drops(shape, outputs):
    return nn.Sequential(nn.Linear(shape[0], 8), nn.Dropout(0.5), nn.Linear(8, outputs))


def by_hand(recipe, records):
    """The documented training, in twenty lines of plain float64 steps."""
    recipe = recipe.completed(records)
    module = build(recipe)
    args = dict(recipe.optimiser_args)
    lr, momentum = args["lr"], args.get("momentum", 0.0)
    (first, second), eps = args.get("betas", (0.9, 0.999)), args.get("eps", 1e-8)
    memory = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in module.parameters()}
    losses, step = [], 0
    for epoch in range(recipe.epochs):
        total = 0.0
        for batch in np.split(*cuts(order(records.keys, recipe.seed, "order", "whole", epoch), recipe.batch_size)):
            rows = [nn.functional.cross_entropy(module(records.x[i : i + 1]), records.y[i : i + 1]) for i in batch]
            step += 1
            total += sum(rows).item()
            module.zero_grad()
            decay = sum((p**2).sum() for p in module.parameters()) * recipe.weight_decay / 2
            (sum(rows) / len(rows) + decay).backward()
            for p, (mean, square) in memory.items():
                rate, g = lr * recipe.lr_factor(epoch), p.grad
                if recipe.optimiser == "adam":
                    mean.copy_(first * mean + (1 - first) * g)
                    square.copy_(second * square + (1 - second) * g**2)
                    g = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + eps)
                elif momentum:
                    mean.copy_(momentum * mean + g)
                    g = g + momentum * mean if args.get("nesterov") else mean
                p.data -= rate * g
        losses.append(total / len(records))
    return module, losses


def cuts(positions, size):
    return positions, range(size, len(positions), size)


@pytest.mark.parametrize(
    "more",
    [
        {"optimiser_args": {"lr": 0.1}},
        {"optimiser_args": {"lr": 0.1, "momentum": 0.9}, "weight_decay": 0.01, "schedule": {"kind": "cosine"}},
        {**NESTEROV, "schedule": {"kind": "steps", "at": [1, 2]}},
        {**ADAM, "weight_decay": 0.1},
        {"optimiser": "adam", "optimiser_args": {"lr": 0.1, "betas": [0.5, 0.9], "eps": 1e-3}},
    ],
    ids=str,
)
def test_training_is_the_documented_objective_in_the_documented_order(more):
    x, wanted = records().x.double(), recipe(dtype="float64", **more)
    rows = Records(x, records().y, owners=records().owners)
    trained = train(wanted, rows)
    module, losses = by_hand(wanted, rows)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(trained.module.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    assert trained.log.losses == pytest.approx(losses, rel=1e-12)


VARIANTS = {
    "momentum": {},
    "nesterov": {**NESTEROV, "schedule": {"kind": "cosine"}},
    "adam": {**ADAM, "weight_decay": 0.01, "dtype": "float64"},
    "dropout": {"model": "drops", "model_args": {}},
    "shards": {"sharding": Sharding(shards=3, slices=2, salt="s")},
}


def variant(name):
    more = VARIANTS[name]
    return recipe(**{**more, "model": allow_code(drops)} if more.get("model") == "drops" else more)


@pytest.mark.parametrize("name", VARIANTS)
def test_same_seed_same_bytes_and_no_other_coin(name):
    state = torch.get_rng_state()
    first = train(variant(name), records())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = train(variant(name), records(), keep=Keep(batches=True, every=2), report=lambda *_: None)
    assert first.digest() == again.digest()
    assert first.log is None or first.log.losses == again.log.losses
    assert not any(part.training for part in first.module.modules())
    assert train(replace(variant(name), seed=1), records()).digest() != first.digest()


@pytest.mark.parametrize("name", VARIANTS)
def test_row_order_and_ids_are_irrelevant_and_owners_are_not(name):
    rows = records()
    first = train(variant(name), rows)
    back = list(range(len(rows)))[::-1]
    renamed = Records(rows.x[back], rows.y[back], [f"id{i}" for i in back], [rows.owners[i] for i in back])
    assert train(variant(name), renamed).digest() == first.digest()
    others = Records(rows.x, rows.y, rows.ids, [f"p{owner}" for owner in rows.owners])
    assert train(variant(name), others).digest() != first.digest()


def test_a_removed_row_leaves_no_trace_in_the_batches_of_the_others():
    rows = records()
    wanted = recipe().completed(rows)
    for epoch in range(3):
        whole = [rows.ids[i] for i in reading_order(wanted, rows, "whole", epoch)]
        fewer = rows.without(["7", "31"])
        assert [i for i in whole if i not in ("7", "31")] == [
            fewer.ids[i] for i in reading_order(wanted, fewer, "whole", epoch)
        ]
    assert reading_order(wanted, rows, "whole", 0).tolist() != reading_order(wanted, rows, "slice-0", 0).tolist()


def test_dropout_is_drawn_from_the_seed():
    wanted = variant("dropout").completed(records())
    calm = train(replace(wanted, epochs=1, batch_size=64), records())
    torch.manual_seed(0)
    module = build(wanted)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0, "dropout", "whole"))
        where = reading_order(wanted, records(), "whole", 0)
        loss = nn.functional.cross_entropy(module.train()(records().x[where]), records().y[where])
    assert calm.log.losses == pytest.approx((loss.item(),), rel=1e-6)


def test_the_log():
    trained = train(recipe(), records(), keep=Keep(batches=True, every=5))
    log = trained.log
    assert (log.steps, log.rows_read, log.threads, len(log.losses)) == (12, 150, 1, 3)
    assert sorted(log.checkpoints) == [5, 10]
    assert [len(batch) for batch in log.batches] == [16, 16, 16, 2] * 3
    for epoch in range(3):
        read = [i for batch in log.batches[4 * epoch : 4 * epoch + 4] for i in batch]
        assert sorted(read) == sorted(records().ids)
        assert read == [records().ids[i] for i in reading_order(trained.recipe, records(), "whole", epoch)]
    assert trained.ids == set(records().ids)
    assert not trained.gone
    assert not train(recipe(), records()).log.batches


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 8, 10, 12, 99])
def test_partial_steps_are_the_beginning_of_the_whole(steps):
    rows = records()
    wanted = recipe().completed(rows)
    whole = train(wanted, rows, keep=Keep(batches=True, every=1)).log
    module, tally = build(wanted), Tally()
    log = fit(module, wanted, rows, steps=steps, keep=Keep(batches=True, every=1), tally=tally)
    made = min(steps, 12)
    assert log.steps == made
    assert log.batches == whole.batches[:made]
    assert log.rows_read == tally.rows_read == tally.gradients == sum(len(batch) for batch in log.batches)
    assert list(log.checkpoints) == list(range(1, made + 1))
    assert len(log.losses) == math.ceil(made / 4)
    if made:
        last = whole.checkpoints[made]
        assert all(torch.equal(value, last[name]) for name, value in module.state_dict().items())
    if made % 4 == 0:
        assert log.losses == whole.losses[: made // 4]


def test_no_epochs_leave_the_initial_weights():
    trained = train(recipe(epochs=0), records())
    assert trained.digest() == Trained(module=build(trained.recipe), recipe=trained.recipe, ids=frozenset()).digest()
    assert (trained.log.steps, trained.log.rows_read, trained.log.losses) == (0, 0, ())


def test_checkpoints_are_copies_of_their_moment():
    log = train(recipe(), records(), keep=Keep(every=4)).log
    one_epoch = train(recipe(epochs=1, schedule={"kind": "constant"}), records())
    assert all(torch.equal(value, log.checkpoints[4][name]) for name, value in one_epoch.module.state_dict().items())
    assert not torch.equal(log.checkpoints[4]["head.weight"], log.checkpoints[8]["head.weight"])


@pytest.mark.parametrize("more", [{}, {"sharding": Sharding(shards=2, salt="s")}])
def test_divergence_is_refused_with_advice(more):
    wanted = recipe(model="mlp", optimiser_args={"lr": 1e30}, epochs=5, **more)
    with pytest.raises(
        BadRecipe, match=r"^training diverged in epoch \d \(loss (nan|inf)\); lower optimiser_args lr, now 1e"
    ):
        train(wanted, records())


def test_what_cannot_be_trained():
    with pytest.raises(EmptyRetain, match=r"^there are no records to train on; give at least one$"):
        train(recipe(), records().select([]))
    with pytest.raises(EmptyRetain, match=r"^there are no rows to train on; give at least one$"):
        fit(build(recipe().completed(records())), recipe(), records().select([]))
    with pytest.raises(Misuse, match=r"^the recipe has 3 shards, but shards=4 was asked; give one of them$"):
        train(recipe(sharding=Sharding(shards=3)), records(), shards=4)
    with pytest.raises(BadRecords, match=r"^the recipe's model has outputs 3, but the records have 4; train anew$"):
        train(recipe().completed(records()), records(labels=4))
    with pytest.raises(BadRecords, match=r"^loss mse needs float targets"):
        train(recipe(loss="mse"), records())


def test_shards_by_argument_are_shards_by_recipe():
    assert train(recipe(), records(), shards=3).recipe.sharding.shards == 3
    salted = recipe(sharding=Sharding(shards=3, salt="s"))
    assert train(salted, records(), shards=3).digest() == train(salted, records()).digest()


def test_pixels_are_scaled_by_a_constant():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(64, 4)
    scaled = prepare(pixels, torch.float64)
    torch.testing.assert_close(scaled, pixels.double() / 255)
    assert prepare(pixels.float(), torch.float64).dtype is torch.float64
    assert prepare(pixels.long(), torch.float64).dtype is torch.int64
    assert pixels[0].tolist() == [0, 1, 2, 3]
    few = Records(pixels[:8], [0, 1] * 4)
    assert torch.isfinite(train(recipe(), few).module.head.weight).all()


@pytest.mark.parametrize("targets", [(), (1,), (3,)])
def test_losses_are_means_of_row_losses(targets):
    outputs, y = torch.randn(5, *(targets or (1,))), torch.randn(5, *targets)
    wanted = Recipe(model="mlp", loss="mse")
    expected = ((outputs - y.reshape(outputs.shape)) ** 2).sum(1)
    torch.testing.assert_close(row_losses(wanted)(outputs, y), expected)
    torch.testing.assert_close(mean_loss(wanted)(outputs, y), expected.mean())
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    by_class = -logits.log_softmax(1)[range(5), labels]
    torch.testing.assert_close(row_losses(recipe())(logits, labels), by_class)
    torch.testing.assert_close(mean_loss(recipe())(logits, labels), by_class.mean())


@pytest.mark.parametrize("y", [torch.linspace(-1, 1, 40), torch.randn(40, 2, generator=generator(0))], ids=["1", "2"])
def test_regression_is_learnt(y):
    rows = Records(torch.cat([y.reshape(40, -1)] * 2, 1), y)
    log = train(recipe(loss="mse", epochs=30), rows).log
    assert log.losses[-1] < 0.2 * log.losses[0]


def test_frozen_parameters_are_not_trained():
    module = build(recipe().completed(records()))
    module.body[0].weight.requires_grad_(False)
    assert sum(p.numel() for group in optimiser_of(recipe(), module).param_groups for p in group["params"]) == 6 + 21
    before = module.body[0].weight.clone()
    fit(module, recipe(), records())
    assert torch.equal(module.body[0].weight, before)


def test_progress_is_told():
    told = []
    train(recipe(epochs=8), records(), report=lambda *what: told.append(what))
    assert told == [("whole", 16, 32), ("whole", 32, 32)]


def test_an_interrupt_without_a_folder_stays_an_interrupt_and_with_one_says_how_to_go_on(tmp_path):
    def interrupt(stage, done, steps):
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(epochs=8), records(), report=interrupt)
    with pytest.raises(
        Stopped, match=rf"^interrupted at step 16; go on with the same command and --resume {tmp_path}/r$"
    ):
        train(recipe(epochs=8), records(), report=interrupt, resume=tmp_path / "r", save_every=3)
    again = train(recipe(epochs=8), records(), resume=tmp_path / "r")
    assert again.digest() == train(recipe(epochs=8), records()).digest()
    assert not (tmp_path / "r").exists()


def test_a_model_from_elsewhere_is_adopted():
    net = nn.Linear(4, 3).double()
    trained = adopt(net, recipe(sharding=Sharding(shards=2)), records())
    assert (trained.recipe.model, trained.recipe.dtype, trained.recipe.sharding) == ("external", "float64", None)
    assert trained.ids == set(records().ids)
    assert "adopt" in dir(training)
