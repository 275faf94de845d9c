"""The gradients of rows as a matrix G of n by p that need not exist: what is asked of it, and how to keep it.

Of a linear layer a row's gradient is an outer product ``b a'`` of what came in and of the derivative by what went out,
so that ``G G'`` is the entrywise product of two Gram matrices of n by n (Goodfellow, 2015), and G is never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import Misuse

COLUMNS = 1 << 14


@runtime_checkable
class RowGradients(Protocol):
    """A matrix G whose n rows are the gradients of n rows, by what it does."""

    @property
    def rows(self) -> int:
        """n."""

    @property
    def size(self) -> int:
        """p."""

    @property
    def made(self) -> int:
        """Work so far, in gradients of one row: n, and more where some are made again."""

    def gram(self) -> Float[Tensor, "n n"]:
        """``G G'``, in float64."""

    def times(self, v: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """``G v``."""

    def transposed(self, c: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
        """``G' c``."""


@runtime_checkable
class Piece(Protocol):
    """Some columns of G: those of one parameter, or of several that lie side by side."""

    @property
    def width(self) -> int:
        """How many columns."""

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""

    def cross(self, other: Piece) -> Float[Tensor, "n m"]:
        """``G H'`` in float64 over these columns, H of other rows and of the same kind."""

    def times(self, v: Tensor) -> Tensor:
        """``G v``."""

    def transposed(self, c: Tensor) -> Tensor:
        """``G' c``."""


class Matrix:
    """A piece that is kept as it is."""

    def __init__(self, matrix: Float[Tensor, "n width"]) -> None:
        """Keep the matrix, not copied."""
        self.matrix = matrix

    @property
    def width(self) -> int:
        """How many columns."""
        return self.matrix.shape[1]

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""
        return self.matrix.numel()

    def cross(self, other: Piece) -> Tensor:
        """Summed in float64 over blocks of columns, so that float32 does not lose what damping is to be seen beside."""
        if not isinstance(other, Matrix):
            raise Misuse("pieces of one parameter must be of one kind; make both from the same objective")
        mine, others = self.matrix.split(COLUMNS, 1), other.matrix.split(COLUMNS, 1)
        total = torch.zeros(len(self.matrix), len(other.matrix), dtype=torch.float64, device=self.matrix.device)
        for a, b in zip(mine, others, strict=True):
            total += a @ b.T
        return total

    def times(self, v: Tensor) -> Tensor:
        """``G v``."""
        return self.matrix @ v

    def transposed(self, c: Tensor) -> Tensor:
        """``G' c``."""
        return self.matrix.T @ c


class Outer:
    """A piece whose row i is the outer product of `b[i]` and `a[i]`: a linear layer's weight on one vector a row."""

    def __init__(self, b: Float[Tensor, "n outputs"], a: Float[Tensor, "n inputs"]) -> None:
        """Keep both, not copied."""
        self.b, self.a = b, a

    @property
    def width(self) -> int:
        """How many columns."""
        return self.a.shape[1] * self.b.shape[1]

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""
        return self.a.numel() + self.b.numel()

    def cross(self, other: Piece) -> Tensor:
        """The entrywise product of two small Gram matrices. Cost: n m (inputs + outputs), not n m inputs outputs."""
        if not isinstance(other, Outer):
            raise Misuse("pieces of one parameter must be of one kind; make both from the same objective")
        return (self.a @ other.a.T).double() * (self.b @ other.b.T)

    def times(self, v: Tensor) -> Tensor:
        """``b[i]' V a[i]`` of each row i."""
        return ((self.b @ v.view(self.b.shape[1], -1)) * self.a).sum(1)

    def transposed(self, c: Tensor) -> Tensor:
        """``sum_i c[i] b[i] a[i]'``."""
        return ((self.b * c[:, None]).T @ self.a).reshape(-1)


class Pieces:
    """G as pieces side by side, all rows at once."""

    def __init__(self, pieces: Sequence[Piece], rows: int) -> None:
        """Pieces in the order of the vector's parameters."""
        self.pieces, self.rows = tuple(pieces), rows
        self.size = sum(piece.width for piece in self.pieces)

    @property
    def made(self) -> int:
        """n: products with what is kept need no more gradients."""
        return self.rows

    @property
    def numbers(self) -> int:
        """How many numbers it keeps."""
        return sum(piece.numbers for piece in self.pieces)

    def cross(self, other: Pieces) -> Float[Tensor, "n m"]:
        """``G H'`` in float64, H the same columns of other rows."""
        parts = [mine.cross(its) for mine, its in zip(self.pieces, other.pieces, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def gram(self) -> Float[Tensor, "n n"]:
        """``G G'``, in float64."""
        return self.cross(self)

    def times(self, v: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """``G v``."""
        cut = v.split([piece.width for piece in self.pieces])
        return torch.stack([piece.times(part) for piece, part in zip(self.pieces, cut, strict=True)]).sum(0)

    def transposed(self, c: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
        """``G' c``."""
        return torch.cat([piece.transposed(c) for piece in self.pieces])
