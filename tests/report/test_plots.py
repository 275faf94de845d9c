"""Plots are the same bytes each time and legible; rows become pictures only if they are pictures."""

import datetime
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.core.errors import Misuse, Unsupported
from expunge.core.estimate import proportion
from expunge.report import Point, accuracy_against_seconds, rows_as_png
from expunge.report.plots import _box, _drawn


def point(name, accuracy, seconds, claim="none"):
    return Point(name=name, claim=claim, accuracy=proportion(round(accuracy * 10_000), 10_000), seconds=seconds)


CROWD = [
    point("retrain", 0.975, 2.6, "exact"),
    point("retrain shards", 0.932, 2.7, "exact"),
    point("sisa", 0.932, 0.8, "exact (pathwise)"),
    point("head, newton", 0.9766, 1.0, "certified"),
    point("(retrain, same time)", 0.971, 1.0),
    point("gradient-ascent", 0.974, 0.0),
    *(point(f"method number {k}", 0.976 + k / 5000, 1 + k / 50) for k in range(8)),
]


def test_the_same_points_give_the_same_bytes_without_a_date(fresh_python):
    first = accuracy_against_seconds(CROWD, "test accuracy, %")
    assert accuracy_against_seconds(CROWD, "test accuracy, %") == first
    assert str(datetime.datetime.now(datetime.UTC).year) not in first
    assert "dc:date" not in first
    ElementTree.fromstring(first)
    code = """
from expunge.core.estimate import proportion
from expunge.report import Point, accuracy_against_seconds
points = [Point(name=n, claim=c, accuracy=proportion(k, 10_000), seconds=s) for n, c, k, s in given["points"]]
answer = accuracy_against_seconds(points, "test accuracy, %")
"""
    plain = [(p.name, p.claim, round(p.accuracy.value * 10_000), p.seconds) for p in CROWD]
    assert fresh_python(code, points=plain) == first


def test_the_plot_takes_the_colour_of_the_page():
    assert "currentColor" in accuracy_against_seconds(CROWD, "accuracy")
    assert "#010203" not in accuracy_against_seconds(CROWD, "accuracy")


def test_names_cover_neither_each_other_nor_the_edge():
    figure = _drawn(CROWD, "accuracy")
    names = figure.axes[0].texts
    assert {name.get_text() for name in names} == {each.name for each in CROWD}
    boxes = [_box(name) for name in names]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_one_point_is_enough():
    ElementTree.fromstring(accuracy_against_seconds(CROWD[:1], "accuracy"))


@pytest.mark.parametrize("shape", [(7, 4, 5), (7, 1, 4, 5), (7, 3, 4, 5)])
def test_rows_become_one_picture(tmp_path, shape):
    rows = torch.arange(int(np.prod(shape))).remainder(251).to(torch.uint8).reshape(shape)
    path = rows_as_png(rows, tmp_path / "deep" / "rows.png", columns=3)
    with Image.open(path) as picture:
        seen = np.asarray(picture)
        assert picture.mode == ("RGB" if shape[1] == 3 else "L")
    assert seen.shape[:2] == (3 * 4, 3 * 5)
    fifth = rows[4].movedim(0, -1).squeeze() if len(shape) == 4 else rows[4]
    assert np.array_equal(seen[4:8, 5:10], fifth.numpy())
    assert (seen[8:, 5:] == 255).all()


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(3, 4), torch.zeros(3, 4, 5), torch.zeros(3, 2, 4, 5, dtype=torch.uint8), torch.zeros(3, 4).byte()],
)
def test_what_is_no_picture_is_refused(tmp_path, rows):
    with pytest.raises(Unsupported, match="only uint8 images can be shown"):
        rows_as_png(rows, tmp_path / "rows.png")
    assert not list(tmp_path.iterdir())


def test_no_rows_are_no_picture(tmp_path):
    with pytest.raises(Misuse, match="no rows"):
        rows_as_png(torch.zeros(0, 4, 5).byte(), tmp_path / "rows.png")
