"""What is shown of votes: every figure from the votes themselves, and the same picture each time."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from expunge.certify.votes import DeletionRobustness
from expunge.core.errors import Misuse
from expunge.report.votes import (
    _figure,
    predictions_grid,
    robustness_by_shards_grid,
    robustness_grid,
    robustness_svg,
)


def value(votes, labels, shards):
    votes = torch.tensor(votes)
    names = tuple(f"t-{row}" for row in range(len(votes)))
    return DeletionRobustness(model="m", shards=shards, ids=names, labels=torch.tensor(labels), votes=votes)


FIVE = value([[5, 0], [0, 5], [3, 2], [1, 4], [4, 1]], [0, 1, 0, 0, 1], 6)
ONE = value([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], [0, 1, 0, 0, 1], 1)


def figures(cells):
    return [cell.split(" ")[0] for cell in cells]


def lines(axes):
    """Heights of the curves, without their bars' ends."""
    return [[round(float(y), 6) for y in line.get_ydata()] for line in axes.get_lines() if line.get_linestyle() == "-"]


def test_a_line_for_each_number_of_touched_shards():
    grid = robustness_grid(FIVE)
    assert [figures(row) for row in grid.rows] == [
        ["0", "100.0", "60.0"],
        ["1", "80.0", "40.0"],
        ["2", "40.0", "40.0"],
        ["3", "0.0", "0.0"],
    ]
    assert grid.caption == "6 shards, 5 of them vote; 5 predictions, median radius 1"
    assert "Not covered: wrong predictions" in grid.notes
    assert "lower bound" in grid.notes


def test_a_line_for_each_prediction():
    rows = predictions_grid(FIVE).rows
    assert rows[0] == ("t-0", "0", "0", "2", "5 0")
    assert rows[4] == ("t-4", "1", "0", "1", "4 1")


def test_numbers_of_shards_beside_each_other():
    grid = robustness_by_shards_grid([ONE, FIVE], (1, 2))
    assert grid.headers[-2:] == ("floor, k=1", "floor, k=2")
    assert figures(grid.rows[0]) == ["1", "1", "60.0", "0", "0.0", "0.0", "0.0"]
    assert figures(grid.rows[1]) == ["6", "5", "60.0", "1", "80.0", "40.0", "40.0"]


def test_the_picture_shows_the_floors_and_is_the_same_each_time():
    picture = robustness_svg([ONE, FIVE])
    assert robustness_svg([ONE, FIVE]) == picture
    ElementTree.fromstring(picture.encode())
    assert "#010203" not in picture
    assert "dc:date" not in picture
    above, below = _figure([ONE, FIVE]).axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["1 shard", "6 shards"]
    assert lines(above)[-1] == [60.0, 40.0, 40.0, 0.0]
    assert lines(below)[-1] == [100.0, 80.0, 40.0, 0.0]


def test_nothing_to_draw_is_told():
    with pytest.raises(Misuse, match="no votes to draw"):
        robustness_svg([])
