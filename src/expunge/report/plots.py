"""Pictures as SVG text that follows the page's colours, readable without colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from expunge.core.errors import Unsupported
from expunge.core.estimate import Estimate

_INK = "#010203"  # replaced by the page's own text colour
_SHAPES = {"exact": "o", "certified": "s", "none": "X"}
_PLACES: list[tuple[Literal["left", "right"], int]] = [
    (side, height) for height in (0, 14, -14, 28, -28, 42, -42) for side in ("left", "right")
]
_COLOURS = {"exact": "#2f7d4f", "certified": "#2a6fb5", "none": "#c0562b"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method in the plot of accuracy against seconds."""

    name: str
    claim: str
    accuracy: Estimate
    seconds: float


def accuracy_against_seconds(points: Sequence[Point], label: str) -> str:
    """SVG of accuracy with its interval against seconds (log scale); shapes tell the claim, circles are exact."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        claim = point.claim.split(" ")[0]
        value = 100 * point.accuracy.value
        bars = [[value - 100 * point.accuracy.low], [100 * point.accuracy.high - value]]
        seconds, colour = max(point.seconds, 1e-3), _COLOURS[claim]
        axes.errorbar([seconds], [value], yerr=bars, color=colour, marker=_SHAPES[claim], markersize=9, capsize=3)
    for claim in dict.fromkeys(point.claim.split(" ")[0] for point in points):
        axes.plot([], [], _SHAPES[claim], color=_COLOURS[claim], label=f"claim: {claim}")
    axes.set_xscale("log")
    axes.set_xlabel("seconds (log scale)")
    axes.set_ylabel(label)
    axes.margins(x=0.18, y=0.15)
    _follow_the_page(axes)
    _name_points(figure, axes, points)
    axes.legend(frameon=False, labelcolor=_INK, loc="best")
    return _svg(figure)


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each name beside its point, at the first of some places where it covers no other name or point."""
    figure.draw_without_rendering()
    spots = axes.transData.transform([(max(point.seconds, 1e-3), 100 * point.accuracy.value) for point in points])
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in spots]
    for point in points:
        anchor = (max(point.seconds, 1e-3), 100 * point.accuracy.value)
        for side, height in _PLACES:
            offset = (9 if side == "left" else -9, height)
            text = axes.annotate(point.name, anchor, offset, textcoords="offset points", color=_INK, va="center")
            text.set_horizontalalignment(side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(point.name, anchor, (9, 5), textcoords="offset points", color=_INK)
            box = text.get_window_extent()
        taken.append(box)


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
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    # No date and a fixed salt for element names: the same figures give the same bytes.
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def rows_as_png(rows: Tensor, path: Path, *, columns: int = 20) -> Path:
    """Write image rows (n, h, w) or (n, 3, h, w), uint8, as one picture; Unsupported for rows that are no images."""
    if rows.dim() not in (3, 4) or str(rows.dtype) != "torch.uint8":
        raise Unsupported(
            f"only uint8 images can be shown, got {rows.dtype} of shape {tuple(rows.shape)}; omit the option"
        )
    pixels = rows.movedim(1, -1).numpy() if rows.dim() == 4 else rows.numpy()
    missing = -len(pixels) % columns
    blank = np.full((missing, *pixels.shape[1:]), 255, np.uint8)
    grid = np.concatenate([pixels, blank]).reshape(-1, columns, *pixels.shape[1:])
    picture = np.concatenate([np.concatenate(list(line), axis=1) for line in grid], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.squeeze()).save(path)
    return path
