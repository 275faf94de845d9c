import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import EmptyRetain, Misuse, NothingChanged, Unsupported
from expunge.core.events import AlreadyRemoved, Removed, Replaced, Retrained
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.build import build
from expunge.learn.loop import Tally, fit
from expunge.learn.training import adopt, train
from expunge.unlearn import (
    BadTeacher,
    BoundaryShrink,
    FineTune,
    FisherForgetting,
    GradientAscent,
    NegGradPlus,
    Pruned,
    RandomLabels,
    Retrain,
    RetrainBriefly,
    SaliencyMasked,
    Scrub,
    SelectiveSynapticDampening,
    Sisa,
)
from expunge.unlearn.random_labels import wrong_labels

APPROXIMATE = (FineTune(), GradientAscent(), NegGradPlus(), RandomLabels())


def rows(n=96, classes=4, dtype=torch.float64, owners=12):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))).to(dtype) + nn.functional.one_hot(y, 10)[:, :6].to(dtype)
    return Records(x, y, [f"r{i}" for i in range(n)], [f"o{i % owners}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(
    model="mlp", model_args={"hidden": (8,)}, epochs=4, batch_size=16, weight_decay=1e-3, dtype="float64", seed=3
)
SHARDED = replace(RECIPE, sharding=Sharding(shards=3, slices=2))
FORGET = [f"r{i}" for i in range(0, 40, 4)]


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


@pytest.fixture(scope="module")
def sharded():
    return train(SHARDED, RECORDS)


def vector(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def gradient(module, records):
    module = copy.deepcopy(module)
    loss = nn.functional.cross_entropy(module(records.x), records.y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def forget_and_retain(records=RECORDS, ids=FORGET):
    return records.take(ids), records.without(ids)


# Oracles


def test_one_ascent_step_is_minus_a_fine_tuning_step_on_the_same_rows():
    plain = train(replace(RECIPE, weight_decay=0.0), RECORDS)
    others = [i for i in RECORDS.ids if i not in FORGET]
    pace = {"lr": 0.1, "momentum": 0.0, "epochs": 1, "batch_size": len(RECORDS)}
    up = GradientAscent(**pace)(plain, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    down = FineTune(**pace)(plain, RECORDS, Request.remove(others), rng=generator(0)).trained
    start = vector(plain.module)
    torch.testing.assert_close(vector(up.module) - start, start - vector(down.module), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        vector(up.module) - start, 0.1 * gradient(plain.module, RECORDS.take(FORGET)), rtol=0, atol=1e-14
    )


def test_ascent_has_no_weight_decay_of_its_own(trained):
    up = GradientAscent(lr=0.1, batch_size=96)(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    moved = vector(up.module) - vector(trained.module)
    torch.testing.assert_close(moved, 0.1 * gradient(trained.module, RECORDS.take(FORGET)), rtol=0, atol=1e-14)


def test_a_fine_tuning_step_goes_down_the_recipes_objective(trained):
    method = FineTune(lr=0.2, momentum=0.0, epochs=1, batch_size=96)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    start, (_, retain) = vector(trained.module), forget_and_retain()
    expected = start - 0.2 * (gradient(trained.module, retain) + 1e-3 * start)
    torch.testing.assert_close(vector(after.module), expected, rtol=0, atol=1e-14)


def test_a_neg_grad_plus_step_is_the_weighted_difference_of_gradients(trained):
    method = NegGradPlus(lr=0.2, momentum=0.0, weight=0.7, epochs=1, batch_size=96)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    start, (forget, retain) = vector(trained.module), forget_and_retain()
    direction = 0.7 * gradient(trained.module, retain) - 0.3 * gradient(trained.module, forget) + 1e-3 * start
    torch.testing.assert_close(vector(after.module), start - 0.2 * direction, rtol=0, atol=1e-14)


def test_a_random_labels_step_adds_the_gradient_of_wrong_labels(trained):
    method = RandomLabels(lr=0.2, momentum=0.0, weight=0.5, epochs=1, batch_size=96)
    after = method(trained, RECORDS, Request.remove(FORGET), rng=generator(4)).trained
    start, (forget, retain) = vector(trained.module), forget_and_retain()
    wrong = Records(forget.x, wrong_labels(forget, 4, generator(4)), classes=4)
    direction = gradient(trained.module, retain) + 0.5 * gradient(trained.module, wrong) + 1e-3 * start
    torch.testing.assert_close(vector(after.module), start - 0.2 * direction, rtol=0, atol=1e-14)


def test_wrong_labels_are_never_right_and_uniform_among_the_others():
    many = rows(n=5000, classes=10)
    shift = (wrong_labels(many, 10, generator(1)) - many.y) % 10
    assert int(shift.min()) >= 1
    assert stats.chisquare(torch.bincount(shift, minlength=10)[1:].numpy()).pvalue > 1e-3
    assert not torch.equal(wrong_labels(many, 10, generator(1)), wrong_labels(many, 10, generator(2)))


def test_wrong_labels_belong_to_rows_and_not_to_positions():
    whole = dict(zip(RECORDS.ids, wrong_labels(RECORDS, 4, generator(1)).tolist(), strict=True))
    some = RECORDS.select(torch.arange(95, 10, -2))
    assert wrong_labels(some, 4, generator(1)).tolist() == [whole[i] for i in some.ids]


def test_two_classes_leave_one_wrong_label():
    two = rows(classes=2)
    assert torch.equal(wrong_labels(two, 2, generator(0)), 1 - two.y)


# Retraining


def test_retrain_with_the_same_coins_is_training_without_the_rows(trained):
    result = Retrain()(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert (result.claim, result.exactness) == (Claim.EXACT, "pathwise")
    assert result.trained.digest() == train(RECIPE, RECORDS.without(FORGET)).digest()


def test_retrain_with_fresh_coins_is_training_with_the_seed_that_it_reports(trained):
    runs = [Retrain(coins="fresh")(trained, RECORDS, Request.remove(FORGET), rng=generator(k)) for k in (0, 0, 1)]
    seeds = [run.trained.recipe.seed for run in runs]
    assert seeds[0] == seeds[1] != seeds[2]
    assert RECIPE.seed not in seeds
    assert {run.exactness for run in runs} == {"in law"}
    scratch = train(replace(RECIPE, seed=seeds[0]), RECORDS.without(FORGET))
    assert runs[0].trained.digest() == scratch.digest()


def test_retrain_briefly_is_the_start_of_a_retraining(trained):
    result = RetrainBriefly(steps=7)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    module = build(trained.recipe)
    fit(module, trained.recipe, RECORDS.without(FORGET), steps=7)
    torch.testing.assert_close(vector(result.trained.module), vector(module), rtol=0, atol=0)
    assert result.claim is Claim.NONE
    # 86 rows in batches of 16: five full ones and one of 6, then one more full one.
    assert result.cost.gradients == result.cost.rows_read == 86 + 16


@pytest.mark.parametrize("method", [Retrain(), Retrain(coins="fresh"), Sisa()])
def test_replacing_rows_equals_training_on_the_new_set(method, trained, sharded):
    model = sharded if isinstance(method, Sisa) else trained
    x, y = RECORDS.take(FORGET).x + 0.5, (RECORDS.take(FORGET).y + 1) % 4
    result = method(model, RECORDS, Request.replace_rows(FORGET, x, y), rng=generator(0))
    old = RECORDS.take(FORGET)
    new = Records(x, y, [f"{name}~2" for name in FORGET], old.owners, classes=4)
    scratch = train(result.trained.recipe, RECORDS.without(FORGET).plus(new))
    assert result.trained.digest() == scratch.digest()
    assert result.trained.ids == scratch.ids
    assert result.trained.gone == frozenset(FORGET)
    assert Replaced(rows=len(FORGET)) in result.events


BLIND = {
    "gradient-ascent": GradientAscent(),
    "boundary-shrink": BoundaryShrink(),
    "bad-teacher": BadTeacher(),
    "fisher-forgetting": FisherForgetting(),
    "dampening": SelectiveSynapticDampening(),
    "saliency-masked": SaliencyMasked(then=GradientAscent()),
    "pruned": Pruned(sparsity=0.5, then=GradientAscent()),
    "neg-grad-plus without retained rows": NegGradPlus(weight=0.0),
    "scrub without labels": Scrub(gamma=0.0),
    "retrain-briefly, too briefly": RetrainBriefly(steps=5),
}


@pytest.mark.parametrize("method", BLIND.values(), ids=BLIND)
def test_a_method_that_would_not_learn_the_new_rows_refuses_to_replace_any(method, trained):
    x, y = RECORDS.take(FORGET).x + 0.5, (RECORDS.take(FORGET).y + 1) % 4
    was = trained.digest()
    with pytest.raises(Unsupported, match=r"replacement.*use (fine-tune or )?retrain"):
        method(trained, RECORDS, Request.replace_rows(FORGET, x, y), rng=generator(0))
    assert trained.digest() == was
    tally = Tally()
    with pytest.raises(Unsupported):
        method(trained, RECORDS, Request.replace_rows(FORGET, x, y), rng=generator(0), tally=tally)
    assert (tally.gradients, tally.rows_read) == (0, 0)
    after = Retrain()(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    again = method(after, RECORDS, Request.replace_rows(FORGET, x, y), rng=generator(0))
    assert again.trained is after  # they are gone: nothing comes in their stead, and nothing is lost


# Sisa


def test_sisa_retrains_touched_shards_only_and_equals_scratch(sharded):
    owner = "o5"
    result = Sisa()(sharded, RECORDS, Request.remove_owner(owner), rng=generator(0))
    sharding = sharded.recipe.sharding
    touched = sharding.shard_of(owner)
    retrained = [event for event in result.events if isinstance(event, Retrained)]
    assert [(event.part, event.from_slice) for event in retrained] == [(touched, sharding.slice_of(owner))]
    for index, (old, new) in enumerate(zip(sharded.parts, result.trained.parts, strict=True)):
        assert (old is new) == (index != touched)
    left = RECORDS.where(lambda _, whose: whose != owner)
    assert result.trained.digest() == train(SHARDED, left).digest()
    full = Retrain()(sharded, RECORDS, Request.remove_owner(owner), rng=generator(0))
    assert 0 < result.cost.gradients < full.cost.gradients


def test_sisa_over_a_stream_equals_scratch_each_time(sharded):
    model, gone = sharded, set()
    for owner in ("o1", "o7", "o2", "o9"):
        model = Sisa()(model, RECORDS, Request.remove_owner(owner), rng=generator(0)).trained
        gone.add(owner)
        assert model.digest() == train(SHARDED, RECORDS.where(lambda _, whose: whose not in gone)).digest()


def test_sisa_refuses_models_without_clean_shards(trained, sharded):
    tainted = replace(sharded, standing=Claim.NONE)
    with pytest.raises(Unsupported, match="no longer the trained ones; use retrain"):
        Sisa()(tainted, RECORDS, Request.remove(FORGET), rng=generator(0))
    with pytest.raises(Unsupported, match="this one is whole; use retrain"):
        Sisa()(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    healed = Retrain()(tainted, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    assert healed.standing is Claim.EXACT
    assert Sisa().supports(healed) is None


# What all have in common


@pytest.mark.parametrize("method", [*APPROXIMATE, RetrainBriefly()])
def test_methods_of_one_model_refuse_shards_and_name_one_that_can(method, sharded):
    with pytest.raises(Unsupported, match="3 shards; use sisa or retrain"):
        method(sharded, RECORDS, Request.remove(FORGET), rng=generator(0))


@pytest.mark.parametrize("method", [Retrain(), RetrainBriefly()])
def test_methods_that_begin_anew_refuse_models_trained_elsewhere(method, trained):
    elsewhere = adopt(trained.module, RECIPE, RECORDS)
    with pytest.raises(Unsupported, match="use fine-tune"):
        method(elsewhere, RECORDS, Request.remove(FORGET), rng=generator(0))


@pytest.mark.parametrize("method", APPROXIMATE)
def test_other_methods_work_on_models_trained_elsewhere(method, trained):
    elsewhere = adopt(copy.deepcopy(trained.module), RECIPE, RECORDS)
    here = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    there = method(elsewhere, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert here.trained.digest() == there.trained.digest()


def test_random_labels_refuse_regression():
    targets = Records(RECORDS.x, RECORDS.x[:, 0])
    model = train(replace(RECIPE, loss="mse"), targets)
    with pytest.raises(Unsupported, match="needs classes"):
        RandomLabels()(model, targets, Request.remove(["0"]), rng=generator(0))


@pytest.mark.parametrize("method", [FineTune(), GradientAscent(), NegGradPlus(), RetrainBriefly(), Retrain()])
def test_regression_works(method):
    targets = Records(RECORDS.x, RECORDS.x[:, 0])
    model = train(replace(RECIPE, loss="mse"), targets)
    result = method(model, targets, Request.remove(["0", "1"]), rng=generator(0))
    assert result.trained.digest() != model.digest()


@pytest.mark.parametrize("method", APPROXIMATE)
def test_batch_statistics_do_not_move(method):
    recipe = replace(RECIPE, model_args={"hidden": (8,), "norm": "batch"})
    model = train(recipe, RECORDS)
    before = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    assert before
    after = method(model, RECORDS, Request.remove(FORGET), rng=generator(0)).trained.module
    for name, buffer in after.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert not any(part.training for part in after.modules())


@pytest.mark.parametrize("method", APPROXIMATE)
def test_settings_that_do_nothing_or_too_much_raise(method, trained):
    with pytest.raises(Misuse, match="lr must be > 0, got 0"):
        replace(method, lr=0.0)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    with pytest.raises(NothingChanged, match="removes nothing"):
        replace(method, lr=1e-300)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    with pytest.raises(Misuse, match="no longer finite"):
        replace(method, lr=1e200, epochs=3)(trained, RECORDS, Request.remove(FORGET), rng=generator(0))


@pytest.mark.parametrize("method", [*APPROXIMATE, Retrain(), RetrainBriefly()])
def test_nothing_can_be_left_to_train_on(method, trained):
    with pytest.raises(EmptyRetain, match="retire the model"):
        method(trained, RECORDS, Request.remove(RECORDS.ids), rng=generator(0))


EXPECTED_GRADIENTS = {
    "fine-tune": 2 * 86,
    "gradient-ascent": 10,
    # Six steps; the forget rows are read in one batch of 10 at each.
    "neg-grad-plus": 86 + 6 * 10,
    "random-labels": 86 + 6 * 10,
    "retrain": 4 * 86,
}


@pytest.mark.parametrize("method", [*APPROXIMATE, Retrain()])
def test_cost_and_events_are_booked(method, trained):
    result = method(trained, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert result.cost.gradients == result.cost.rows_read == EXPECTED_GRADIENTS[method.name]
    assert result.cost.seconds > 0
    removed = Removed(method=method.name, claim=result.claim.value, rows=len(FORGET))
    if isinstance(method, Retrain):
        assert result.events == (Retrained(part=-1, rows=86), removed)
    else:
        assert result.events == (removed,)
        assert result.trained.log is None


def test_rows_that_are_gone_are_noted_and_not_removed_twice(trained):
    once = Retrain()(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    again = Retrain()(once, RECORDS, Request.remove([*FORGET[:3], "r1"]), rng=generator(0))
    assert again.events[0] == AlreadyRemoved(rows=3)
    assert again.events[-1] == Removed(method="retrain", claim="exact", rows=1)
    assert again.trained.gone == frozenset([*FORGET, "r1"])
    nothing = FineTune()(once, RECORDS, Request.remove(FORGET), rng=generator(0))
    assert nothing.trained is once
    assert nothing.claim is Claim.NONE
    assert nothing.events == (AlreadyRemoved(rows=len(FORGET)),)


def test_a_composition_stands_as_its_weakest_step_until_it_is_retrained(trained):
    tuned = FineTune()(trained, RECORDS, Request.remove(FORGET), rng=generator(0)).trained
    assert tuned.standing is Claim.NONE
    # Asked for nothing, an exact method does not call a tainted model exact.
    assert Retrain()(tuned, RECORDS, Request.remove(()), rng=generator(0)).claim is Claim.NONE
    again = GradientAscent()(tuned, RECORDS, Request.remove(["r1"]), rng=generator(0)).trained
    assert again.standing is Claim.NONE
    healed = Retrain()(again, RECORDS, Request.remove(["r2"]), rng=generator(0))
    assert (healed.claim, healed.trained.standing) == (Claim.EXACT, Claim.EXACT)
    assert healed.trained.gone == frozenset([*FORGET, "r1", "r2"])
    assert healed.trained.digest() == train(RECIPE, RECORDS.without(healed.trained.gone)).digest()
    tainted = FineTune()(healed.trained, RECORDS, Request.remove(["r3"]), rng=generator(0)).trained
    assert tainted.standing is Claim.NONE


@pytest.mark.parametrize("method", [*APPROXIMATE, Retrain(), Retrain(coins="fresh"), RetrainBriefly(), Sisa()])
def test_the_method_says_what_it_does_not_guarantee_and_where_it_is_from(method):
    assert method.not_guaranteed
    assert method.source
    assert method.name == method.name.lower()
