"""A study end to end, on digits: its figures, its liars, its interruptions."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from sklearn.datasets import load_digits

from expunge import Estimate, FineTune, GradientAscent, Recipe, Records, Retrain, child, generator, train
from expunge.audit import Table, measure, mia_efficacy
from expunge.core.errors import BadRecipe, EmptyRetain, Misuse, Stopped, UnknownRecord, Unsupported
from expunge.learn.pruning import mask_of_zeros
from expunge.report import study_grids, study_report, write
from expunge.study import Scenario, Study, StudyResult, grid, run_study
from expunge.unlearn.method import Done, Method

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS, LABELS = torch.tensor(PIXELS, dtype=torch.float32) / 16, torch.tensor(LABELS)
ROWS = Records(PIXELS[:400], LABELS[:400], [f"r{i}" for i in range(400)], classes=10)
TEST = Records(PIXELS[900:1200], LABELS[900:1200], [f"t{i}" for i in range(300)], classes=10)
RECIPE = Recipe(model="mlp", model_args={"hidden": [16]}, epochs=6, batch_size=32)


@dataclass(frozen=True, kw_only=True)
class OneBit(Method):
    """Does nothing, and moves one weight by the least that there is so as not to be caught."""

    def _apply(self, task, *, rng):
        with torch.no_grad():
            weight = next(task.trained.module.parameters()).view(-1)
            index = int(weight.abs().argmax())
            weight[index] = torch.nextafter(weight[index], torch.tensor(9.0))
        return Done(trained=task.trained)


@dataclass(frozen=True, kw_only=True)
class Nothing(Method):
    """Does nothing at all."""

    def _apply(self, task, *, rng):
        return Done(trained=task.trained)


@dataclass(frozen=True, kw_only=True)
class OnlyDense(FineTune):
    """Refuses sparse models."""

    def supports(self, trained):
        return Unsupported("sparse models are too hard; use fine-tune") if trained.recipe.pruning else None


def study(**changes):
    settings = {
        "recipe": RECIPE,
        "methods": (FineTune(), GradientAscent()),
        "scenarios": ("class:3", "random:0.1"),
        "sparsities": (0, 0.8),
        "seeds": (0, 1),
        "equal_compute": "gradients",
    }
    return Study(**{**settings, **changes})


SMALL = {"scenarios": ("class:3",), "sparsities": (0,), "seeds": (0,)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "whole"
    methods = {"fine-tune": FineTune(), "one-bit": OneBit(), "nothing": Nothing(), "only-dense": OnlyDense()}
    return run_study(study(methods=methods), ROWS, TEST, folder=folder), folder


def test_every_cell_is_there_once(done):
    result = done[0]
    kinds = [cell.kind for cell in result.cells]
    assert {kind: kinds.count(kind) for kind in kinds} == {"original": 8, "retrain": 8, "method": 32, "yardstick": 32}
    assert len({cell.key for cell in result.cells}) == len(result.cells)


def test_figures_are_those_of_the_methods_called_by_hand(done):
    for sparsity in (0.0, 0.8):
        recipe = study().recipe_of(sparsity, 1)
        original = train(recipe, ROWS)
        request = study().scenarios[1].request(ROWS, 1)
        split = request.split(ROWS)
        rng = child(generator(1), "study", "random:0.1")
        reference = train(recipe, split.retain)
        answer = FineTune()(original, ROWS, request, rng=rng)
        by_hand = {
            "original": (original, "not unlearned"),
            "retrain": (reference, "exact, pathwise"),
            "fine-tune": (answer.trained, "none"),
        }
        rows = {}
        for name, (model, claim) in by_hand.items():
            rows[name] = measure(model, split.forget, split.retain, TEST, method=name, claim=claim)
            cell = next(
                c
                for c in done[0].cells
                if (c.sparsity, c.scenario, c.seed, c.method) == (sparsity, "random:0.1", 1, name)
                and c.kind != "yardstick"
            )
            assert vars(cell.row) == {**vars(rows[name]), "seconds": cell.row.seconds}
            assert cell.efficacy == mia_efficacy(model, split.forget, split.retain, TEST)
            assert cell.sparsity_found == pytest.approx(sparsity, abs=1e-3)
        assert mask_of_zeros(reference.module).sparsity == pytest.approx(sparsity, abs=1e-3)
        table = Table(rows=tuple(rows.values()))
        alone = StudyResult(
            about={**done[0].about, "settings": {**done[0].about["settings"], "seeds": [1]}},
            cells=tuple(c for c in done[0].cells if c.seed == 1),
            trials=(),
        )
        found = alone.line(sparsity, "random:0.1", "fine-tune").figures
        assert found["gap"] == table["fine-tune"].mean_gap(table["retrain"])
        assert found["tug_of_war"] == table["fine-tune"].tug_of_war(table["retrain"])
        assert found["unlearning_accuracy"] == table["fine-tune"].unlearning_accuracy


def test_retraining_is_at_no_distance_from_itself_and_a_liar_at_the_originals(done):
    for line in done[0].table():
        if line.method == "retrain":
            assert (line.figures["gap"].value, line.figures["tug_of_war"].value) == (0, 1)
            assert line.figures["disparity"].value == 0
        if line.method == "one-bit":
            original = done[0].line(line.sparsity, line.scenario, "original")
            assert original.figures["gap"].value > (0.2 if line.scenario == "class:3" else 0)
            assert line.figures["over_original"].value == pytest.approx(0, abs=1e-3)
            for name in ("unlearning_accuracy", "retain", "test", "gap", "tug_of_war"):
                assert line.figures[name].value == pytest.approx(original.figures[name].value, abs=1e-3)


def test_what_was_not_measured_says_why(done):
    line = done[0].line(0.8, "class:3", "only-dense")
    assert (line.seeds, line.of, dict(line.figures)) == (0, 2, {})
    assert line.why == ("sparse models are too hard; use fine-tune",)
    assert done[0].line(0.0, "class:3", "only-dense").seeds == 2
    assert "left every parameter as it was" in done[0].line(0.0, "class:3", "nothing").why[0]
    assert {one["method"] for one in done[0].not_measured()} == {"only-dense", "nothing"}
    dense, sparse = (done[0].line(s, "class:3", "fine-tune") for s in (0.0, 0.8))
    assert dense.seeds == sparse.seeds == 2


def test_a_yardstick_costs_what_its_method_cost(done):
    cells = {cell.key: cell for cell in done[0].cells}
    checked = 0
    for cell in done[0].cells:
        if cell.kind != "yardstick" or cell.row is None:
            continue
        method = cells["cell", cell.sparsity, cell.scenario, cell.seed, "method", cell.method]
        full = cells["cell", cell.sparsity, cell.scenario, cell.seed, "retrain", "retrain"]
        if method.gradients:
            assert cell.gradients == pytest.approx(method.gradients, rel=0.05)
            checked += 1
        share = method.gradients / full.gradients
        assert cell.steps == max(1, round(full.steps * share))
        assert share < 1
    assert checked >= 8
    line = done[0].line(0.0, "class:3", "fine-tune").figures
    assert line["over_yardstick"].value == pytest.approx(line["gap"].value - line["yardstick_gap"].value)


def test_equal_seconds_are_seconds_and_not_gradients(monkeypatch):
    whole, call = {"retrain": 8.0, "fine-tune": 2.0}, Method.__call__

    def timed(self, *args, **kwargs):
        answer = call(self, *args, **kwargs)
        return replace(answer, cost=replace(answer.cost, seconds=whole.get(self.name, 1.0)))

    monkeypatch.setattr(Method, "__call__", timed)
    found = run_study(study(**SMALL, methods=(FineTune(),), equal_compute="seconds"), ROWS, TEST)
    cells = {cell.kind: cell for cell in found.cells}
    assert cells["method"].gradients / cells["retrain"].gradients == pytest.approx(1 / 3)
    assert cells["yardstick"].steps == round(cells["retrain"].steps * 2 / 8)
    gradients = run_study(study(**SMALL, methods=(FineTune(),), equal_compute="gradients"), ROWS, TEST)
    assert {cell.kind: cell.steps for cell in gradients.cells}["yardstick"] == round(cells["retrain"].steps / 3)


def test_a_method_as_dear_as_retraining_is_held_against_retraining_itself():
    plan = study(**{**SMALL, "sparsities": (0.8,)}, methods=(FineTune(epochs=13),))  # two trainings of 6 epochs each
    found = run_study(plan, ROWS, TEST)
    figures = found.line(0.8, "class:3", "fine-tune").figures
    assert figures["yardstick_gap"] == 0  # the mask is the reference's too, not the original's
    assert figures["over_yardstick"] == figures["gap"]
    assert figures["yardstick_seconds"] == found.line(0.8, "class:3", "retrain").figures["seconds"]


def test_the_result_is_plain_json_and_can_be_read_again(done):
    result, folder = done
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {"settings", "records", "test", "lines", "cells", "trials", "chosen", "not_measured"} == set(data)
    assert data["settings"]["methods"]["fine-tune"]["lr"] == 0.05
    assert StudyResult.read(folder).to_json() == result.to_json()
    for line in result.table():
        for figure in line.figures.values():
            assert isinstance(figure, Estimate)
            assert figure.n == 2


def without_seconds(value):
    """The same JSON with every figure of time left out."""
    timed = ("seconds", "original_seconds", "seconds_over_retrain", "yardstick_seconds", "seconds_over_reference")
    if isinstance(value, dict):
        return {name: without_seconds(one) for name, one in value.items() if name not in timed}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value


class Interrupting:
    """Presses Ctrl-C when so many cells are done."""

    def __init__(self, after):
        self.after = after

    def __call__(self, what, done, total):
        if done == self.after:
            raise KeyboardInterrupt


def test_a_study_in_pieces_is_the_study_in_one(tmp_path, monkeypatch):
    plan = study(trials=2, scenarios=("random:0.1",))
    whole = run_study(plan, ROWS, TEST, folder=tmp_path / "whole")
    trained = []
    monkeypatch.setattr(grid, "train", lambda *a, **k: trained.append(a[0].seed) or train(*a, **k))
    for after in (2, 7, 13, 22):  # in the search, and among the cells of each sparsity
        with pytest.raises(Stopped, match=f"{after} of 32 cells are finished .* go on with the same command"):
            run_study(plan, ROWS, TEST, folder=tmp_path / "pieces", report=Interrupting(after))
    lines = tmp_path / "pieces" / "cells.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])  # the last cell is torn, and so is done again
    found = run_study(plan, ROWS, TEST, folder=tmp_path / "pieces")
    assert without_seconds(found.to_json()) == without_seconds(whole.to_json())
    trained.clear()
    again = run_study(plan, ROWS, TEST, folder=tmp_path / "pieces")
    assert (again, trained) == (found, [])  # all is there: nothing is trained


def test_a_method_is_not_called_worth_it_for_standing_still(done):
    liar = done[0].line(0.0, "random:0.1", "one-bit").figures
    assert liar["over_yardstick"].value < 0 <= liar["over_original"].high  # stopping early does worse than nothing
    alone = StudyResult(
        about=done[0].about,
        cells=tuple(c for c in done[0].cells if c.method in ("original", "retrain", "one-bit")),
        trials=(),
    )
    report = study_report(alone)
    assert "Of 4 rows (a method, a scenario and a sparsity), 0 are nearer" in report.verdict
    assert "unfinished" not in study_report(done[0]).facts


def test_a_half_finished_study_says_what_is_missing(tmp_path):
    plan = study(methods=(OneBit(), Nothing()), scenarios=("class:3",), sparsities=(0,), equal_compute=None)
    with pytest.raises(Stopped):
        run_study(plan, ROWS, TEST, folder=tmp_path / "s", report=Interrupting(6))
    found = StudyResult.read(tmp_path / "s")
    assert study_report(found).facts["unfinished"] == "2 of 8 cells are not done yet; incomplete: seed 1"
    assert [key[3:] for key in found.to_do()] == [(1, "method", "one-bit"), (1, "method", "nothing")]
    table = study_grids(found)[0]
    assert [row[0] for row in table.rows] == ["original", "retrain", "one-bit (1 of 2 seeds)", "nothing"]
    assert "one-bit: 1 of 2 measured (the others are not done yet)" in table.notes
    assert "nothing: 0 of 2 measured (nothing left every parameter as it was" in table.notes
    assert isinstance(found.line(0.0, "class:3", "one-bit").figures["gap"], float)


def test_originals_are_trained_once_a_sparsity_and_seed(monkeypatch):
    trained = []
    monkeypatch.setattr(grid, "train", lambda *a, **k: trained.append((a[0].seed, a[0].pruning)) or train(*a, **k))
    run_study(study(methods=(OneBit(),), equal_compute=None, sparsities=(0,)), ROWS, TEST)
    assert trained == [(0, None), (1, None)]


def test_an_interruption_without_a_folder_is_just_that():
    with pytest.raises(KeyboardInterrupt):
        run_study(study(**SMALL), ROWS, TEST, report=Interrupting(1))


def test_another_study_in_the_folder_is_refused(done):
    with pytest.raises(Misuse, match=r"another study, which differs in settings\.methods"):
        run_study(study(), ROWS, TEST, folder=done[1])
    plan = study(
        methods={"fine-tune": FineTune(), "one-bit": OneBit(), "nothing": Nothing(), "only-dense": OnlyDense()}
    )
    with pytest.raises(Misuse, match=r"another study, which differs in records\.digest"):
        run_study(plan, Records(1 - ROWS.x, ROWS.y, ROWS.ids, classes=10), TEST, folder=done[1])
    backwards = ROWS.select(list(reversed(range(400))))
    assert run_study(plan, backwards, TEST, folder=done[1]).to_json() == done[0].to_json()


def test_without_test_rows_nothing_is_made_up():
    found = run_study(study(**SMALL, methods=(FineTune(),)), ROWS)
    figures = found.line(0.0, "class:3", "fine-tune").figures
    assert {"test", "attack", "efficacy", "tug_of_war", "disparity"} & set(figures) == set()
    assert {"unlearning_accuracy", "retain", "gap"} <= set(figures)
    assert "not measured" in study_grids(found)[0].rows[0]


def test_of_one_seed_no_interval_is_claimed_over_seeds():
    figures = run_study(study(**SMALL), ROWS, TEST).line(0.0, "class:3", "fine-tune").figures
    assert isinstance(figures["gap"], float)
    assert figures["retain"].interval == "clopper-pearson over rows"


def test_the_floor_is_retraining_with_other_coins():
    found = run_study(study(**SMALL, floor=True), ROWS, TEST)
    line = found.line(0.0, "class:3", "(retrain, other coins)")
    request = study().scenarios[0].request(ROWS, 0)
    split = request.split(ROWS)
    rng = child(generator(0), "study", "class:3")
    answer = Retrain(coins="fresh")(train(study().recipe_of(0.0, 0), ROWS), ROWS, request, rng=rng)
    row = measure(answer.trained, split.forget, split.retain, TEST, method="floor")
    assert (line.kind, line.figures["retain"], line.figures["test"]) == ("floor", row.retain, row.test)


def test_a_report_shows_every_row_and_escapes_what_is_not_measured(done, tmp_path):
    html, _ = write(study_report(done[0], "the command"), tmp_path)
    page = html.read_text()
    for word in ("Forgetting class:3, 80 % sparse", "one-bit", "sparse models are too hard", "gap against seconds"):
        assert word in page
    assert page.count("<svg") == 4
    grids = study_grids(done[0])
    assert [grid.caption.partition(" ")[2] for grid in grids] == [
        "class:3, dense",
        "class:3, 80 % sparse",
        "random:0.1, dense",
        "random:0.1, 80 % sparse",
    ]
    row = next(row for row in grids[1].rows if row[0] == "only-dense")
    assert set(row[1:]) == {"not measured"}
    assert "only-dense: 0 of 2 measured (sparse models are too hard; use fine-tune)" in grids[1].notes


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"methods": ()}, Misuse, "needs methods"),
        ({"scenarios": ()}, Misuse, "needs scenarios"),
        ({"methods": ["fine-tune"]}, Misuse, "methods must be methods, got 'fine-tune'; give one, as FineTune()"),
        ({"methods": {"mine": FineTune}}, Misuse, "methods must be methods, got <class"),
        ({"methods": FineTune()}, Misuse, "methods must be a sequence or a mapping, got FineTune"),
        ({"methods": "fine-tune"}, Misuse, "methods must be a sequence or a mapping, got 'fine-tune'"),
        ({"methods": None}, Misuse, "methods must be a sequence or a mapping, got None"),
        ({"scenarios": "class:3"}, Misuse, "scenarios must be a sequence, got 'class:3'; give one, as .*class:3"),
        ({"scenarios": Scenario.parse("class:3")}, Misuse, "scenarios must be a sequence, got Scenario"),
        ({"scenarios": (3,)}, Misuse, "scenarios must be Scenario or text, got 3; give one, as class:3"),
        ({"sparsities": 0.5}, Misuse, "sparsities must be a sequence, got 0.5"),
        ({"seeds": 3}, Misuse, "seeds must be a sequence, got 3"),
        ({"seeds": ()}, Misuse, "needs seeds"),
        ({"seeds": (1, 1)}, Misuse, "seeds must differ"),
        ({"sparsities": (0, 1)}, Misuse, "sparsities must be"),
        ({"sparsities": (0, 0.0)}, Misuse, "sparsities must differ"),
        ({"sparsities": (0.5,), "by": "luck"}, BadRecipe, "magnitude, synflow or random"),
        ({"sparsities": (0.5,), "rewind": 7}, BadRecipe, "rewind must be at most"),
        ({"methods": (FineTune(), FineTune(lr=0.1))}, Misuse, "two methods have the same name"),
        ({"methods": (Retrain(),)}, Misuse, "always there"),
        ({"trials": 0}, Misuse, "trials must be"),
        ({"criterion": "test"}, Misuse, "criterion is"),
        ({"search_seed": 1}, Misuse, "search_seed"),
        ({"validation": 1.0}, Misuse, "validation must be"),
        ({"equal_compute": "steps"}, Misuse, "equal_compute is"),
        ({"recipe": Recipe(model="mlp", loss="mse")}, Misuse, "classifiers"),
    ],
)
def test_settings_that_make_no_study_are_refused(changes, error, complaint):
    with pytest.raises(error, match=complaint):
        study(**changes)


def test_what_does_not_fit_the_records_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(grid, "train", lambda *a, **k: pytest.fail("trained"))
    for plan, error in (
        (study(scenarios=("random:0.1", "class:17")), UnknownRecord),
        (study(scenarios=("random:0.999",)), EmptyRetain),
    ):
        with pytest.raises(error):
            run_study(plan, ROWS, TEST, folder=tmp_path / "s")
    with pytest.raises(Misuse, match="give test rows, or trials=1"):
        run_study(study(trials=2), ROWS, folder=tmp_path / "s")
    assert not (tmp_path / "s").exists()
