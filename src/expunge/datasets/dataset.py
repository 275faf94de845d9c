"""What a loader returns, and the made-up owners of rows whose real owners nobody knows."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.core import coins
from expunge.core.errors import Misuse
from expunge.core.records import Records


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """Real data, in the two parts that its publisher (or the loader, where it says so) made.

    Attributes:
        name: the word by which `get` knows it.
        train: the rows to train on.
        test: the rows to measure on; never trained on.
        about: one or two sentences: what a row is, how many there are, who collected them.
        licence: of the data, not of the package that carries it.
        labels: the name of each class, in the order of its number.
        features: the name of each column of a table; empty for images and embeddings.
    """

    name: str
    train: Records
    test: Records
    about: str
    licence: str
    labels: tuple[str, ...]
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = f"{len(self.train):,} + {len(self.test):,} rows of shape {self.train.shape}"
        return f"{self.name}: {rows}, {len(self.labels)} classes; licence {self.licence}"


def row_ids(name: str, part: str, count: int) -> tuple[str, ...]:
    """The ids ``name-part-00000``, ... of the first `count` rows of a file; the number is the row's place in it."""
    return tuple(f"{name}-{part}-{row:05d}" for row in range(count))


def artificial_owners(ids: tuple[str, ...], owners: int | None) -> tuple[str, ...] | None:
    """A made-up owner ``owner-000``, ... for each id, drawn by a hash of the id alone; None for `owners` = None.

    Nothing is counted or balanced, so that no row's owner depends on which other rows there are: the numbers of rows
    an owner has differ as they do in life (binomially, mean n / owners).

    Raises:
        Misuse: if `owners` is below 1.
    """
    if owners is None:
        return None
    if owners < 1:
        raise Misuse(f"owners must be >= 1, or None to make each row its own owner, got {owners}")
    width = max(3, len(str(owners - 1)))
    return tuple(f"owner-{coins.bucket('expunge/datasets/owner', row, owners):0{width}d}" for row in ids)
