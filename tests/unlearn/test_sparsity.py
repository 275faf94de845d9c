"""Prune first and then unlearn; zeros held whatever the recipe says; retraining under a mask that saw too much."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Mask
from expunge.core.protocols import Need
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.build import build
from expunge.learn.loop import Tally, fit
from expunge.learn.pruning import magnitude_mask, mask_of_zeros, prunable, synflow_mask
from expunge.learn.training import adopt, train
from expunge.testing import Case, conformance, digits
from expunge.unlearn.ascent import GradientAscent
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.random_labels import RandomLabels
from expunge.unlearn.retrain import Retrain, RetrainBriefly
from expunge.unlearn.sisa import Sisa
from expunge.unlearn.sparsity import (
    CRITERIA,
    Magnitude,
    Masked,
    Pruned,
    RandomScores,
    RetrainSameMask,
    SynFlow,
)


def rows(n=96, classes=4):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 6).double()
    return Records(x, y, [f"r{i}" for i in range(n)], [f"o{i % 12}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(
    model="mlp", model_args={"hidden": (8, 6)}, epochs=4, batch_size=16, weight_decay=1e-2, dtype="float64", seed=3
)
PRUNABLE = 6 * 8 + 8 * 6
FORGET = [f"r{i}" for i in range(0, 40, 4)]
REQUEST = Request.remove(FORGET)
NEXT = Request.remove(["r1", "r2"])


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


def pruned(trained, sparsity=0.75):
    """A model pruned by hand, whose recipe knows nothing of it."""
    module = copy.deepcopy(trained.module)
    magnitude_mask(module, sparsity).prune_(module)
    return replace(trained, module=module)


def zeros(module):
    return {name: ~moves for name, moves in mask_of_zeros(module).moves.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plus_zero(module, where):
    state = module.state_dict()
    return all(bool((state[n][z] == 0).all()) and not bool(state[n][z].signbit().any()) for n, z in where.items())


def call(method, trained, request=REQUEST, seed=0):
    return method(trained, RECORDS, request, rng=generator(seed))


# Pruned


def test_one_step_after_pruning_by_hand(trained):
    """theta' = mask * (mask * theta - lr * (gradient at mask * theta + decay * mask * theta)); biases and head free."""
    sparse = pruned(trained)
    retain = RECORDS.without(FORGET)
    loss = nn.functional.cross_entropy(sparse.module(retain.x), retain.y)
    parameters = dict(sparse.module.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()))
    method = Pruned(sparsity=0.75, then=FineTune(lr=0.1, momentum=0.0, epochs=1, batch_size=len(RECORDS)))
    after = call(method, trained).trained.module.state_dict()
    masks = mask_of_zeros(sparse.module).moves
    for (name, theta), grad in zip(parameters.items(), grads, strict=True):
        want = theta.detach() - 0.1 * (grad + 1e-2 * theta.detach())
        torch.testing.assert_close(after[name], want * masks.get(name, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("by", [Magnitude(), SynFlow(iterations=20), RandomScores()])
@pytest.mark.parametrize("then", [FineTune(), GradientAscent(lr=0.1), RandomLabels(), RetrainBriefly(steps=5)])
def test_pruned_weights_are_plus_zero_and_counted_exactly(trained, by, then):
    before = copy.deepcopy(trained.module.state_dict())
    result = call(Pruned(sparsity=0.6, by=by, then=then), trained)
    assert mask_of_zeros(result.trained.module).held == round(0.6 * PRUNABLE)
    assert plus_zero(result.trained.module, zeros(result.trained.module))
    assert same(trained.module.state_dict(), before)
    assert (result.claim, result.trained.standing, result.exactness) == (Claim.NONE, Claim.NONE, None)
    assert result.trained.recipe == trained.recipe
    assert result.events[-1].method == f"pruned-{then.name}"


def test_each_criterion_finds_its_own_mask_at_the_trained_weights(trained):
    found = {
        word: zeros(call(Pruned(sparsity=0.6, by=kind()), trained).trained.module) for word, kind in CRITERIA.items()
    }
    by_hand = {
        "magnitude": magnitude_mask(trained.module, 0.6).moves,
        "synflow": synflow_mask(trained.module, (6,), 0.6, 100).moves,
    }
    for word, moves in by_hand.items():
        assert same({name: ~one for name, one in found[word].items()}, moves)
    assert not any(same(found[a], found[b]) for a, b in (("magnitude", "synflow"), ("random", "magnitude")))
    other = zeros(call(Pruned(sparsity=0.6, by=RandomScores()), trained, seed=1).trained.module)
    assert not same(other, found["random"])


@pytest.mark.parametrize("by", [Magnitude(), SynFlow(iterations=20), RandomScores()])
def test_the_next_request_keeps_the_mask_and_never_brings_a_weight_back(trained, by):
    once = call(Pruned(sparsity=0.6, by=by), trained).trained
    for again in (Pruned(sparsity=0.6, by=by), Pruned(sparsity=0.3, by=by), Masked()):
        after = call(again, once, NEXT, seed=7).trained
        assert same(zeros(after.module), zeros(once.module))
    more = zeros(call(Pruned(sparsity=0.7, by=by), once, NEXT).trained.module)
    assert sum(int(one.sum()) for one in more.values()) == round(0.7 * PRUNABLE)
    assert all(bool(more[name][zero].all()) for name, zero in zeros(once.module).items())
    # The liar: the recipe is dense, so that a method by itself lets the zeros of all that is not dead grow.
    assert mask_of_zeros(call(FineTune(), once, NEXT).trained.module).held < round(0.6 * PRUNABLE) / 2


def test_pruning_a_model_that_its_recipe_prunes_already(trained):
    sparse = train(replace(RECIPE, pruning=Pruning(sparsity=0.5)), RECORDS)
    for sparsity, held in ((0.3, 0.5), (0.8, 0.8)):
        after = call(Pruned(sparsity=sparsity), sparse).trained.module
        assert mask_of_zeros(after).held == round(held * PRUNABLE)
        assert all(bool(zeros(after)[name][zero].all()) for name, zero in zeros(sparse.module).items())


def test_what_is_said_of_it_comes_of_its_parts():
    method = Pruned(then=GradientAscent())
    assert method.name == "pruned-gradient-ascent"
    assert method.needs == frozenset({Need.FORGET})
    assert method.source == "Jia et al., 2023; Thudi et al., 2022; Graves et al., 2021"
    assert method.not_guaranteed.startswith("that the mask knows nothing of the removed rows, nor that the result")
    assert Pruned().needs == frozenset({Need.RETAIN})
    assert Masked(then=GradientAscent()).needs == frozenset({Need.FORGET})
    assert Masked().source == FineTune().source
    assert Masked(then=RandomLabels()).name == "masked-random-labels"
    assert RetrainSameMask().name == "retrain-same-mask"
    assert (Pruned.claim, Masked.claim, RetrainSameMask.claim) == (Claim.NONE,) * 3
    assert len({Pruned(), Pruned(), Pruned(by=SynFlow()), Pruned(then=FineTune(lr=0.1)), Masked()}) == 4
    assert replace(method, then=FineTune()).needs == frozenset({Need.RETAIN})


@pytest.mark.parametrize("then", [Retrain(), Retrain(coins="fresh"), Sisa()])
def test_exact_methods_are_not_wrapped(then):
    with pytest.raises(Misuse, match=r"claims nothing, got .*, whose exact claim .* give the recipe pruning, and use"):
        Pruned(then=then)
    with pytest.raises(Misuse, match=r"exact claim does not outlive a mask; an exact method keeps a recipe's pruning"):
        Masked(then=then)


@dataclass(frozen=True, kw_only=True)
class Certified(FineTune):
    claim = Claim.CERTIFIED


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(Misuse, match="whose certified claim does not outlive a mask"):
        Pruned(then=Certified())
    for wrong in (0, 1, -0.5, float("nan"), True):
        with pytest.raises(Misuse, match=rf"^sparsity must be > 0 and < 1, got {wrong}$"):
            Pruned(sparsity=wrong)
    for wrong in ("magnitude", None, SynFlow):
        with pytest.raises(Misuse, match=r"^by must be Magnitude\(\), SynFlow\(\) or RandomScores\(\), got "):
            Pruned(by=wrong)
    for kind in (Pruned, Masked):
        for wrong in ("fine-tune", FineTune, None):
            with pytest.raises(Misuse, match=r"^then must be a method, such as FineTune\(\), got "):
                kind(then=wrong)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(Misuse, match=rf"^iterations must be an integer >= 1, got {wrong}$"):
            SynFlow(iterations=wrong)


def test_models_that_cannot_be_pruned_or_are_not_are_refused(trained):
    head_alone = train(replace(RECIPE, model="softmax", model_args={}), RECORDS)
    shards = train(replace(RECIPE, sharding=Sharding(shards=2)), RECORDS)
    sparse_elsewhere = adopt(pruned(trained).module, RECIPE, RECORDS)
    regression = replace(trained, recipe=replace(trained.recipe, loss="mse"))
    cases = [
        (Pruned(), head_alone, r"^there is nothing to prune"),
        (Masked(), head_alone, r"^there is nothing to prune"),
        (RetrainSameMask(), head_alone, r"^there is nothing to prune"),
        (Pruned(), shards, r"^pruned-fine-tune changes one model, and this one has 2 shards"),
        (Masked(), shards, r"^masked-fine-tune changes one model"),
        (RetrainSameMask(), shards, r"^retrain-same-mask changes one model"),
        (Pruned(then=RandomLabels()), regression, r"^random-labels needs classes"),
        (Masked(then=RandomLabels()), regression, r"^random-labels needs classes"),
        (Masked(), trained, r"^masked-fine-tune is for pruned models, and no .* is zero; use fine-tune$"),
        (RetrainSameMask(), trained, r"^retrain-same-mask is for pruned models, .*; use retrain$"),
        (RetrainSameMask(), sparse_elsewhere, r"^retrain-same-mask trains from the beginning, .* masked-fine-tune$"),
        (Pruned(then=RetrainBriefly()), sparse_elsewhere, r"^retrain-briefly trains from the beginning"),
    ]
    for method, model, why in cases:
        with pytest.raises(Unsupported, match=why):
            call(method, model)
    assert Masked().supports(sparse_elsewhere) is None
    assert Pruned(by=SynFlow()).supports(sparse_elsewhere) is None


def test_nothing_is_drawn_from_the_generator_and_rounds_of_synflow_are_those_asked_for(trained):
    rng = generator(0)
    before = rng.get_state()
    Pruned(by=RandomScores())(trained, RECORDS, REQUEST, rng=rng)
    assert torch.equal(rng.get_state(), before)
    for iterations in (1, 50):
        want = synflow_mask(trained.module, (6,), 0.6, iterations)
        found = zeros(call(Pruned(sparsity=0.6, by=SynFlow(iterations=iterations)), trained).trained.module)
        assert same({name: ~one for name, one in found.items()}, want.moves)


# Masked


@pytest.mark.parametrize("then", [FineTune(), GradientAscent(lr=0.1), RandomLabels(), RetrainBriefly(steps=5)])
def test_zeros_stay_zero_whatever_the_recipe_says(trained, then):
    sparse = pruned(trained)
    before = zeros(sparse.module)
    after = call(Masked(then=then), sparse).trained.module
    assert plus_zero(after, before)
    assert same(zeros(after), before)
    liar = call(then, sparse).trained.module  # without it, they move
    assert not plus_zero(liar, before)


def test_masked_is_what_the_method_does_in_a_model_whose_recipe_is_pruned(trained):
    sparse = pruned(trained)
    told = replace(sparse, recipe=replace(sparse.recipe, pruning=Pruning(sparsity=0.75)))
    for then in (FineTune(), GradientAscent(lr=0.1), RandomLabels()):
        assert call(Masked(then=then), sparse).trained.digest() == call(then, told).trained.digest()


@dataclass(frozen=True, kw_only=True)
class Rude(Method):
    """Writes everywhere, mask or no mask."""

    def _apply(self, task, *, rng):
        with torch.no_grad():
            for parameter in task.trained.module.parameters():
                parameter += 1
        return Done(trained=task.trained)


@pytest.mark.parametrize("method", [Masked(then=Rude()), Pruned(sparsity=0.75, then=Rude())])
def test_a_method_that_moves_zeros_has_them_put_back(trained, method):
    sparse = pruned(trained)
    after = call(method, sparse).trained.module
    where = zeros(sparse.module)
    assert plus_zero(after, where)
    for name, weight in prunable(after).items():
        torch.testing.assert_close(weight[~where[name]], prunable(sparse.module)[name][~where[name]] + 1)


def test_the_base_puts_zeros_back_in_a_model_whose_recipe_is_pruned():
    sparse = train(replace(RECIPE, pruning=Pruning(sparsity=0.75)), RECORDS)
    after = call(Rude(), sparse).trained.module
    assert plus_zero(after, zeros(sparse.module))
    assert same(zeros(after), zeros(sparse.module))


def test_what_another_mask_holds_is_held_too_and_not_made_zero(trained):
    sparse = pruned(trained)
    module = copy.deepcopy(sparse.module)
    other = Mask({"head.weight": torch.zeros_like(module.head.weight, dtype=torch.bool)})
    task = Task(
        trained=replace(sparse, module=module),
        forget=RECORDS.take(FORGET),
        retain=RECORDS.without(FORGET),
        tally=Tally(),
        moves=other,
    )
    Masked()._apply(task, rng=generator(0))
    assert torch.equal(module.head.weight, sparse.module.head.weight)
    assert same(zeros(module), zeros(sparse.module))
    assert not torch.equal(module.head.bias, sparse.module.head.bias)


# Retraining with the same mask


def test_retraining_with_the_same_mask_is_the_training_written_out(trained):
    sparse = pruned(trained)
    result = call(RetrainSameMask(), sparse)
    module, mask = build(trained.recipe), mask_of_zeros(sparse.module)
    mask.prune_(module)
    fit(module, trained.recipe, RECORDS.without(FORGET), mask=mask)
    assert same(result.trained.module.state_dict(), module.state_dict())
    assert same(zeros(result.trained.module), zeros(sparse.module))
    assert plus_zero(result.trained.module, zeros(sparse.module))
    assert result.cost.gradients == 4 * 86
    assert (result.claim, result.trained.standing, result.trained.log) == (Claim.NONE, Claim.NONE, None)


@pytest.mark.parametrize("by", ["magnitude", "synflow", "random"])
def test_the_same_mask_is_that_of_retraining_only_where_it_was_found_without_rows(by):
    sparse = train(replace(RECIPE, pruning=Pruning(sparsity=0.75, by=by)), RECORDS)
    reused, anew = call(RetrainSameMask(), sparse), call(Retrain(), sparse)
    assert same(zeros(reused.trained.module), zeros(sparse.module))
    equal = by != "magnitude"
    assert same(zeros(anew.trained.module), zeros(sparse.module)) == equal
    assert (reused.trained.digest() == anew.trained.digest()) == equal
    assert (reused.claim, anew.claim) == (Claim.NONE, Claim.EXACT)
    # Nothing is exact that came of a mask with a memory, until it is retrained.
    healed = call(Retrain(), reused.trained, NEXT)
    assert healed.claim is Claim.EXACT
    assert healed.trained.digest() == train(sparse.recipe, RECORDS.without([*FORGET, "r1", "r2"])).digest()


# Conformance


def sparse_train(recipe, records):
    """The system of somebody whose recipes know nothing of pruning."""
    made = train(recipe, records)
    if not made.parts:
        magnitude_mask(made.module, 0.8).prune_(made.module)
    return made


@pytest.mark.parametrize("method", [Pruned(), Pruned(by=SynFlow()), Pruned(sparsity=0.5)])
def test_pruned_keeps_to_the_contract(method):
    report = conformance(method)
    assert report.passed, report


@pytest.mark.parametrize("method", [Masked(), Masked(then=GradientAscent()), RetrainSameMask()])
def test_methods_of_pruned_models_keep_to_the_contract(method):
    given = digits()
    recipes = (replace(given.recipes[0], epochs=15),)
    case = Case(records=given.records, test=given.test, request=given.request, recipes=recipes)
    report = conformance(method, case=case, train=sparse_train)
    assert report.passed, report


def test_pruning_at_random_is_worse_than_standing_still():
    """So that the check above says something: 95 % taken at random is not mended by two epochs."""
    report = conformance(Pruned(by=RandomScores()))
    assert report.failed == ("nearer-than-standing-still",)
