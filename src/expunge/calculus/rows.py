"""The gradients of many rows within a bound on memory: kept, or made again whenever they are needed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.calculus.factored import Maker, maker
from expunge.calculus.objective import Objective
from expunge.calculus.pieces import Pieces, RowGradients
from expunge.core.errors import Misuse


def row_gradients(objective: Objective, x: Tensor, y: Tensor, *, most: int = 1 << 28) -> RowGradients:
    """G of these rows; in which way it is held changes the numbers by rounding only.

    Args:
        objective: whose gradients.
        x: the rows, at least one.
        y: their labels.
        most: numbers that may be kept, at 4 or 8 bytes each (1 or 2 GiB); past that `Streamed` makes them again. A
            linear layer on one vector a row keeps inputs + outputs a row, every other parameter its size.

    Raises:
        Misuse: if two rows' gradients do not fit.
    """
    make, each = maker(objective, x, y)
    if each * len(x) <= most:
        return make(x, y)
    return Streamed(objective, x, y, make, block=most // (2 * each))


class Streamed:
    """G of too many rows to be kept, made again block by block of rows.

    ``G v`` is a forward-mode pass and ``G' c`` a backward pass of a weighted sum: neither makes G. For ``G G'`` two
    blocks exist at a time. Cost of that: with B blocks, a row's gradient is made ``(B + 1) / 2`` times on average.

    Attributes:
        made: gradients of one row so far; ``G v`` and ``G' c`` count as one of each row.
    """

    def __init__(self, objective: Objective, x: Tensor, y: Tensor, make: Maker, *, block: int) -> None:
        """The rows, how to make G of some, and how many rows are a block."""
        if block < 1:
            raise Misuse(
                f"the gradients of two rows of {objective.size:,} entries exceed the memory allowed; allow more"
            )
        self.objective, self.x, self.y, self._make = objective, x, y, make
        self.rows, self.size, self.made = len(x), objective.size, 0
        self._blocks = torch.arange(len(x), device=x.device).split(block)

    def _of(self, block: Tensor) -> Pieces:
        self.made += len(block)
        return self._make(self.x[block], self.y[block])

    def gram(self) -> Float[Tensor, "n n"]:
        """``G G'``, in float64."""
        gram = torch.zeros(self.rows, self.rows, dtype=torch.float64, device=self.x.device)
        for place, block in enumerate(self._blocks):
            mine = self._of(block)
            gram[block[:, None], block] = mine.gram()
            for other in self._blocks[place + 1 :]:
                part = mine.cross(self._of(other))
                gram[block[:, None], other] = part
                gram[other[:, None], block] = part.T
        return gram

    def times(self, v: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """``G v``."""
        self.made += self.rows
        return torch.cat([self.objective.scores(self.x[block], self.y[block], v) for block in self._blocks])

    def transposed(self, c: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
        """``G' c``."""
        self.made += self.rows
        total = torch.zeros(self.size, dtype=c.dtype, device=c.device)
        for block in self._blocks:
            total += self.objective.gradient(self.x[block], self.y[block], weights=c[block])
        return total
