"""The plot of gaps against seconds."""

from expunge.core.estimate import Estimate
from expunge.report import Spent, gap_against_seconds
from expunge.report.pareto import _drawn, front


def spent(name, seconds, gap, low=None, high=None, claim="none"):
    return Spent(name=name, claim=claim, seconds=seconds, gap=Estimate(gap, low or gap, high or gap, 3))


POINTS = [
    spent("slow and near", 9.0, 0.01),
    spent("quick and far", 0.1, 0.3, 0.2, 0.4),
    spent("dominated", 2.0, 0.2),
    spent("as near, slower", 1.5, 0.1),
    spent("near enough", 1.0, 0.1),
    spent("retrain", 20.0, 0.0, claim="exact, pathwise"),
]


def test_the_front_holds_what_nothing_beats():
    names = [point.name for point in front(POINTS)]
    assert names == ["quick and far", "near enough", "slow and near", "retrain"]
    figures = {p.name: (p.seconds, p.gap.value) for p in POINTS}
    beaten = {
        name
        for name, (seconds, gap) in figures.items()
        for other in figures.values()
        if other[0] <= seconds and other[1] <= gap and other != (seconds, gap)
    }
    assert set(names) == set(figures) - beaten


def test_points_and_yardstick_stand_where_they_belong():
    axes = _drawn(POINTS, [(5.0, 0.05), (0.5, 0.4)]).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["retraining stopped early"].get_xdata()) == [0.5, 5.0]
    assert list(lines["retraining stopped early"].get_ydata()) == [40.0, 5.0]
    assert list(lines["front"].get_ydata()) == [30.0, 10.0, 1.0, 0.0]
    assert {text.get_text() for text in axes.texts} == {point.name for point in POINTS}
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "gap to retraining, points")


def test_doing_nothing_is_a_line_of_its_own_height():
    lines = {line.get_label(): line for line in _drawn(POINTS, [], 0.25).axes[0].get_lines()}
    assert list(lines["doing nothing (original)"].get_ydata()) == [25.0, 25.0]
    assert "doing nothing (original)" not in {line.get_label() for line in _drawn(POINTS, []).axes[0].get_lines()}


def test_an_interval_below_zero_is_cut_and_the_same_figures_give_the_same_bytes():
    wide = [spent("wide", 1.0, 0.1, -0.3, 1.5)]
    assert gap_against_seconds(wide) == gap_against_seconds(wide)
    drawn = _drawn(wide, []).axes[0]
    segments = drawn.containers[0].lines[2][0].get_segments()[0]
    assert [round(y, 6) for y in segments[:, 1]] == [0.0, 100.0]
