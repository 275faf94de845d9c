"""What a plan and a sweep look like: every figure where it belongs, and the same without colour, dark or light."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from expunge.certify.accountant import Budget
from expunge.core.errors import Unsupported
from expunge.core.estimate import Estimate
from expunge.report import write
from expunge.report.certified import (
    _DRAWINGS,
    _STYLES,
    _figure,
    _verdict,
    plan_grid,
    plan_reasons,
    sweep_report,
    sweep_svg,
)
from expunge.study.certified import CertifiedPlan, CertifiedSweep, SweptLine
from expunge.study.certified_tries import Figures, Line
from expunge.study.certified_ways import WAYS


def share(value, half=0.01):
    return Estimate(value, value - half, value + half, 10)


FIGURES = Figures(
    accuracy=share(0.85),
    retrained=share(0.86),
    seconds_first=0.444,
    seconds_later=0.0123,
    later=5,
    early_first=0.84,
    early_later=None,
)
ABOUT = {
    "model": "softmax",
    "records": 32561,
    "test_rows": 100,
    "rows_per_request": 1,
    "draws": 10,
    "seed": 0,
    "threads": 1,
    "radius": 10.3,
}
LINES = (
    Line(method="newton-head", can="yes", basis="proved", sigma=0.01, cap=0.00012, epsilon=1.0, figures=FIGURES),
    Line(method="newton-head", can="yes", basis="proved", sigma=0.05, cap=0.0006, chosen=True, figures=FIGURES),
    Line(
        method="newton-unlearning",
        can="yes",
        basis="proved",
        sigma=1668.4,
        vacuous=True,
        demand="a ball",
        remarks=("Vacuous: doing nothing.",),
        figures=FIGURES,
    ),
    Line(method="guo-removal", can="no", why="no sigma does"),
    Line(method="guo-removal-paper", can="current only", why="nothing bounds it", figures=FIGURES),
)
PLAN = CertifiedPlan(budget=Budget(requests=500), about=ABOUT, retrained=share(0.851), seconds_retrain=2.1, lines=LINES)


def test_each_method_has_its_line_with_its_figures_in_place():
    grid = plan_grid(PLAN)
    assert grid.caption == "500 requests of 1 row within epsilon 1, delta 1e-05: softmax on 32,561 rows"
    assert {len(row) for row in grid.rows} == {len(grid.headers)}
    cells = {row[0]: dict(zip(grid.headers, row, strict=True)) for row in grid.rows}
    assert list(cells) == [
        "retrain",
        "newton-head",
        "newton-head (sigma chosen)",
        "newton-unlearning",
        "guo-removal",
        "guo-removal-paper",
    ]
    assert cells["newton-head"] == {
        "method": "newton-head",
        "can": "yes",
        "basis": "proved",
        "sigma": "0.01",
        "cap": "0.00012",
        "with noise": "85.0 (84.0 to 86.0)",
        "retrained": "86.0 (85.0 to 87.0)",
        "first s": "0.44",
        "later s": "0.012",
        "as long": "84.0, not measured",
    }
    assert cells["newton-unlearning"]["can"] == "yes, vacuous"
    assert cells["guo-removal-paper"]["can"] == "current only"
    assert set(list(cells["guo-removal"].values())[2:]) == {""}
    assert cells["retrain"]["first s"] == cells["retrain"]["later s"] == "2.1"


def test_a_sigma_chosen_by_looking_is_told_of_and_only_then():
    assert "depends on them, which no guarantee covers: choose it on public data" in plan_grid(PLAN).notes
    without = replace(PLAN, lines=tuple(line for line in LINES if not line.chosen))
    assert "public data" not in plan_grid(without).notes


def test_reasons_say_why_and_what_must_be_so_from_the_start():
    assert plan_reasons(PLAN) == [
        ("newton-unlearning", "from the start: a ball"),
        ("", "Vacuous: doing nothing."),
        ("guo-removal", "cannot: no sigma does"),
        ("guo-removal-paper", "only in part: nothing bounds it"),
    ]


def swept(method, epsilon, accuracy=0.85, gain=0.05, **more):
    found = {"can": "yes", "seeds": 2, "seconds_first": 0.4, "seconds_later": 0.01, **more}
    return SweptLine(
        method=method,
        epsilon=epsilon,
        accuracy=share(accuracy),
        gain_first=share(gain),
        gain_later=share(gain),
        **found,
    )


SWEEP = CertifiedSweep(
    about={**ABOUT, "seeds": 2, "epsilons": [0.1, 1.0, 10.0], "delta": 1e-5, "requests": 500},
    retrained=share(0.851),
    seconds_retrain=2.1,
    lines=(
        *(swept("newton-head", epsilon) for epsilon in (0.1, 1.0, 10.0)),
        swept("newton-unlearning", 1.0, 0.1, -0.7, vacuous=True),
        swept("guo-removal-paper", 1.0, 0.5, -0.3, can="current only", seconds_later=None),
        SweptLine(method="guo-removal", epsilon=1.0, can="no", why="no sigma does"),
    ),
)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plots_show_each_method_where_it_belongs():
    accuracy, seconds, gain = _figure(SWEEP, list(_DRAWINGS.values())).axes
    assert legend(accuracy) == ["newton-head", "newton-unlearning", "guo-removal-paper", "exact retraining"]
    assert "guo-removal-paper, later" not in legend(seconds)
    assert {"newton-head, first", "newton-head, later", "exact retraining"} <= set(legend(seconds))
    assert "retraining for as long" in legend(gain)
    assert [axes.get_xscale() for axes in (accuracy, seconds, gain)] == ["log"] * 3
    drawn = {(x, round(y, 6)) for line in accuracy.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert {(0.1, 85.0), (1.0, 85.0), (10.0, 85.0), (1.0, 10.0), (1.0, 50.0)} <= drawn
    reference = next(line for line in accuracy.get_lines() if line.get_label() == "exact retraining")
    assert set(reference.get_ydata()) == {85.1}


def test_marks_tell_methods_apart_and_hollow_ones_what_does_not_hold():
    assert len({mark for mark, _ in _STYLES}) == len(_STYLES) >= len(WAYS)
    (axes,) = _figure(SWEEP, list(_DRAWINGS.values())[:1]).axes
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1 and line.get_markersize() == 8]
    fill = {(line.get_ydata()[0], line.get_marker()): line.get_fillstyle() for line in points}
    assert fill == {(85.0, "o"): "full", (10.0, "s"): "none", (50.0, "^"): "none"}


def test_a_page_of_its_own_with_its_figures(tmp_path):
    html, data = write(sweep_report(SWEEP, "expunge certify plot --data adult"), tmp_path)
    page = html.read_text()
    assert page.count("<svg") == 3
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r'xlink:href="#', '"', page))
    assert "currentColor" in page
    assert "no sigma does" in page
    found = json.loads(data.read_text())["chapters"]["certified"]
    assert [line["method"] for line in found["lines"]] == [line.method for line in SWEEP.lines]


def test_the_verdict_names_only_methods_that_keep_the_budget_and_are_worth_it():
    assert _verdict(SWEEP).startswith("At some epsilon, newton-head gave more accuracy")
    for lines in (
        [swept("newton-head", 1.0, gain=0.005)],  # within its interval
        [swept("newton-head", 1.0, vacuous=True)],
        [swept("newton-head", 1.0, can="current only")],
    ):
        assert _verdict(replace(SWEEP, lines=tuple(lines))).startswith("No method that keeps")


def test_a_picture_of_its_own_is_dark_on_light_or_light_on_dark_and_the_same_each_time():
    svg = sweep_svg(SWEEP)
    ElementTree.fromstring(svg.encode())
    assert svg == sweep_svg(SWEEP)
    assert "prefers-color-scheme:dark" in svg
    assert "#010203" not in svg


@pytest.mark.parametrize("accuracy", [1.0, 0.0])
def test_the_best_and_the_worst_accuracy_can_be_drawn(accuracy):
    flat = Estimate(accuracy, accuracy, accuracy, 1)
    lines = (replace(swept("newton-head", 1.0), accuracy=flat, seconds_later=0.0),)
    ElementTree.fromstring(sweep_svg(replace(SWEEP, lines=lines, retrained=flat)).encode())


def test_nothing_to_draw_is_told(tmp_path):
    nothing = replace(SWEEP, lines=tuple(line for line in SWEEP.lines if line.accuracy is None))
    (chapter,) = sweep_report(nothing).chapters
    assert chapter.plots == {}
    assert chapter.grids[-1].caption == "What cannot be had"
    with pytest.raises(Unsupported, match="no method can be drawn"):
        sweep_svg(nothing)
