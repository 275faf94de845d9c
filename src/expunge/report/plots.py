"""Pictures as SVG text that follows the page's colours, readable without colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from expunge.core.errors import Misuse, Unsupported
from expunge.core.estimate import Estimate

if TYPE_CHECKING:  # matplotlib takes long to import, and few commands draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_INK = "#010203"  # replaced by the page's own text colour
_SHAPES = {"exact": "o", "certified": "s", "none": "X"}
_COLOURS = {"exact": "#2f7d4f", "certified": "#2a6fb5", "none": "#c0562b"}
_LINE = 13
_PLACES: list[tuple[Literal["left", "right"], int]] = [
    (side, sign * lines * _LINE)
    for lines in range(15)
    for sign in ((1, -1) if lines else (1,))
    for side in ("left", "right")
]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method in the plot of accuracy against seconds."""

    name: str
    claim: str
    accuracy: Estimate
    seconds: float


def accuracy_against_seconds(points: Sequence[Point], label: str) -> str:
    """SVG of accuracy with its interval against seconds (log scale); shapes tell the claim, circles are exact."""
    return _svg(_drawn(points, label))


def _drawn(points: Sequence[Point], label: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        claim, (x, low, y, high) = _claim(point), _place(point)
        bars = [[y - low], [high - y]]
        axes.errorbar([x], [y], yerr=bars, color=_COLOURS[claim], marker=_SHAPES[claim], markersize=9, capsize=3)
    for claim in dict.fromkeys(map(_claim, points)):
        axes.plot([], [], _SHAPES[claim], color=_COLOURS[claim], label=f"claim: {claim}")
    axes.set_xscale("log")
    axes.set_xlabel("seconds (log scale)")
    axes.set_ylabel(label)
    axes.margins(x=0.18, y=0.15)
    _follow_the_page(axes)
    figure.legend(frameon=False, labelcolor=_INK, loc="outside upper right", ncols=len(_SHAPES))
    _name_points(figure, axes, points)
    return figure


def _claim(point: Point) -> str:
    return point.claim.split(" ")[0]


def _place(point: Point) -> tuple[float, float, float, float]:
    """Seconds, and the accuracy's lower end, value and upper end in percent."""
    accuracy = point.accuracy
    return max(point.seconds, 1e-3), 100 * accuracy.low, 100 * accuracy.value, 100 * accuracy.high


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each name beside its point, at the first of some places where it covers no other name, point or bar.

    A name that had to move is tied to its point by a line.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # from here on, names are placed in a layout that stands
    taken = []
    for x, low, y, high in map(_place, points):
        (left, bottom), (_, middle), (_, top) = axes.transData.transform([(x, low), (x, y), (x, high)])
        taken.append(Bbox.from_extents(left - 8, middle - 8, left + 8, middle + 8))
        taken.append(Bbox.from_extents(left - 4, bottom - 1, left + 4, top + 1))
    for point in points:
        x, _, y, _ = _place(point)
        for side, height in _PLACES:
            offset = (10 if side == "left" else -10, height)
            line = {"arrowstyle": "-", "color": _INK, "alpha": 0.4, "lw": 0.6} if height else None
            text = axes.annotate(
                point.name,
                (x, y),
                offset,
                textcoords="offset points",
                color=_INK,
                va="center",
                ha=side,
                arrowprops=line,
            )
            box = _box(text)
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and axes.bbox.y0 <= box.y0 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(point.name, (x, y), (10, 0), textcoords="offset points", color=_INK, va="center")
            box = _box(text)
        taken.append(box)


def _box(text: Annotation) -> Bbox:
    """Where the words stand, without the line."""
    from matplotlib.text import Text

    text.get_window_extent()  # which also puts them there
    return Text.get_window_extent(text)


def _follow_the_page(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.grid(alpha=0.25)
    axes.tick_params(colors=_INK, which="both")
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(_INK)
    for name, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(name in ("left", "bottom"))


def _svg(figure: Figure) -> str:
    import matplotlib

    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    # No date and a fixed salt for element names: the same figures give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "expunge"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r'<g id="[\w.]+_\d+"', "<g", buffer.getvalue())  # names of groups, alike in every plot
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def rows_as_png(rows: Tensor, path: Path, *, columns: int = 20) -> Path:
    """Write image rows (n, h, w) or (n, 3, h, w), uint8, as one picture; Unsupported for rows that are no images."""
    if rows.dim() not in (3, 4) or (rows.dim() == 4 and rows.shape[1] not in (1, 3)) or rows.dtype is not torch.uint8:
        raise Unsupported(
            f"only uint8 images can be shown, got {rows.dtype} of shape {tuple(rows.shape)}; omit the option"
        )
    if not len(rows):
        raise Misuse("there are no rows to show, got none; give at least one")
    pixels = rows.movedim(1, -1).numpy() if rows.dim() == 4 else rows.numpy()
    missing = -len(pixels) % columns
    blank = np.full((missing, *pixels.shape[1:]), 255, np.uint8)
    grid = np.concatenate([pixels, blank]).reshape(-1, columns, *pixels.shape[1:])
    picture = np.concatenate([np.concatenate(list(line), axis=1) for line in grid], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.squeeze()).save(path)
    return path
