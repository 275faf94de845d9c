"""How far a row may be moved, in the model's units and as it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records
from expunge.learn.loop import prepare

_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """The data's own range: of all pixels together, or of each column of floats.

    Attributes:
        low: as stored; one number for pixels, else (...) of a row's shape.
        high: likewise.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, records: Records) -> Bounds:
        """Of these records. Unsupported for whole numbers other than pixels. Cost: one pass."""
        x = records.x
        if x.dtype is torch.uint8:
            return cls(low=x.min(), high=x.max())
        if not movable(x):
            raise Unsupported(f"rows of {x.dtype} cannot be moved a little; use SelectRequests")
        return cls(low=x.amin(0), high=x.amax(0))

    def around(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Least and greatest values of rows within `eps` of these, all as the model reads them."""
        low, high = (prepare(one, x.dtype) for one in (self.low, self.high))
        return torch.maximum(x - eps, low), torch.minimum(x + eps, high)

    def stored(self, x: Tensor, old: Tensor, eps: float) -> Tensor:
        """Rows rounded to how `old` is stored, never further from it than `eps`, and within the range."""
        if old.dtype is torch.uint8:
            reach = math.floor(eps * 255 + _SLACK)
            steps = (x * 255).round() - old
            moved = (old + steps.clamp(-reach, reach)).clamp(int(self.low), int(self.high))
            return moved.to(torch.uint8)
        moved = torch.minimum(torch.maximum(x.to(old.dtype), old - eps), old + eps)
        return torch.minimum(torch.maximum(moved, self.low), self.high)


@dataclass(frozen=True, kw_only=True, eq=False)
class Box:
    """Where some rows may be moved to, as the model reads them: unlike `Bounds` with all 256 levels of a pixel.

    Attributes:
        start: where they are.
        low: least values.
        high: greatest values.
        eps: the most that an entry may change; of pixels a whole number of levels, so that rounding stays within.
        kind: how they are stored.
    """

    start: Tensor
    low: Tensor
    high: Tensor
    eps: float
    kind: torch.dtype

    @classmethod
    def of(cls, rows: Records, everything: Records, eps: float, dtype: torch.dtype) -> Box:
        """Of rows that a model of this dtype reads, within the range that each column of floats has in all records.

        Raises:
            Misuse: for pixels and an `eps` below one level.
        """
        start, x = prepare(rows.x, dtype), everything.x
        if x.dtype is torch.uint8:
            eps = _whole_levels(eps)
            bounds = Bounds(low=torch.zeros_like(x[0]), high=torch.full_like(x[0], 255))
        else:
            bounds = Bounds(low=x.amin(0), high=x.amax(0))
        low, high = bounds.around(start, eps)
        return cls(start=start, low=low, high=high, eps=eps, kind=x.dtype)

    def clipped(self, x: Tensor) -> Tensor:
        """The nearest rows within."""
        return torch.maximum(torch.minimum(x, self.high), self.low)

    def rounded(self, x: Tensor) -> Tensor:
        """As they will be read again."""
        return (x * 255).round() / 255 if self.kind is torch.uint8 else x

    def stored(self, x: Tensor) -> Tensor:
        """As they are stored."""
        return (x * 255).round().to(torch.uint8) if self.kind is torch.uint8 else x.to(self.kind)


def movable(x: Tensor) -> bool:
    """Whether rows stored so can be moved a little: pixels and floats, but no tokens."""
    return x.is_floating_point() or x.dtype is torch.uint8


def _whole_levels(eps: float) -> float:
    levels = math.floor(eps * 255 + _SLACK)
    if levels < 1:
        raise Misuse(f"eps must be at least one level of a pixel, 1/255, got {eps}; raise it")
    return levels / 255
