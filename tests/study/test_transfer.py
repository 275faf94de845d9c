"""Forgetting source classes and then learning another task: from where, with what head, and what is paired."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from expunge.audit.metrics import accuracy
from expunge.core.errors import BadRecords, Misuse, Unsupported
from expunge.core.estimate import Estimate
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records
from expunge.learn.build import build
from expunge.learn.loop import prepare
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import train
from expunge.study.transfer import Start, Transfer, learn_target, transfer
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.method import Done, Method
from expunge.unlearn.retrain import Retrain

RECIPE = Recipe(model="mlp", model_args={"hidden": [16]}, epochs=3, batch_size=64, dtype="float64")


@dataclass(frozen=True, kw_only=True)
class Destroy(Method):
    """Leaves a body that says the same of every row."""

    def _apply(self, task, *, rng):
        with torch.no_grad():
            for parameter in task.trained.module.parameters():
                parameter.fill_(-1.0)
        return Done(trained=task.trained)


@pytest.fixture(scope="module")
def tasks(optdigits):
    """Source: which digit. Target: whether it is above 4, with few rows."""

    def halves(records):
        return Records(records.x, (records.y > 4).long(), records.ids, classes=2)

    return optdigits.train, halves(optdigits.train.select(range(400))), halves(optdigits.test)


@pytest.fixture(scope="module")
def found(tasks):
    heard = []
    methods = {"exact": Retrain(), "tuned": FineTune(epochs=1), "destroyed": Destroy()}
    result = transfer(
        RECIPE, *tasks, methods, forget=(3, 8), epochs=3, seeds=(0, 1), report=lambda *said: heard.append(said)
    )
    return result, heard


def test_every_start_is_measured_for_every_seed(found):
    result, heard = found
    names = ["original", "exact", "tuned", "destroyed", "retrain", "scratch"]
    assert [[one.model for one in replica] for replica in result.replicas] == [names, names]
    assert [(seed, one.model) for seed, one in heard] == [(seed, name) for seed in (0, 1) for name in names]
    assert (result.forgotten, result.seeds, result.tune) == ((3, 8), (0, 1), "all")


def test_an_exact_method_transfers_as_retraining_and_a_destroyed_body_does_not(found):
    for replica in found[0].replicas:
        by = {one.model: one.test.value for one in replica}
        assert by["exact"] == by["retrain"]
        assert by["destroyed"] < 0.6 < by["original"]
    lines = {line["model"]: line for line in found[0].summary()}
    assert lines["exact"]["gap"].value == 0
    assert lines["destroyed"]["gap"].value < 0


def test_each_figure_is_what_its_parts_say_one_by_one(found, tasks):
    source, target, test = tasks
    removed = [i for label in (3, 8) for i in source.of_class(label).ids]
    goal = replace(RECIPE, epochs=3).completed(target)
    retrained = train(RECIPE, source.without(removed)).module
    by = {one.model: one.test for one in found[0].replicas[0]}
    assert by["retrain"] == accuracy(learn_target(retrained, goal, target), test)
    assert by["scratch"] == accuracy(train(goal, target), test)
    assert by["original"] == accuracy(learn_target(train(RECIPE, source).module, goal, target), test)


def zero_steps(target, **more):
    return replace(RECIPE, epochs=0, **more).completed(target)


def test_the_body_is_the_sources_and_the_head_is_fresh(tasks):
    source = train(replace(RECIPE, epochs=1), tasks[0]).module
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    goal = zero_steps(tasks[1])
    fresh, module = build(goal), learn_target(source, goal, tasks[1]).module
    for name, tensor in module.state_dict().items():
        from_where = fresh.state_dict() if name.startswith("head") else before
        assert torch.equal(tensor, from_where[name]), name
    assert module.head.out_features == 2
    learn_target(source, replace(RECIPE, epochs=1).completed(tasks[1]), tasks[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def test_a_probe_moves_the_head_alone(tasks):
    source = train(replace(RECIPE, epochs=1, weight_decay=0.01), tasks[0]).module
    goal = replace(RECIPE, epochs=1, weight_decay=0.01).completed(tasks[1])
    probe, whole = (learn_target(source, goal, tasks[1], tune=tune).module for tune in ("head", "all"))
    for name, tensor in source.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(probe.state_dict()[name], tensor)
            assert not torch.equal(whole.state_dict()[name], tensor)
    assert not torch.equal(probe.head.weight, learn_target(source, zero_steps(tasks[1]), tasks[1]).module.head.weight)
    random_body = learn_target(None, goal, tasks[1], tune="head").module
    assert torch.equal(next(random_body.parameters()), next(build(goal).parameters()))


def test_a_probe_leaves_batch_statistics_as_they_are_and_reads_the_body_by_them(tasks):
    batch = replace(RECIPE, epochs=1, model_args={"hidden": [16], "norm": "batch"})
    source = train(batch, tasks[0]).module
    goal = replace(batch, batch_size=len(tasks[1])).completed(tasks[1])
    probe, whole = (learn_target(source, goal, tasks[1], tune=tune) for tune in ("head", "all"))
    body = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head")}
    moving = [name for name in body if "running" in name or "tracked" in name]
    assert len(moving) == 3
    assert all(torch.equal(probe.module.state_dict()[name], tensor) for name, tensor in body.items())
    assert not any(torch.equal(whole.module.state_dict()[name], body[name]) for name in moving)
    before = learn_target(source, replace(goal, epochs=0), tasks[1], tune="head").module.eval()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(before(prepare(tasks[1].x, torch.float64)), tasks[1].y)
    assert probe.log.losses[0] == pytest.approx(float(loss), abs=1e-9)  # one step: of the body as it will be used
    assert whole.log.losses[0] != pytest.approx(float(loss), abs=1e-4)


def test_pruned_weights_stay_pruned_on_the_way(tasks):
    pruned = replace(RECIPE, pruning=Pruning(sparsity=0.8, by="random", rewind=0))
    source = train(pruned, tasks[0]).module
    after = learn_target(source, replace(pruned, epochs=2).completed(tasks[1]), tasks[1]).module
    for parameter, moves in mask_of_zeros(source).parameters(after):
        assert not parameter[~moves].any()
        assert parameter[moves].all()


def test_rewinding_is_cut_to_the_targets_epochs(tasks):
    recipe = replace(RECIPE, pruning=Pruning(sparsity=0.5, rewind=3))
    result = transfer(recipe, *tasks, {}, forget=(1,), epochs=1, seeds=(0, 1))
    assert len(result.replicas[0]) == 3


def test_zeros_that_no_pruning_made_may_move(tasks):
    source = train(replace(RECIPE, epochs=1), tasks[0]).module
    with torch.no_grad():
        next(source.parameters())[:4] = 0
    after = learn_target(source, replace(RECIPE, epochs=1).completed(tasks[1]), tasks[1]).module
    assert next(after.parameters())[:4].any()


def test_a_head_alone_has_nothing_to_carry_over(tasks):
    softmax = replace(RECIPE, model="softmax", model_args={}, epochs=0)
    with pytest.raises(Unsupported, match="is its head alone"):
        learn_target(train(softmax, tasks[0]).module, softmax.completed(tasks[1]), tasks[1])


def test_a_source_of_another_architecture_is_refused(tasks):
    wide = train(replace(RECIPE, model_args={"hidden": [17]}, epochs=0), tasks[0]).module
    with pytest.raises(Misuse, match="another architecture"):
        learn_target(wide, zero_steps(tasks[1]), tasks[1])


def by_hand():
    def replica(seed, tuned):
        values = {"original": 0.8, "tuned": tuned, "retrain": 0.7 + seed / 10, "scratch": 0.5}
        return tuple(Start(model=n, test=Estimate(v, 0.0, 1.0, 9), seconds=1.0) for n, v in values.items())

    return Transfer(forgotten=(1,), tune="all", seeds=(0, 1), replicas=(replica(0, 0.65), replica(1, 0.75)))


def test_differences_are_paired_by_seed():
    lines = {line["model"]: line for line in by_hand().summary()}
    gap = lines["tuned"]["gap"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.05, -0.05, -0.05))
    assert lines["tuned"]["gain"].value == pytest.approx(0.2)
    assert lines["scratch"]["gain"].value == 0
    assert lines["tuned"]["seeds"] == 2


def test_json_is_plain(found):
    data = json.loads(json.dumps(found[0].to_json(), allow_nan=False))
    assert data["forgotten"] == [3, 8]
    assert data["replicas"][0][0]["test"]["n"] > 1000
    assert [line["model"] for line in data["summary"]][-1] == "scratch"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": (0,)}, "two different seeds"),
        ({"seeds": (2, 2)}, "two different seeds"),
        ({"forget": ()}, "and a class"),
        ({"methods": {"scratch": Retrain()}}, 'may not be called "scratch"'),
    ],
)
def test_what_cannot_be_studied_is_refused(tasks, settings, message):
    given = {"methods": {}, "forget": (1,), "seeds": (0, 1), **settings}
    with pytest.raises(Misuse, match=message):
        transfer(RECIPE, *tasks, given.pop("methods"), **given)


def test_rows_of_another_shape_are_refused(tasks):
    flat = Records(tasks[1].x.flatten(1), tasks[1].y, classes=2)
    with pytest.raises(BadRecords, match="source rows are"):
        transfer(RECIPE, tasks[0], flat, flat, {}, forget=(1,))
