import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.digest import digest_tensors
from expunge.core.errors import Misuse, NothingChanged, Unsupported
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import TrainingLog, copy_state
from expunge.learn.build import allow_code, build
from expunge.learn.loop import Keep, Tally
from expunge.learn.training import adopt, load, train
from expunge.testing import conformance
from expunge.unlearn.amnesiac import AmnesiacUnlearning, without
from expunge.unlearn.sparsity import Masked, Pruned
from expunge.unlearn.steps import Steps

ALL = Keep(batches=True, every=1)
PLAIN = AmnesiacUnlearning(repair_epochs=0)


def rows(n=72, classes=4):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 6)
    return Records(x, y, [f"r{i}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=3, batch_size=8, dtype="float64", seed=3)


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS, keep=ALL)


def call(method, trained, ids, records=RECORDS, seed=0, tally=None):
    return method(trained, records, Request.remove(ids), rng=generator(seed), tally=tally)


def updates(trained):
    """Beginning, and the update of every step, from the log alone."""
    beginning = copy_state(build(trained.recipe))
    states = [beginning, *(trained.log.checkpoints[k] for k in range(1, trained.log.steps + 1))]
    return beginning, [{name: b[name] - a[name] for name in a} for a, b in pairwise(states)]


def assert_close(one, other, atol=1e-13):
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name].double(), other[name].double(), rtol=0, atol=atol)


# Oracles


def test_the_result_is_the_end_without_the_dropped_updates_and_the_beginning_with_the_kept_ones(trained):
    gone = ["r3", "r40"]
    beginning, steps = updates(trained)
    held = [bool({"r3", "r40"} & set(batch)) for batch in trained.log.batches]
    assert 3 <= sum(held) <= 6
    after = call(PLAIN, trained, gone).trained.module.state_dict()
    end = trained.module.state_dict()
    dropped = [step for step, has in zip(steps, held, strict=True) if has]
    kept = [step for step, has in zip(steps, held, strict=True) if not has]
    assert_close(after, {name: end[name] - sum(step[name] for step in dropped) for name in end})
    assert_close(after, {name: beginning[name] + sum(step[name] for step in kept) for name in end})


def test_dropping_the_last_batch_of_one_epoch_is_stopping_before_it():
    short = train(replace(RECIPE, epochs=1), RECORDS, keep=ALL)
    result = call(PLAIN, short, short.log.batches[-1])
    assert_close(result.trained.module.state_dict(), short.log.checkpoints[short.log.steps - 1])


def test_dropping_every_step_gives_the_beginning():
    model = train(replace(RECIPE, epochs=1), RECORDS, keep=ALL)
    ids = [batch[0] for batch in model.log.batches]
    assert_close(call(PLAIN, model, ids).trained.module.state_dict(), copy_state(build(model.recipe)), atol=0)


def test_running_statistics_are_those_of_the_kept_batches_alone():
    model = train(replace(RECIPE, model_args={"hidden": (8,), "norm": "batch"}), RECORDS, keep=ALL)
    gone = [f"r{i}" for i in range(6)]
    beginning = copy_state(build(model.recipe))
    kept = [k for k, batch in enumerate(model.log.batches, 1) if not set(gone) & set(batch)]
    assert 0 < len(kept) < model.log.steps - 9
    after = call(PLAIN, model, gone).trained.module.state_dict()
    for name in (one for one in after if "running" in one):
        expected = beginning[name]
        for k in kept:
            was = model.log.checkpoints[k - 1][name] if k > 1 else beginning[name]
            of_batch = (model.log.checkpoints[k][name] - 0.9 * was) / 0.1
            expected = 0.9 * expected + 0.1 * of_batch
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-13)
        assert "var" not in name or bool((after[name] > 0).all())
    assert [int(after[name]) for name in after if "tracked" in name] == [len(kept)]
    halves = call(PLAIN, call(PLAIN, model, gone[:3]).trained, gone[3:]).trained.module.state_dict()
    assert_close(halves, after)


# The log


def test_the_new_log_names_no_removed_row_and_ends_at_the_model(trained):
    gone = ["r3", "r40", "r41"]
    before = trained.log
    log = call(PLAIN, trained, gone).trained.log
    assert not {name for batch in log.batches for name in batch} & set(gone)
    assert log.steps == before.steps == len(log.batches)
    dropped = [bool(set(gone) & set(batch)) for batch in before.batches]
    assert [batch == () for batch in log.batches] == dropped
    assert all(new == old for new, old, out in zip(log.batches, before.batches, dropped, strict=True) if not out)
    assert log.losses == ()
    assert log.rows_read == sum(map(len, log.batches))
    result = call(PLAIN, trained, gone).trained
    assert_close(log.checkpoints[log.steps], result.module.state_dict(), atol=0)
    states = [copy_state(build(trained.recipe)), *(log.checkpoints[k] for k in range(1, log.steps + 1))]
    for was, now, out in zip(states[:-1], states[1:], dropped, strict=True):
        assert (digest_tensors(was) == digest_tensors(now)) == out


def test_one_request_after_another_gives_what_all_at_once_would(trained):
    for method in (PLAIN, AmnesiacUnlearning(repair_epochs=2)):
        step_by_step = trained
        for ids in (["r1"], ["r30", "r31"], ["r60"]):
            step_by_step = call(method, step_by_step, ids).trained
        at_once = call(method, trained, ["r1", "r30", "r31", "r60"]).trained
        assert_close(step_by_step.module.state_dict(), at_once.module.state_dict(), atol=1e-12)
        assert step_by_step.log.batches == at_once.log.batches


def test_the_log_handed_in_is_not_written_to(trained):
    before = [digest_tensors(state) for state in trained.log.checkpoints.values()]
    result = call(AmnesiacUnlearning(), trained, ["r3"]).trained
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.fill_(7.0)
    assert [digest_tensors(state) for state in trained.log.checkpoints.values()] == before
    assert all(not bool((state["head.weight"] == 7).any()) for state in result.log.checkpoints.values())


def test_a_saved_log_serves_as_well(trained, tmp_path):
    once = call(PLAIN, load(trained.save(tmp_path / "one")), ["r3"]).trained
    again = load(once.save(tmp_path / "two"))
    here = call(PLAIN, call(PLAIN, trained, ["r3"]).trained, ["r9"]).trained
    assert call(PLAIN, again, ["r9"]).trained.digest() == here.digest()


def test_a_row_whose_steps_are_all_dropped_is_not_removed_by_doing_nothing():
    model = train(replace(RECIPE, epochs=1), RECORDS, keep=ALL)
    first, mate = model.log.batches[0][:2]
    once = call(PLAIN, model, [first]).trained
    with pytest.raises(NothingChanged):
        call(PLAIN, once, [mate])
    # The repair has read it, so that there it is something to take it out.
    repaired = call(AmnesiacUnlearning(repair_epochs=1), model, [first]).trained
    both = call(AmnesiacUnlearning(repair_epochs=1), repaired, [mate]).trained
    at_once = call(AmnesiacUnlearning(repair_epochs=1), model, [first, mate]).trained
    assert_close(both.module.state_dict(), at_once.module.state_dict(), atol=1e-12)


def test_float32_sums_do_not_drift():
    """Taking one step back of 900 is exact to the last bits, whatever was summed on the way."""
    steps, last = 900, None
    coins = generator(0)
    states = {}
    for k in range(1, steps + 1):
        last = torch.randn(5, generator=coins) * 0.1 + (0 if last is None else last)
        states[k] = {"w": last}
    log = TrainingLog(
        steps=steps, rows_read=0, threads=1, batches=(("a",), *((("b",),) * (steps - 1))), checkpoints=states
    )
    new = without(log, frozenset("a"), {"w": torch.zeros(5)}, {})
    expected = (states[steps]["w"].double() - states[1]["w"].double()).float()
    assert torch.equal(new.checkpoints[steps]["w"], expected)


# The repair


def test_the_repair_reads_retained_rows_from_the_kept_updates_on(trained):
    read = []

    class Watching(Tally):
        def saw(self, records, positions, x, y):
            read.extend(records.ids[i] for i in positions.tolist())
            super().saw(records, positions, x, y)

    result = call(AmnesiacUnlearning(repair_epochs=2, batch_size=71, lr=0.1, momentum=0.0), trained, ["r3"])
    start = copy.deepcopy(trained.module)
    start.load_state_dict(call(PLAIN, trained, ["r3"]).trained.module.state_dict())
    retain = RECORDS.without(["r3"])
    for _ in range(2):
        loss = nn.functional.cross_entropy(start(retain.x), retain.y)
        for parameter, g in zip(start.parameters(), torch.autograd.grad(loss, list(start.parameters())), strict=True):
            parameter.data -= 0.1 * g
    assert_close(result.trained.module.state_dict(), start.state_dict())
    again = call(AmnesiacUnlearning(repair_epochs=2), trained, ["r3"], tally=Watching())
    assert sorted(read) == sorted(2 * list(retain.ids))
    assert again.cost.gradients == again.cost.rows_read == 2 * 71
    assert call(PLAIN, trained, ["r3"]).cost.gradients == 0


def test_replacements_are_learnt_in_the_repair(trained):
    request = Request.replace_rows(["r3"], RECORDS.x[:1] + 9, RECORDS.y[:1])
    with pytest.raises(Unsupported, match="learns no new rows"):
        PLAIN(trained, RECORDS, request, rng=generator(0))
    result = AmnesiacUnlearning(repair_epochs=1)(trained, RECORDS, request, rng=generator(0))
    assert result.cost.gradients == 72
    assert "r3" not in result.trained.ids
    new = Records(RECORDS.x[:1] + 9, RECORDS.y[:1], ["r3~2"], ["r3"], classes=4)
    later = call(AmnesiacUnlearning(), result.trained, ["r3~2"], RECORDS.without(["r3"]).plus(new)).trained
    assert_close(later.module.state_dict(), call(AmnesiacUnlearning(), trained, ["r3"]).trained.module.state_dict())


def test_a_model_pruned_at_random_stays_pruned():
    recipe = replace(RECIPE, pruning=Pruning(sparsity=0.5, by="random"))
    model = train(recipe, RECORDS, keep=ALL)
    zero = model.module.get_parameter("body.0.weight") == 0
    result = call(PLAIN, model, [f"r{i}" for i in range(30)]).trained
    assert bool((result.module.get_parameter("body.0.weight")[zero] == 0).all())
    assert all(bool((state["body.0.weight"][zero] == 0).all()) for state in result.log.checkpoints.values())


@pytest.fixture(scope="module")
def sparse(trained):
    """The model after `Pruned` with one row removed and no repair, and where it is zero."""
    after = call(Pruned(sparsity=0.5, then=PLAIN), trained, ["r3"]).trained
    return after, after.module.get_parameter("body.0.weight") == 0


def zero_in_all(log, where):
    return all(not state["body.0.weight"][where].any() for state in log.checkpoints.values())


def test_pruned_it_is_the_kept_updates_of_what_is_left_and_so_is_its_log(trained, sparse):
    after, where = sparse
    assert int(where.sum()) == 24
    dense = call(PLAIN, trained, ["r3"]).trained
    for mine, its in zip(after.log.checkpoints.values(), dense.log.checkpoints.values(), strict=True):
        wanted = {**its, "body.0.weight": its["body.0.weight"].masked_fill(where, 0)}
        assert_close(mine, wanted, atol=0)
    assert_close(after.module.state_dict(), after.log.checkpoints[after.log.steps], atol=0)
    assert not zero_in_all(dense.log, where)


def test_pruned_a_log_whose_first_step_is_dropped_begins_sparse_too(trained):
    after = call(Pruned(sparsity=0.5, then=PLAIN), trained, [trained.log.batches[0][0]]).trained
    assert after.log.batches[0] == ()
    assert zero_in_all(after.log, after.module.get_parameter("body.0.weight") == 0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_repair_of_a_pruned_model_begins_and_stays_sparse(trained, sparse, wrapped, monkeypatch):
    model, where = sparse
    seen = []
    take = Steps.take

    def watched(steps, losses, rng, after=None):
        weight = steps.module.get_parameter("body.0.weight")
        seen.append(int((weight[where] != 0).sum()))
        take(steps, losses, rng, after)
        seen.append(int((weight[where] != 0).sum()))

    monkeypatch.setattr(Steps, "take", watched)
    method = AmnesiacUnlearning(repair_epochs=1)
    if wrapped:
        result = call(Pruned(sparsity=0.5, then=method), trained, ["r3"]).trained
        assert seen == [0, 0]
    else:  # the liar: no mask, and zeros grow
        result = call(method, model, ["r9"]).trained
        assert seen[0] == 0 < seen[1]
    assert zero_in_all(result.log, where)


def test_masked_one_request_after_another_gives_what_all_at_once_would(trained, sparse):
    model, where = sparse
    first = model.log.batches[0]
    assert first
    for method in (PLAIN, AmnesiacUnlearning(repair_epochs=2)):
        twice = call(Masked(then=method), model, [first[0]]).trained
        module = copy.deepcopy(trained.module)
        with torch.no_grad():
            module.get_parameter("body.0.weight")[where] = 0
        at_once = call(Masked(then=method), replace(trained, module=module), ["r3", first[0]]).trained
        assert_close(twice.module.state_dict(), at_once.module.state_dict(), atol=1e-12)
        assert zero_in_all(twice.log, where)
    # Without its first step the model goes back to where it began: there too what is pruned is zero.
    plain = call(PLAIN, model, [first[0]]).trained
    assert zero_in_all(plain.log, where)
    assert not plain.module.get_parameter("body.0.weight")[where].any()


class Shared(nn.Module):
    """Two names for one weight."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.one, self.other = nn.Linear(shape[0], shape[0]), nn.Linear(shape[0], shape[0])
        self.other.weight = self.one.weight
        self.head = nn.Linear(shape[0], outputs)

    def forward(self, x):
        return self.head(self.other(self.one(x).tanh()).tanh())


def test_of_a_shared_weight_both_names_are_pruned():
    model = train(replace(RECIPE, model=allow_code(Shared), model_args={}), RECORDS, keep=ALL)
    after = call(Pruned(sparsity=0.5, then=PLAIN), model, ["r3"]).trained
    zero = after.module.one.weight == 0
    assert int(zero.sum()) == 18
    for state in after.log.checkpoints.values():
        assert not state["one.weight"][zero].any()
        assert torch.equal(state["one.weight"], state["other.weight"])


# Refusals


class Cumulative(nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(shape[0], momentum=None), nn.Linear(shape[0], outputs)

    def forward(self, x):
        return self.head(self.norm(x))


def test_models_without_the_log_are_refused_and_told_how_to_train(trained):
    for keep in (Keep(), Keep(batches=True), Keep(every=1), Keep(batches=True, every=2)):
        with pytest.raises(Unsupported, match=r"keep=Keep\(batches=True, every=1\).*, or use fine-tune"):
            call(PLAIN, train(RECIPE, RECORDS, keep=keep), ["r3"])
    holey = {k: state for k, state in trained.log.checkpoints.items() if k != 5}
    with pytest.raises(Unsupported, match="lacks them"):
        call(PLAIN, replace(trained, log=replace(trained.log, checkpoints=holey)), ["r3"])


def test_models_whose_beginning_is_not_known_are_refused(trained):
    elsewhere = replace(adopt(trained.module, RECIPE, RECORDS), log=trained.log)
    with pytest.raises(Unsupported, match="not known here; use fine-tune"):
        call(PLAIN, elsewhere, ["r3"])
    pruned = train(replace(RECIPE, pruning=Pruning(sparsity=0.5)), RECORDS, keep=ALL)
    with pytest.raises(Unsupported, match="pruned by magnitude"):
        call(PLAIN, pruned, ["r3"])
    averaged = train(replace(RECIPE, model=allow_code(Cumulative), model_args={}), RECORDS, keep=ALL)
    with pytest.raises(Unsupported, match="cumulative averages"):
        call(PLAIN, averaged, ["r3"])
    sharded = train(replace(RECIPE, sharding=Sharding(shards=2)), RECORDS, keep=ALL)
    with pytest.raises(Unsupported, match="use sisa or retrain"):
        call(PLAIN, sharded, ["r3"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repair_epochs": -1}, "repair_epochs must be an integer >= 0, got -1"),
        ({"repair_epochs": 1.5}, "repair_epochs must be an integer"),
        ({"repair_epochs": 0, "lr": 0.0}, "lr must be > 0, got 0"),
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(Misuse, match=message):
        AmnesiacUnlearning(**settings)


def test_it_keeps_the_contract_where_training_keeps_its_log():
    def logged(recipe, records):
        return train(recipe, records, keep=ALL)

    report = conformance(AmnesiacUnlearning(), train=logged, seeds=range(3))
    assert report.passed, report
