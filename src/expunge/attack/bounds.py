"""How far a row may be moved, in the model's units and as it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.core.errors import Unsupported
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
        if not x.is_floating_point():
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
