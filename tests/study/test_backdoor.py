"""A backdoor planted, learnt, and removed: what the study measures, and against what."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from expunge.core.coins import child, generator
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate
from expunge.core.recipe import Pruning, Recipe
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import train
from expunge.learn.triggers import Trigger, attack_floor, attack_success, poison
from expunge.study.backdoor import Backdoor, Cell, Cleansing, Reading, at_sparsity, cleanse, cleanse_once, infect, read
from expunge.unlearn.method import Done, Method
from expunge.unlearn.retrain import Retrain

RECIPE = Recipe(model="mlp", model_args={"hidden": [32]}, epochs=6, batch_size=64)
BACKDOOR = Backdoor(trigger=Trigger(row=0, column=0, size=2), target=2, share=0.1)


@dataclass(frozen=True, kw_only=True)
class Nudge(Method):
    """Hardly touches the model."""

    def _apply(self, task, *, rng):
        seen.append((len(task.forget), len(task.retain), tuple(task.retain.ids), rng.initial_seed()))
        with torch.no_grad():
            next(task.trained.module.parameters()).add_(1e-6)
        return Done(trained=task.trained)


seen = []


@pytest.fixture(scope="module")
def digits(optdigits):
    return optdigits.train, optdigits.test


@pytest.fixture(scope="module")
def study(digits):
    heard = []
    methods = {"exact": Retrain(), "nudge": Nudge()}
    found = cleanse(
        RECIPE, *digits, methods, backdoor=BACKDOOR, sparsities=(0.0, 0.5), seeds=(3, 4), report=heard.append
    )
    return found, heard


@pytest.fixture(scope="module")
def infected(digits):
    return infect(RECIPE, digits[0], BACKDOOR, seed=3)


def test_the_model_before_obeys_and_retraining_does_not(study):
    for cell in study[0].cells:
        assert cell["before"].attack.low > 0.8
        assert cell["retrain"].attack.high < 0.1
        assert abs(cell["before"].test.value - cell["retrain"].test.value) < 0.05
        assert all(one.floor.high < 0.05 for one in cell.readings)


def test_an_exact_method_equals_the_reference_and_a_nudge_cleanses_nothing(study):
    for cell in study[0].cells:
        for name in ("test", "attack", "floor"):
            assert getattr(cell["exact"], name) == getattr(cell["retrain"], name)
        assert cell["nudge"].attack == cell["before"].attack
    lines = {(line["sparsity"], line["model"]): line for line in study[0].summary()}
    assert lines[0.5, "exact"]["attack_gap"].value == 0
    assert lines[0.5, "nudge"]["attack_gap"].low > 0.5


def test_each_cell_is_what_its_parts_say_one_by_one(study, digits):
    cell = study[0].cells[0]
    rows, ids = poison(digits[0], BACKDOOR.trigger, 2, 0.1, child(generator(3), "backdoor"))
    assert (cell.sparsity, cell.seed, cell.poisoned) == (0.0, 3, len(ids))
    trained = train(replace(RECIPE, seed=3), rows)
    assert cell["before"].attack == attack_success(trained, digits[1], BACKDOOR.trigger, 2)
    assert cell["before"].floor == attack_floor(trained, digits[1], 2)


def test_all_cells_are_there_and_told(study):
    found, heard = study
    assert [(cell.sparsity, cell.seed) for cell in found.cells] == [(0.0, 3), (0.5, 3), (0.0, 4), (0.5, 4)]
    assert heard == list(found.cells)


def test_sparse_cells_are_of_sparse_models(digits):
    pruned = infect(at_sparsity(RECIPE, 0.5), digits[0], BACKDOOR, seed=3)
    assert mask_of_zeros(pruned.trained.module).sparsity == 0.5
    retrained, _ = pruned.retrain()
    assert mask_of_zeros(retrained.module).sparsity == 0.5
    assert cleanse_once(pruned, digits[1], {}, reference=(retrained, 1.0)).sparsity == 0.5


def test_a_recipe_that_prunes_keeps_its_way_of_pruning():
    iterative = Pruning(sparsity=0.3, by="magnitude", rounds=3)
    pruning = at_sparsity(replace(RECIPE, pruning=iterative), 0.9).pruning
    assert pruning == replace(iterative, sparsity=0.9)
    assert at_sparsity(replace(RECIPE, pruning=iterative), 0).pruning is None
    assert at_sparsity(RECIPE, 0.9, "random").pruning == Pruning(sparsity=0.9, by="random")


def test_all_poisoned_rows_are_given_to_the_method_and_no_other(infected):
    seen.clear()
    infected.unlearn(Nudge(), rng=generator(0))
    forget, retain, ids, _ = seen[0]
    assert forget == len(infected.poisoned)
    assert forget + retain == len(infected.records)
    assert not set(ids) & set(infected.poisoned)


def test_a_budget_lets_the_method_see_so_many_retained_rows(infected):
    seen.clear()
    for seed in (0, 0, 1):
        infected.unlearn(Nudge(), rng=generator(seed), reads=100)
    assert [(forget, retain) for forget, retain, *_ in seen] == [(len(infected.poisoned), 100)] * 3
    assert set(seen[0][2]) == set(seen[1][2]) != set(seen[2][2])
    assert not set(seen[0][2]) & set(infected.poisoned)
    for reads in (0, len(infected.records)):
        with pytest.raises(Misuse, match="reads must be from 1"):
            infected.unlearn(Nudge(), rng=generator(0), reads=reads)


def test_which_rows_may_be_read_does_not_depend_on_their_order(infected):
    seen.clear()
    shuffled = infected.records.select(torch.randperm(len(infected.records), generator=generator(9)))
    for records in (infected.records, shuffled):
        replace(infected, records=records).unlearn(Nudge(), rng=generator(0), reads=100)
    assert set(seen[0][2]) == set(seen[1][2])
    assert len(set(seen[0][2])) == 100


def test_a_method_more_changes_no_other_methods_coins(infected, digits):
    reference = infected.retrain()
    seen.clear()
    cleanse_once(infected, digits[1], {"nudge": Nudge()}, reference=reference)
    cleanse_once(infected, digits[1], {"other": Nudge(), "nudge": Nudge()}, reference=reference)
    assert seen[0][3] == seen[2][3] != seen[1][3]


# The summary, on cells made by hand


def reading(model, attack, test=0.9):
    share = Estimate(attack, 0.0, 1.0, 100)
    return Reading(model=model, test=Estimate(test, 0.0, 1.0, 100), attack=share, floor=share, seconds=2.0)


def cells_by_hand():
    def cell(sparsity, seed, tuned):
        readings = (reading("before", 1.0), reading("retrain", 0.01 * seed, 0.95), reading("tuned", tuned))
        return Cell(sparsity=sparsity, seed=seed, poisoned=5, readings=readings)

    return (cell(0.0, 1, 0.5), cell(0.0, 2, 0.7), cell(0.9, 2, 0.3), cell(0.9, 1, 0.1))


def test_differences_are_paired_by_seed():
    found = Cleansing(backdoor=Backdoor(), cells=cells_by_hand())
    lines = {(line["sparsity"], line["model"]): line for line in found.summary()}
    assert len(lines) == 6
    tuned = lines[0.9, "tuned"]
    # By seed both differ by 0.4 from dense: without pairing the interval would be wide, and hold zero.
    gain = tuned["attack_against_dense"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((-0.4, -0.4, -0.4))
    assert tuned["attack_gap"].value == pytest.approx((0.3 - 0.02 + 0.1 - 0.01) / 2)
    assert tuned["test_gap"].value == pytest.approx(-0.05)
    assert (tuned["attack"].value, tuned["seconds"].value, tuned["seeds"]) == (pytest.approx(0.2), 2.0, 2)
    assert "attack_against_dense" not in lines[0.0, "tuned"]


def test_json_gives_the_cells_back(study):
    data = json.loads(json.dumps(study[0].to_json(), allow_nan=False))
    assert tuple(Cell.from_json(one) for one in data["cells"]) == study[0].cells
    assert data["backdoor"]["target"] == 2
    assert len(data["summary"]) == 8
    assert data["summary"][0]["attack"]["interval"] == "student t over seeds"


def test_read_is_of_this_model(infected, digits):
    found = read(infected.trained, digits[1], BACKDOOR, model="m", seconds=1.5)
    assert (found.model, found.seconds, found.test.n) == ("m", 1.5, len(digits[1]))
    assert found.attack.n == found.floor.n == int((digits[1].y != 2).sum())


@pytest.mark.parametrize(("seeds", "sparsities"), [((1,), (0.0,)), ((1, 1), (0.0,)), ((1, 2), ())])
def test_what_gives_no_interval_is_refused(digits, seeds, sparsities):
    with pytest.raises(Misuse, match="at least two different seeds and one sparsity"):
        cleanse(RECIPE, *digits, {}, seeds=seeds, sparsities=sparsities)


def test_names_of_other_lines_are_refused(infected, digits):
    with pytest.raises(Misuse, match='may not be called "before"'):
        cleanse_once(infected, digits[1], {"before": Nudge()}, reference=(infected.trained, 0.0))
    with pytest.raises(Misuse, match='has no "x"'):
        cells_by_hand()[0]["x"]
