"""The search for settings: an equal budget, named coins, and no look at what is measured."""

import importlib
import pkgutil
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from sklearn.datasets import load_digits

from expunge import FineTune, GradientAscent, Misuse, NegGradPlus, Recipe, Records, Retrain, Sisa, train, unlearn
from expunge.learn.predict import outputs
from expunge.report import study_report
from expunge.study import Study, grid, run_study
from expunge.study.search import SPACES, Choice, Goal, Log, drawn, settings_of, space_of, with_settings
from expunge.unlearn.method import Done, Method
from expunge.unlearn.sparsity import Pruned

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS, LABELS = torch.tensor(PIXELS, dtype=torch.float32) / 16, torch.tensor(LABELS)
ROWS = Records(PIXELS[:300], LABELS[:300], [f"r{i}" for i in range(300)], classes=10)
TEST = Records(PIXELS[900:1100], LABELS[900:1100], [f"t{i}" for i in range(200)], classes=10)
RECIPE = Recipe(model="mlp", model_args={"hidden": [16]}, epochs=4, batch_size=32)


@dataclass(frozen=True, kw_only=True)
class Counted(FineTune):
    """Remembers with which settings and on how many rows it was called."""

    calls: ClassVar[list[tuple[str, float, int]]] = []

    def _apply(self, task, *, rng):
        self.calls.append((type(self).__name__, self.lr, task.trained.recipe.seed))
        return super()._apply(task, rng=rng)


@dataclass(frozen=True, kw_only=True)
class AlsoCounted(Counted):
    """Another, under another name."""


@dataclass(frozen=True, kw_only=True)
class Brittle(FineTune):
    """Breaks above the learning rate that it was made with."""

    def _apply(self, task, *, rng):
        if self.lr > 0.05:
            raise Misuse("that is too quick for me")
        return super()._apply(task, rng=rng)


@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    """Has nothing to search."""

    def _apply(self, task, *, rng):
        with torch.no_grad():
            next(task.trained.module.parameters()).mul_(1.01)
        return Done(trained=task.trained)


def study(**changes):
    settings = {"recipe": RECIPE, "scenarios": ("class:3",), "seeds": (0, 1), "equal_compute": None, "trials": 4}
    return Study(**{**settings, **changes})


def test_every_method_gets_as_many_trials_and_the_first_is_as_given():
    Counted.calls.clear()
    found = run_study(study(methods=(Counted(), AlsoCounted(lr=0.01))), ROWS, TEST)
    searched = [(name, lr) for name, lr, seed in Counted.calls if seed == -1]
    assert [name for name, _ in searched] == ["Counted"] * 4 + ["AlsoCounted"] * 4
    assert (searched[0][1], searched[4][1]) == (0.05, 0.01)
    assert len({lr for _, lr in searched[:4]}) == 4
    assert [one["trials"] for one in found.chosen()] == [4, 4]
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3] * 2
    measured = [(name, lr) for name, lr, seed in Counted.calls if seed >= 0]
    for one in found.chosen():
        kind = {"counted": "Counted", "also-counted": "AlsoCounted"}[one["method"]]
        given = {"Counted": 0.05, "AlsoCounted": 0.01}[kind]
        assert [lr for name, lr in measured if name == kind] == [one["best"]["settings"].get("lr", given)] * 2
        values = [trial.value for trial in found.trials if trial.method == one["method"]]
        assert one["best"]["value"] == min(values)
    assert len(Counted.calls) == 2 * 4 + 2 * 2


def test_a_trial_that_gives_no_model_is_counted_and_not_chosen():
    found = run_study(study(methods=(Brittle(),), trials=6), ROWS, TEST)
    failed = [trial for trial in found.trials if trial.value is None]
    assert failed
    assert {trial.why for trial in failed} == {"that is too quick for me"}
    chosen = found.chosen()[0]
    assert (chosen["trials"], chosen["failed"]) == (6, len(failed))
    assert chosen["best"]["settings"].get("lr", 0.05) <= 0.05


def test_what_has_nothing_to_search_is_measured_as_given_and_named():
    found = run_study(study(methods=(Plain(),)), ROWS, TEST)
    assert (found.trials, found.chosen()) == ((), ())
    assert found.about["settings"]["searched"] == {"plain": {}}
    assert found.line(0.0, "class:3", "plain").seeds == 2


def test_the_search_sees_neither_measured_rows_nor_a_retrained_model(monkeypatch):
    retrained = []
    original = Retrain._apply
    monkeypatch.setattr(
        Retrain, "_apply", lambda self, task, *, rng: retrained.append(task) or original(self, task, rng=rng)
    )
    plan = study(methods=(FineTune(),), seeds=(0,))
    found = run_study(plan, ROWS, TEST)
    assert [task.trained.recipe.seed for task in retrained] == [0]  # the reference alone, not the search's replica
    aside, measured = plan.held_out(TEST)
    assert (len(aside), len(measured)) == (40, 160)
    wrong = Records(TEST.x, torch.where(_in(TEST, measured), (TEST.y + 1) % 10, TEST.y), TEST.ids, classes=10)
    other = run_study(plan, ROWS, wrong)
    assert [trial.value for trial in other.trials] == [trial.value for trial in found.trials]
    assert other.line(0.0, "class:3", "fine-tune").figures["test"].value < 0.2
    assert found.line(0.0, "class:3", "fine-tune").figures["test"].n < 160


def test_the_goal_is_given_the_rows_set_aside_and_no_others(monkeypatch):
    given = []

    class Spy(Goal):
        def __init__(self, original, forget, retain, validation, seed):
            given.append((set(forget.ids) | set(retain.ids), set(validation.ids)))
            super().__init__(original, forget, retain, validation, seed)

    monkeypatch.setattr(grid, "Goal", Spy)
    plan = study(methods=(FineTune(),), seeds=(0,), trials=2)
    run_study(plan, ROWS, TEST)
    assert given == [(set(ROWS.ids), set(plan.held_out(TEST)[0].ids))]


def test_a_report_says_what_the_search_made_small_and_in_what_unit():
    for criterion, word in (("validation", "plus what is lost on retained rows"), ("oracle", "the gap to a retrained")):
        found = run_study(study(methods=(FineTune(),), seeds=(0,), trials=2, criterion=criterion), ROWS, TEST)
        table = next(one for one in study_report(found).chapters if one.name == "search").grids[0]
        place = table.headers.index(f"{criterion}, points")
        assert table.rows[0][place] == f"{100 * found.chosen()[0]['best']['value']:.2f}"
        assert f"{criterion}: what the search made small" in table.notes
        assert word in table.notes


def _in(whole, part):
    return torch.tensor([one in part for one in whole.ids])


def test_the_oracle_has_to_be_asked_for_and_measures_the_gap():
    plan = study(methods=(FineTune(),), seeds=(0,), criterion="oracle", trials=2)
    found = run_study(plan, ROWS, TEST)
    aside = plan.held_out(TEST)[0]
    original = train(replace(RECIPE, seed=-1), ROWS)
    split = plan.chosen_scenarios[0].request(ROWS, -1).split(ROWS)
    reference = grid.measure(train(original.recipe, split.retain), split.forget, split.retain, aside, method="r")
    rng = grid.child(grid.generator(-1), "study", "class:3")
    answer = FineTune()(original, ROWS, plan.chosen_scenarios[0].request(ROWS, -1), rng=rng)
    row = grid.measure(answer.trained, split.forget, split.retain, aside, method="c")
    assert found.trials[0].value == row.mean_gap(reference)
    assert found.about["settings"]["criterion"] == "oracle"


def test_the_rows_set_aside_do_not_depend_on_their_order():
    plan = study(methods=(FineTune(),))
    backwards = TEST.select(list(reversed(range(200))))
    assert [set(side.ids) for side in plan.held_out(TEST)] == [set(side.ids) for side in plan.held_out(backwards)]
    assert set(plan.held_out(TEST)[0].ids).isdisjoint(plan.held_out(TEST)[1].ids)
    assert study(methods=(FineTune(),), trials=1).held_out(TEST) == (None, TEST)


def share(model, rows):
    return float((outputs(model.module, rows).argmax(1) == rows.y).double().mean())


@pytest.mark.parametrize("scenario", ["class:3", "random:0.3"])
def test_the_goal_is_its_formula(scenario):
    original, validation = train(RECIPE, ROWS), TEST
    split = study(methods=(FineTune(),), scenarios=(scenario,)).chosen_scenarios[0].request(ROWS, 0).split(ROWS)
    goal = Goal(original, split.forget, split.retain, validation, 0)
    labels = split.forget.y.tolist()
    expected = sum(share(original, validation.of_class(label)) for label in labels) / len(labels)
    assert goal.target == pytest.approx(0.0 if scenario == "class:3" else expected, abs=1e-12)
    left = validation if scenario != "class:3" else validation.select((validation.y != 3).nonzero().flatten())
    candidate = train(replace(RECIPE, epochs=2), split.retain)
    lost = max(0, share(original, split.retain) - share(candidate, split.retain))
    lost += max(0, share(original, left) - share(candidate, left))
    by_hand = abs(share(candidate, split.forget) - goal.target) + lost
    assert goal.value(goal.figures(candidate)) == pytest.approx(by_hand, abs=1e-12)
    assert goal.value(goal.figures(original)) == pytest.approx(abs(share(original, split.forget) - goal.target))


def test_what_a_candidate_gains_over_the_original_is_no_fault():
    original = train(RECIPE, ROWS)
    split = study(methods=(FineTune(),)).chosen_scenarios[0].request(ROWS, 0).split(ROWS)
    goal = Goal(original, split.forget, split.retain, TEST, 0)
    known = goal.original
    for name in ("retain", "validation"):
        better, worse = ({**known, "forget": goal.target, name: known[name] + change} for change in (0.05, -0.05))
        assert goal.value(better) == 0
        assert goal.value(worse) == pytest.approx(0.05, abs=1e-12)


def test_the_goal_prefers_retraining_to_standing_still_and_to_a_ruin():
    original = train(replace(RECIPE, epochs=20), ROWS)
    split = study(methods=(FineTune(),)).chosen_scenarios[0].request(ROWS, 0).split(ROWS)
    goal = Goal(original, split.forget, split.retain, TEST, 0)
    retrained, ruin = train(original.recipe, split.retain), train(replace(RECIPE, epochs=0), ROWS)
    values = [goal.value(goal.figures(model)) for model in (retrained, original, ruin)]
    assert values[0] < values[1] - 0.5
    assert values[0] < values[2] - 0.5


def methods_of_the_room():
    """All methods that the room `unlearn` defines, by the names of their classes."""
    found = {}
    for module in pkgutil.iter_modules(unlearn.__path__):
        inside = vars(importlib.import_module(f"expunge.unlearn.{module.name}")).values()
        found |= {one.__name__: one for one in inside if isinstance(one, type) and issubclass(one, Method)}
    return {name: kind for name, kind in found.items() if kind is not Method}


def test_ranges_name_settings_that_their_classes_have_and_take():
    classes = methods_of_the_room()
    assert set(SPACES) == set(classes)
    for name, kind in classes.items():
        assert set(SPACES[name]) <= {field.name for field in fields(kind)}, name
        method = kind(then=FineTune()) if name == "SaliencyMasked" else kind()
        for trial in range(30):
            with_settings(method, drawn(method, name, trial, 0))  # every draw is a setting that the class takes


def test_each_default_lies_within_its_own_range():
    for name, kind in methods_of_the_room().items():
        method = kind(then=FineTune()) if name == "SaliencyMasked" else kind()
        for field, span in space_of(method).items():
            owner, _, inner = field.rpartition(".")
            value = getattr(getattr(method, owner) if owner else method, inner)
            inside = span.low <= value <= span.high if isinstance(span, Log) else value in span.values
            assert inside, (name, field, value, span)
    unknown = space_of(Counted(epochs=7))["epochs"]
    assert unknown == Choice((1, 2, 3, 5, 7))


def test_what_the_table_does_not_know_is_searched_by_lr_and_epochs_alone():
    assert space_of(Counted(lr=0.3)) == {"lr": Log(0.03, 3.0), "epochs": Choice((1, 2, 3, 5))}
    assert space_of(Plain()) == {}
    assert space_of(Sisa()) == space_of(Retrain()) == {}


def test_a_method_that_leads_to_another_is_searched_through():
    method = Pruned(then=FineTune())
    assert {"then.lr", "then.epochs"} <= set(space_of(method))
    assert with_settings(method, {"then.lr": 0.5}) == Pruned(then=FineTune(lr=0.5))


def test_draws_are_named_and_lie_in_their_ranges():
    method = NegGradPlus()
    draws = [drawn(method, "n", trial, -1) for trial in range(200)]
    assert draws[0] == {}
    assert draws == [drawn(method, "n", trial, -1) for trial in range(200)]
    assert drawn(method, "n", 1, -1) != drawn(method, "m", 1, -1)
    assert drawn(method, "n", 1, -1) != drawn(method, "n", 1, -2)
    rates = torch.tensor([one["lr"] for one in draws[1:]])
    assert 1e-4 <= rates.min() < 3e-4
    assert 0.04 < rates.max() <= 0.1
    assert 0.4 < float((rates < (1e-4 * 0.1) ** 0.5).double().mean()) < 0.6  # uniform in the logarithm
    assert {one["epochs"] for one in draws[1:]} == {1, 2, 3, 5}
    assert (Log(1, 100).at(0.5), Choice((1, 2)).at(0.999), Choice((1, 2)).at(1.0)) == (10, 2, 2)


def test_settings_are_written_down_or_refused():
    assert settings_of(GradientAscent())["lr"] == 3e-3
    assert settings_of(Pruned(then=FineTune()))["then"]["class"] == "FineTune"
    with pytest.raises(Misuse, match="cannot be written down"):
        settings_of({"loss": lambda x: x})
