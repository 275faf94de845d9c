"""What a report says of a study in a sentence: no more than its intervals do, and what is not done yet."""

from dataclasses import replace

import pytest

from expunge.audit import Row
from expunge.core.estimate import Estimate
from expunge.report import study_grids, study_report
from expunge.study import Cell, StudyResult

SETTINGS = {
    **{
        "sparsities": [0.0],
        "scenarios": {"class:3": {}},
        "methods": {"tuned": {}},
        "recipe": {"model": "m", "epochs": 1},
    },
    **{"by": "magnitude", "rewind": 0, "rounds": 1, "trials": 1, "criterion": "validation", "search_seed": -1},
    **{"equal_compute": "seconds", "floor": False, "validation": 0.2, "searched": {}},
}


def share(value):
    return None if value is None else Estimate(value, 0.0, 1.0, 100)


def row(gap, *, test=0.9, attack=0.5, seconds=1.0):
    """A model that is so far from retraining in accuracy on the removed rows alone: times four of the mean gap."""
    return Row(
        method="m",
        claim="none",
        forget=share(0.1 + gap),
        retain=share(0.9),
        test=share(test),
        attack=share(attack),
        seconds=seconds,
    )


def cells(seed, *, original=0.4, tuned=0.2, yardstick=0.3, **more):
    models = [("original", "original", original), ("retrain", "retrain", 0.0), ("tuned", "method", tuned)]
    return [
        Cell(sparsity=0.0, scenario="class:3", seed=seed, method=name, kind=kind, row=row(gap, **more))
        for name, kind, gap in (*models, ("tuned", "yardstick", yardstick))
    ]


def result(*seeds, asked=None, **settings):
    """A study of these cells; without `asked` of as many seeds."""
    settings = {**SETTINGS, "seeds": list(range(asked or len(seeds))), **settings}
    about = {"settings": settings, "records": {"rows": 100}, "test": {"rows": 100}}
    return StudyResult(about=about, cells=tuple(cell for seed in seeds for cell in seed), trials=())


def headline_of(study):
    return study_report(study).chapters[0].headline


def sure(count=3, **more):
    """Seeds whose differences hardly spread."""
    return [cells(seed, **{"tuned": 0.2 + seed / 500, **more}) for seed in range(count)]


def test_what_is_nearer_over_the_whole_interval_on_all_seeds_is_counted():
    report = study_report(result(*sure()))
    assert report.verdict.startswith("Of 1 rows (a method, a scenario and a sparsity), 1 are nearer")
    assert report.verdict.endswith("over the whole interval.")
    assert headline_of(result(*sure())) == "nearest to retraining: tuned, dense, 5.05 points away"
    assert "unfinished" not in report.facts


@pytest.mark.parametrize("more", [{"original": 0.1, "yardstick": 0.3}, {"original": 0.4, "yardstick": 0.1}])
def test_nearer_than_one_of_the_two_is_not_enough(more):
    assert "0 are nearer" in study_report(result(*sure(**more))).verdict


def test_one_seed_of_three_has_no_interval_and_is_not_counted():
    whole = [cells(seed) for seed in range(3)]
    failed = [
        replace(cell, row=None, why="it broke") if cell.method == "tuned" and cell.seed else cell
        for seed in whole
        for cell in seed
    ]
    assert "0 are nearer" in study_report(result(failed, asked=3)).verdict
    assert "1 of the rows were not measured on all seeds" in study_report(result(failed, asked=3)).verdict
    assert headline_of(result(failed, asked=3)).startswith("no method is told apart from the original")
    two = [
        replace(cell, row=None, why="it broke") if cell.seed == 2 and cell.method == "tuned" else cell
        for seed in sure()
        for cell in seed
    ]
    assert isinstance(result(two, asked=3).line(0.0, "class:3", "tuned").figures["over_original"], Estimate)
    assert "0 are nearer" in study_report(result(two, asked=3)).verdict


def test_of_one_seed_the_figure_decides_and_the_verdict_says_so():
    assert "1 are nearer" in study_report(result(cells(0))).verdict
    assert study_report(result(cells(0))).verdict.endswith("on one seed, so without an interval.")
    assert "0 are nearer" in study_report(result(cells(0, tuned=0.35))).verdict
    assert headline_of(result(cells(0, tuned=0.5))) == "no method is nearer to retraining than the original is"


def test_a_method_whose_difference_to_the_original_covers_zero_is_not_called_the_nearest():
    spread = [cells(seed, tuned=tuned) for seed, tuned in enumerate((0.0, 0.3, 0.6))]
    line = result(*spread).line(0.0, "class:3", "tuned").figures["over_original"]
    assert line.value < 0 < line.high
    assert headline_of(result(*spread)).startswith("no method is told apart from the original")
    worse = sure(tuned=0.7)
    assert headline_of(result(*worse)) == "no method is nearer to retraining than the original is"


def test_the_headline_says_where_stopping_early_is_nearer():
    told = headline_of(result(*sure(yardstick=0.1)))
    assert told.endswith("5.05 points away; retraining stopped after as much compute (2.50 points) is nearer")
    unsure = [cells(seed, tuned=0.2, yardstick=0.1 + seed / 10) for seed in range(3)]
    assert "not told apart from retraining stopped after as much compute (5.00 points)" in headline_of(result(*unsure))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "UA, RA, TA and attack"),
        ({"test": None, "attack": None}, "UA and RA"),
        ({"attack": None}, "UA, RA and TA"),
    ],
)
def test_table_and_plot_say_which_figures_the_gap_is_over(more, said):
    study = result(*sure(**more))
    chapter = study_report(study).chapters[0]
    assert f"The gap is over {said}." in study_grids(study)[0].notes
    assert list(chapter.plots) == [f"class:3, dense: gap against seconds, over {said}"]


def test_intervals_hold_only_what_can_be_and_say_that_they_were_cut():
    wild = [cells(seed, tuned=gap, seconds=seconds) for seed, gap, seconds in ((0, 0.05, 0.1), (1, 0.8, 90.0))]
    figures = result(*wild).line(0.0, "class:3", "tuned").figures
    for name in ("unlearning_accuracy", "gap", "tug_of_war"):
        assert (figures[name].low, figures[name].high) == (0, 1)
        assert figures[name].interval == "student t over seeds, cut to [0, 1]"
    assert figures["seconds"].low == 0
    assert figures["seconds"].high > 90
    assert figures["seconds"].interval == "student t over seeds, cut to >= 0"
    assert figures["over_original"].low == -1
    assert figures["retain"].interval == "student t over seeds"
    assert "two seeds say next to nothing" in study_grids(result(*wild))[0].notes
    assert "two seeds" not in study_grids(result(*sure()))[0].notes


def test_what_is_not_done_yet_is_told_first():
    more = {"sparsities": [0.0, 0.5], "scenarios": {"class:3": {}, "random:0.1": {}}}
    study = result(cells(0), cells(1), asked=3, **more)
    report = study_report(study)
    told = "40 of 48 cells are not done yet; nothing yet of sparsity 0.5, scenario random:0.1, seed 2"
    assert report.facts["unfinished"] == told
    assert report.verdict.startswith(f"Unfinished: {told}. So far: Of 1 rows")
    assert [(one.name, one.done) for one in report.chapters] == [("class:3", True), ("random:0.1", False)]
    assert study.to_do()[0] == ("cell", 0.0, "random:0.1", 0, "original", "original")


def test_what_is_half_done_is_told_too():
    study = result(cells(0), cells(1)[:2], asked=2)
    assert study_report(study).facts["unfinished"] == "2 of 8 cells are not done yet; incomplete: seed 1"


def test_a_cell_that_could_not_be_measured_is_done_and_one_that_is_missing_is_not():
    whole = [replace(cell, row=None, why="it broke") if cell.kind == "method" else cell for cell in cells(0)]
    assert result(whole).to_do() == ()
    assert result(whole[:-1]).to_do() == (("cell", 0.0, "class:3", 0, "yardstick", "tuned"),)
    assert result(whole, floor=True).to_do() == (("cell", 0.0, "class:3", 0, "floor", "(retrain, other coins)"),)
    assert study_report(result(whole[:-1])).facts["unfinished"] == "1 of 4 cells are not done yet"


def test_disparity_is_the_mean_of_four_by_hand():
    def model(kind, forget, retain, test, efficacy):
        told = replace(row(0), forget=share(forget), retain=share(retain), test=share(test))
        return Cell(
            sparsity=0.0, scenario="class:3", seed=0, method=kind, kind=kind, row=told, efficacy=share(efficacy)
        )

    pair = [model("retrain", 0.1, 0.9, 0.8, 0.6), model("original", 0.2, 0.7, 0.5, 0.2)]
    figures = result(pair).line(0.0, "class:3", "original").figures
    assert figures["disparity"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 4, abs=1e-12)
    assert figures["gap"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.0) / 4, abs=1e-12)


def test_the_original_is_drawn_as_what_doing_nothing_gives():
    chapter = study_report(result(*sure())).chapters[0]
    assert "doing nothing" in next(iter(chapter.plots.values()))
    assert any("The thin steps are the front" in text for text in chapter.text)
