"""Plans and sweeps of certified methods: real removals, the budget kept, and nothing said that was not measured."""

import json
import math
from dataclasses import replace

import pytest
import torch

from expunge.audit import accuracy
from expunge.certify import gaussian
from expunge.certify.accountant import Budget
from expunge.certify.guo import GuoRemoval
from expunge.core.claim import Constant, Guarantee, Spent
from expunge.core.coins import generator
from expunge.core.errors import Misuse, Unsupported
from expunge.core.estimate import Estimate, mean
from expunge.core.events import GaussianNoise
from expunge.core.recipe import Recipe, Sharding
from expunge.core.request import Request
from expunge.learn.training import train
from expunge.study import certified, certified_bench, certified_tries
from expunge.study.certified import plan_certified, sweep_certified
from expunge.study.certified_bench import LATER, Bench, Setting
from expunge.study.certified_tries import SIGMAS, Figures, Line, _verdict, chosen_sigma, mean_of, noised, tried_line
from expunge.study.certified_ways import FREE_SIGMA, WAYS, Way, Wish

SOFTMAX = Recipe(model="softmax", epochs=2, weight_decay=0.01)
QUICK = ("newton-head", "clipped-fine-tune", "clipped-model-fine-tune", "newton-unlearning")


@pytest.fixture(scope="module")
def rows(optdigits):
    return optdigits.train.select(range(400)), optdigits.test.select(range(400))


@pytest.fixture(scope="module")
def plan(rows):
    setting = Setting(recipe=SOFTMAX, methods=QUICK, draws=8, rows=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified, "chosen_sigma", lambda bench, tried: 0.05)  # the noise has no seed: any may be chosen
        return plan_certified(setting, Budget(epsilon=2.0, requests=20), *rows)


def wish(recipe=SOFTMAX, *, shape=(8, 8), outputs=10, held=500, rows=1, **budget):
    whole = replace(recipe, model_args={"shape": shape, "outputs": outputs, **recipe.model_args})
    return Wish(recipe=whole, held=held, rows=rows, budget=Budget(**budget))


def test_every_method_keeps_to_the_budget_in_its_line(plan):
    lines = {(line.method, line.chosen): line for line in plan.lines}
    assert set(QUICK) == {name for name, _ in lines}
    assert {line.can for line in plan.lines} == {"yes"}
    assert {line.basis for line in plan.lines} == {"proved"}
    assert all(1.9 < line.epsilon <= 2.0 * (1 + 1e-6) for line in plan.lines)
    head = lines["newton-head", False]
    assert head.sigma == 0.01
    assert head.cap == pytest.approx(gaussian.mu_of(2.0, 1e-5) / math.sqrt(20) * 0.01)
    assert [line.method for line in plan.lines if line.vacuous] == ["newton-unlearning"]


def test_accuracy_is_of_noised_models_and_stands_beside_retraining(plan, rows):
    for line in plan.lines:
        found = line.figures
        assert found.accuracy.n == 8
        assert found.later == LATER
        assert found.seconds_first > 0
        assert found.seconds_later > 0
        assert found.retrained.n == len(rows[1])
    vacuous = next(line for line in plan.lines if line.vacuous)
    head = plan.lines[0]
    assert head.figures.accuracy.value > head.figures.retrained.value - 0.02 > 0.6
    assert vacuous.figures.accuracy.value < 0.3 < vacuous.figures.retrained.value
    assert plan.retrained == accuracy(train(SOFTMAX, rows[0].without(bench(rows, rows_of=2).groups[0])), rows[1])


def bench(rows, *, rows_of=1, **settings):
    return Bench(Setting(recipe=SOFTMAX, rows=rows_of, **settings), *rows)


def test_the_chosen_sigma_is_a_line_of_its_own(plan):
    (chosen,) = (line for line in plan.lines if line.chosen)
    assert (chosen.method, chosen.sigma, chosen.can) == ("newton-head", 0.05, "yes")
    assert chosen.cap == pytest.approx(plan.lines[0].cap * 5)
    assert chosen.figures is not None


@pytest.mark.parametrize("sigma", [None, 0.01])
def test_no_line_for_a_sigma_that_there_is_not_or_that_is_there_already(rows, monkeypatch, sigma):
    monkeypatch.setattr(certified, "chosen_sigma", lambda bench, tried: sigma)
    setting = Setting(recipe=SOFTMAX, methods=("newton-head",), draws=2)
    assert [line.chosen for line in plan_certified(setting, Budget(requests=2), *rows).lines] == [False]


def test_the_sigma_that_is_chosen_costs_little_and_ten_times_it_much(rows):
    one = bench(rows, draws=20)
    _, tried = tried_line(one, "newton-head", one.wish(Budget(requests=20)), runs=2)
    found = chosen_sigma(one, tried)
    assert found in SIGMAS
    (bare,) = noised(one, tried, 0.0)
    assert mean_of(noised(one, tried, found), "draws").value > bare - 0.03
    assert mean_of(noised(one, tried, max(10 * found, 0.3)), "draws").value < bare - 0.03


def test_a_plan_is_plain_json(plan):
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["budget"] == {"epsilon": 2.0, "delta": 1e-5, "requests": 20}
    assert len(data["lines"]) == len(plan.lines)
    assert data["lines"][0]["figures"]["accuracy"]["value"] == plan.lines[0].figures.accuracy.value
    assert data["rows_per_request"] == 2


def test_noise_drawn_anew_is_as_good_as_removals_made_anew(rows):
    one = bench(rows, draws=20)
    line, tried = tried_line(one, "newton-head", one.wish(Budget(requests=20), 0.3), runs=20)
    real = [one.accuracy(certified_tries._again(one, tried, number)) for number in range(20)]
    drawn = line.figures.accuracy
    spread = math.hypot(drawn.high - drawn.low, mean(real).high - mean(real).low) / 2
    assert abs(drawn.value - mean(real).value) < 3 * spread  # some six standard errors: the noise has no seed
    bare = noised(one, tried, 0.0)
    assert len(bare) == 1
    assert bare[0] > drawn.value + 0.005  # this much noise does cost accuracy
    assert mean_of(noised(one, tried, 1e6), "draws").value < 0.25


def test_without_noise_it_is_the_secret_head_itself(rows):
    one = bench(rows)
    _, tried = tried_line(one, "newton-head", one.wish(Budget(requests=20)), runs=2)
    after = tried.first.trained
    with torch.no_grad():
        after.module.head.weight.copy_(after.secret["head.weight"])
        after.module.head.bias.copy_(after.secret["head.bias"])
    assert noised(one, tried, 0.0)[0] == one.accuracy(after)


@pytest.mark.parametrize(
    ("losses", "sigma"),
    [
        ({}, SIGMAS[-1]),
        ({0.05: 0.006}, 0.02),
        ({0.05: 0.005}, SIGMAS[-1]),
        ({0.05: 0.006, 0.1: 0.0}, 0.02),  # what is fine again by luck does not count
        ({SIGMAS[0]: 0.1}, None),
    ],
)
def test_the_largest_sigma_at_half_a_point(monkeypatch, losses, sigma):
    monkeypatch.setattr(certified_tries, "noised", lambda bench, tried, one: [0.9 - losses.get(one, 0.0)])
    monkeypatch.setattr(certified_tries, "HALF_A_POINT", 0.005 + 1e-12)
    assert chosen_sigma(None, None) == sigma


def guarantee(*, basis="proved", transcript=True, remarks=()):
    constant = Constant(1.0, "estimated" if basis == "none" else "proved", "setting method.sigma")
    spent = Spent(epsilon=0.1, delta=1e-5, mu=0.1, releases=1, budget_epsilon=1.0, budget_releases=4)
    return Guarantee(
        epsilon=0.1,
        delta=1e-5,
        mu=0.1,
        sigma=1.0,
        sensitivity=0.1,
        mechanism="",
        reference="",
        parameters=("head.weight",),
        releases="current",
        constants={"sigma": constant},
        transcript=spent if transcript else None,
        remarks=remarks,
    )


def after(rows, sensitivity):
    trained = train(replace(SOFTMAX, epochs=0), rows[0])
    release = GaussianNoise(parameters=("head.weight",), sensitivity=sensitivity, sigma=1.0)
    return replace(trained, releases=(release,))


def test_who_overspends_or_claims_nothing_is_told_so(rows):
    budget = Budget(requests=4)
    honest, greedy = after(rows, budget.cap(1.0)), after(rows, 1.01 * budget.cap(1.0))
    can, why, epsilon = _verdict(budget, guarantee(), honest)
    assert (can, why, epsilon) == ("yes", "", pytest.approx(1.0, rel=1e-6))
    can, why, epsilon = _verdict(budget, guarantee(), greedy)
    assert (can, epsilon) == ("no", None)
    assert "is spent: 3 were made" in why
    can, why, _ = _verdict(budget, guarantee(transcript=False), honest)
    assert (can, why) == ("current only", "nothing bounds what all its releases tell together")
    told = ("Other.", "Nothing is proved of the step: no constants.")
    assert _verdict(budget, guarantee(basis="none", remarks=told), honest)[:2] == ("no", told[1])


@pytest.mark.parametrize("name", WAYS)
def test_each_way_is_set_up_for_the_budget_and_says_what_it_needs(name):
    asked = wish(held=4000, rows=3, epsilon=8.0, requests=7)
    if name == "guo-removal":
        asked = wish(replace(SOFTMAX, weight_decay=1.0), shape=(3,), outputs=2, held=1_000_000, epsilon=8.0, requests=7)
    way = WAYS[name](asked)
    assert way.method is None or way.method.budget == asked.budget
    special = type(way) is not Way or way.recipe != asked.recipe or way.keep.every > 0
    assert special == bool(way.demand)
    bare = replace(asked, recipe=replace(asked.recipe, weight_decay=0.0))
    if name not in ("guo-removal", "clipped-fine-tune", "clipped-model-fine-tune", "private-training"):
        assert WAYS[name](bare).recipe.weight_decay == 0.001
        assert "weight_decay > 0, here 0.001" in WAYS[name](bare).demand


def test_shares_hold_for_the_first_request_and_the_last():
    asked = wish(held=1000, rows=10, requests=50)
    descent, rewind = (WAYS[name](asked).method for name in ("descent-to-delete", "rewind-to-delete"))
    assert descent.share * (1000 - 50 * 10) >= 10
    assert rewind.share * 1000 >= 50 * 10
    private = WAYS["private-training"](asked)
    assert private.group == 500


def test_the_worst_case_of_guo_gets_the_smallest_power_of_two():
    asked = wish(replace(SOFTMAX, weight_decay=1.0), shape=(3,), outputs=2, held=1_000_000, requests=2)
    way = WAYS["guo-removal"](asked)
    module = train(replace(way.recipe, epochs=0, dtype="float64"), _two_rows()).module
    assert way.method.guarantee_for(way.recipe, module).epsilon <= 1.0
    with pytest.raises(Misuse, match="with these settings epsilon is"):
        replace(way.method, sigma=way.method.sigma / 2).guarantee_for(way.recipe, module)
    with pytest.raises(Unsupported, match="no sigma keeps the worst case of 2 removals of 20 rows"):
        WAYS["guo-removal"](replace(asked, held=20))


def _two_rows():
    from expunge.core.records import Records

    return Records(torch.eye(2, 3), torch.tensor([0, 1]), classes=2)


@pytest.mark.parametrize(
    "name", ["descent-to-delete", "rewind-to-delete", "newton-unlearning", "guo-removal", "guo-removal-paper"]
)
def test_what_is_never_possible_of_a_network_says_so_before_training(rows, monkeypatch, name):
    monkeypatch.setattr(certified_bench, "train", None)
    one = Bench(Setting(recipe=Recipe(model="mlp")), *rows)
    line, tried = tried_line(one, name, one.wish(Budget()), runs=2)
    assert (line.can, line.figures, tried) == ("no", None, None)
    assert line.why.startswith("never possible for such a model: ")


def test_of_a_network_the_head_is_conditional_and_says_what_is_outside(rows):
    setting = Setting(recipe=Recipe(model="mlp", model_args={"hidden": [8]}, epochs=1), draws=2)
    one = Bench(setting, *rows)
    line, _ = tried_line(one, "newton-head", one.wish(Budget(requests=3)), runs=2)
    assert (line.can, line.basis, line.demand) == ("yes", "conditional", "weight_decay > 0, here 0.001")
    assert "is outside" in line.remarks[0]
    assert line.figures.later == 2  # a budget of three requests has two later ones


def test_a_row_that_is_too_long_is_a_reason_not_a_crash(rows):
    one = Bench(Setting(recipe=SOFTMAX, radius=1.5), *rows)
    line, _ = tried_line(one, "descent-to-delete", one.wish(Budget()), runs=2)
    assert line.can == "no"
    assert "give a larger radius" in line.why


@pytest.mark.parametrize(
    ("name", "epsilon", "can"),
    [("descent-to-delete", 20.0, "yes"), ("guo-removal-paper", 20.0, "current only"), ("private-training", 0.3, "yes")],
)
def test_other_ways_are_real_too(rows, name, epsilon, can):
    recipe = replace(SOFTMAX, weight_decay=1.0, epochs=1)
    one = Bench(Setting(recipe=recipe, draws=2), *rows)
    line, tried = tried_line(one, name, one.wish(Budget(epsilon=epsilon, requests=2)), runs=2)
    assert tried is not None, line.why
    assert tried.first.trained.gone == frozenset(one.groups[0])
    assert (line.can, line.figures.accuracy.n, line.figures.later) == (can, 2, 1)
    assert (line.figures.seconds_first == 0.0) == (name == "private-training")  # which needs no work


def test_each_plain_recipe_is_trained_once_and_a_given_model_not_at_all(rows, monkeypatch):
    trained, calls = train(SOFTMAX, rows[0]), []
    one = Bench(Setting(recipe=SOFTMAX, trained=trained), *rows)
    monkeypatch.setattr(Way, "train", lambda way, records: calls.append(way.recipe))
    assert one.start(Way(recipe=one.recipe)).trained is trained
    assert calls == []
    monkeypatch.undo()
    other = bench(rows)
    assert other.start(Way(recipe=other.recipe)).trained is other.start(Way(recipe=other.recipe)).trained
    assert other.reference(other.recipe) is other.reference(other.recipe)
    assert other.reference(other.recipe)[0].ids == frozenset(rows[0].ids) - set(other.groups[0])
    with pytest.raises(Misuse, match="not of exactly these records"):
        Bench(Setting(recipe=SOFTMAX, trained=train(SOFTMAX, rows[1])), *rows)


def test_retraining_for_as_long_lies_between_one_step_and_all(rows):
    one = bench(rows)
    full, whole = one.reference(one.recipe)
    assert one.early(None) is None
    assert one.early(100 * whole) == one.accuracy(full)
    first = train(replace(SOFTMAX), rows[0].without(one.groups[0]))
    assert first.digest() == full.digest()
    assert one.early(0.0) < one.accuracy(full) - 0.1  # after one step


def test_the_rows_of_requests_differ_by_seed_and_not_by_order(rows):
    groups = bench(rows, rows_of=3).groups
    assert [len(one) for one in groups] == [3] * (1 + LATER)
    assert len({name for one in groups for name in one}) == 3 * (1 + LATER)
    backwards = rows[0].select(list(range(399, -1, -1)))
    assert bench((backwards, rows[1]), rows_of=3).groups == groups
    assert bench(rows, rows_of=3, seed=1).groups != groups


def test_what_cannot_be_meant_is_refused_before_work(rows, monkeypatch):
    monkeypatch.setattr(certified_bench, "train", None)
    for settings, message in [
        ({"draws": 1}, "draws must be an integer >= 2"),
        ({"methods": ("magic",)}, 'methods are newton-head, .* got "magic"'),
        ({"methods": ()}, "got none"),
    ]:
        with pytest.raises(Misuse, match=message):
            Setting(recipe=SOFTMAX, **settings)
    for setting, budget, message in [
        (Setting(recipe=SOFTMAX, rows=100), Budget(requests=5), "5 requests of 100 rows leave nothing of 400 rows"),
        (Setting(recipe=SOFTMAX, rows=0), Budget(), "rows of a request must be >= 1, got 0"),
        (Setting(recipe=SOFTMAX, radius=0.5), Budget(), "radius must be > 1, got 0.5"),
        (Setting(recipe=replace(SOFTMAX, sharding=Sharding(shards=2))), Budget(), "leave shards out"),
    ]:
        with pytest.raises(Misuse, match=message):
            plan_certified(setting, budget, *rows)


def test_a_sweep_has_each_method_at_each_epsilon_over_seeds(rows):
    told = []
    setting = Setting(recipe=SOFTMAX, methods=("newton-head", "clipped-fine-tune"), draws=2)
    budget = Budget(requests=3)
    sweep = sweep_certified(
        setting, budget, [4.0, 0.5], *rows, seeds=2, report=lambda what, done, of: told.append((what, done, of))
    )
    assert [(line.epsilon, line.method) for line in sweep.lines] == [
        (epsilon, name) for epsilon in (0.5, 4.0) for name in setting.methods
    ]
    assert {line.seeds for line in sweep.lines} == {sweep.retrained.n} == {2}
    assert told[0] == ("seed 0, epsilon 0.5: newton-head", 0, 8)
    assert told[-1] == ("seed 1, epsilon 4: clipped-fine-tune", 7, 8)
    assert all(line.accuracy.interval == "student t over seeds" for line in sweep.lines)
    assert all(line.seconds_later > 0 and line.gain_later.n == 2 for line in sweep.lines)
    json.dumps(sweep.to_json(), allow_nan=False)


def test_a_sweep_of_one_seed_has_intervals_over_draws(rows):
    setting = Setting(recipe=SOFTMAX, methods=("newton-head",), draws=3)
    (line,) = sweep_certified(setting, Budget(requests=3), [1.0], *rows).lines
    assert (line.accuracy.n, line.accuracy.interval) == (3, "student t over draws of the noise")
    wide = line.accuracy.high - line.accuracy.low
    assert line.gain_first.high - line.gain_first.low == pytest.approx(wide)


def test_sweeps_that_cannot_be_meant(rows):
    setting = Setting(recipe=SOFTMAX)
    for epsilons, seeds in [([], 1), ([1.0, 1.0], 1), ([1.0], 0)]:
        with pytest.raises(Misuse, match="give different epsilons, and seeds >= 1"):
            sweep_certified(setting, Budget(), epsilons, *rows, seeds=seeds)
    with pytest.raises(Misuse, match="a sweep trains its own models"):
        sweep_certified(replace(setting, trained=train(SOFTMAX, rows[0])), Budget(), [1.0], *rows)


def figures(value, early):
    one = Estimate(value, value - 0.01, value + 0.01, 10)
    return Figures(
        accuracy=one,
        retrained=one,
        seconds_first=2.0,
        seconds_later=None,
        later=0,
        early_first=early,
        early_later=None,
    )


def test_the_weakest_answer_and_the_mean_gain_over_seeds_count():
    lines = [
        Line(method="m", can="yes", figures=figures(0.9, 0.8)),
        Line(method="m", can="no", why="spent"),
        Line(method="m", can="current only", why="alone", vacuous=True, figures=figures(0.7, 0.8)),
    ]
    found = certified._swept("m", 1.0, lines)
    assert (found.can, found.why, found.vacuous, found.seeds) == ("no", "spent", True, 2)
    assert found.accuracy.value == pytest.approx(0.8)
    assert found.gain_first.value == pytest.approx(0.0)
    assert (found.seconds_first, found.seconds_later, found.gain_later) == (2.0, None, None)
    assert certified._swept("m", 1.0, lines[1:2]).accuracy is None
    assert certified._swept("m", 1.0, lines[:2]).gain_first.interval == "none: one of seeds"


def test_a_mean_of_shares_stays_a_share_and_one_value_has_no_interval():
    assert mean_of([0.99, 1.0, 1.0], "runs").high == 1.0
    assert mean_of([0.0, 0.0, 0.1], "runs").low == 0.0
    alone = mean_of([0.5], "runs")
    assert (alone.low, alone.high, alone.interval) == (0.5, 0.5, "none: one of runs")


def test_only_a_method_whose_cap_follows_sigma_leaves_it_free(rows):
    assert set(WAYS) >= FREE_SIGMA
    asked = wish(requests=9)
    for sigma in (0.01, 3.0):
        method = WAYS["newton-head"](replace(asked, sigma=sigma)).method
        assert (method.sigma, method.cap) == (sigma, asked.budget.cap(sigma))


def test_a_way_without_method_removes_nothing(rows):
    one = bench(rows)
    way = Way(recipe=one.recipe)
    with pytest.raises(Unsupported, match="has no method"):
        way.remove(one.start(way), rows[0], Request.remove(one.groups[0]), generator(0))
    assert isinstance(WAYS["guo-removal-paper"](wish()).method, GuoRemoval)
