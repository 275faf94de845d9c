"""A model and its rows as screens see them: gradients of rows, computed once and indexed afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from expunge.calculus import Objective
from expunge.calculus.factored import maker
from expunge.calculus.pieces import Matrix, Outer, Pieces
from expunge.core.errors import UnknownRecord, Unsupported
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.ensemble import ShardEnsemble
from expunge.learn.loop import prepare, row_losses
from expunge.learn.models import features_of, head_of
from expunge.screen.asked import Asked

BATCH = 1024
_NUMBERS = 1 << 26
"""Numbers that the gradients of one batch may take, where they are not in factors: 256 MB in float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Gradients of rows by the last layer, in factors: row i has the outer product of `r[i]` and (`h[i]`, 1).

    Of a row that is replaced it is the new row's gradient less the old one's, and so of two terms.

    Attributes:
        r: (terms, outputs) derivative of the loss by the outputs; for cross-entropy, probabilities less the one-hot.
        h: (terms, width) what the last layer sees; None leaves only the bias's gradient, which is `r`.
        old: how many terms at the end are those of the old rows, one a row, which count with a minus.
    """

    r: Tensor
    h: Tensor | None
    old: int = 0

    def __len__(self) -> int:
        return len(self.r) - self.old

    def _terms(self, other: Gradients) -> Tensor:
        inner = self.r @ other.r.T
        return inner if self.h is None or other.h is None else inner * (self.h @ other.h.T + 1)

    def cross(self, other: Gradients) -> Tensor:
        """(n, m) inner products with the rows of another. Cost: n m (outputs + width); no gradient is made."""
        terms = self._terms(other)
        if self.old:
            terms = terms[: len(self)] - terms[len(self) :]
        return terms[:, : len(other)] - terms[:, len(other) :] if other.old else terms

    def squares(self) -> Tensor:
        """(n,) squared norms. Cost: n (outputs + width)."""

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(1)

        def terms(one: slice, two: slice) -> Tensor:
            by_r = inner(self.r[one], self.r[two])
            return by_r if self.h is None else by_r * (inner(self.h[one], self.h[two]) + 1)

        new, old = slice(0, len(self)), slice(len(self), None)
        if not self.old:
            return terms(new, new)
        return (terms(new, new) + terms(old, old) - 2 * terms(new, old)).clamp_min(0)

    def take(self, index: Tensor) -> Gradients:
        """The rows at these positions."""
        places = torch.cat([index, index + len(self)]) if self.old else index
        return Gradients(
            r=self.r[places], h=None if self.h is None else self.h[places], old=len(index) if self.old else 0
        )

    def less(self, other: Gradients) -> Gradients:
        """Row by row, these less the other's."""
        h = None if self.h is None or other.h is None else torch.cat([self.h, other.h])
        return Gradients(r=torch.cat([self.r, other.r]), h=h, old=len(other.r))

    def joined(self, other: Gradients) -> Gradients:
        """These rows, then the other's; neither of differences."""
        h = None if self.h is None or other.h is None else torch.cat([self.h, other.h])
        return Gradients(r=torch.cat([self.r, other.r]), h=h)

    def without_features(self) -> Gradients:
        """The bias's gradients alone."""
        return Gradients(r=self.r, h=None, old=self.old)


class Scene:
    """A trained model on its records. What is computed of all rows is kept, so that a request is a few look-ups.

    A sharded model is seen as the mean of its shards' probabilities, even if it votes: a vote has no derivative. That
    is not how a row acts on it, which is through its own shard only.

    Attributes:
        trained: the model.
        records: all records; those that it is not trained on are left alone.
        objective: the model's losses by all its parameters.
        members: (n,) positions in the records of the rows that it is trained on.
    """

    def __init__(self, trained: Trained, records: Records) -> None:
        """Look at the model; nothing is computed yet.

        Raises:
            UnknownRecord: if the model stands on records that are not given.
        """
        lost = trained.ids.difference(records.ids)
        if lost:
            raise UnknownRecord(
                f'the model stands on {len(lost):,} records that are not given, first "{min(lost)}"; give the whole set'
            )
        self.trained, self.records = trained, records
        self.module = seen(trained, records)
        self.objective = Objective(self.module, row_losses(trained.recipe))
        inside = [place for place, record in enumerate(records.ids) if record in trained.ids]
        self.members = torch.tensor(inside, dtype=torch.int64)
        self._row = torch.full((len(records),), -1, dtype=torch.int64)
        self._row[self.members] = torch.arange(len(inside))

    @cached_property
    def rows(self) -> Records:
        """The records that the model is trained on."""
        return self.records.select(self.members)

    def index(self, asked: Asked) -> Tensor:
        """(k,) where the trained rows of a request stand in `rows`."""
        return self._row[asked.places]

    def batches(self, records: Records, batch: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows as the model reads them, and labels."""
        like = next(self.module.parameters())
        for x, y in records.batches(torch.arange(len(records)).split(batch)):
            yield prepare(x.to(like.device), like.dtype), y.to(like.device)

    @cached_property
    def headed(self) -> bool:
        """Whether the last linear layer makes the outputs, so that its inputs are worth looking at; tried, not read."""
        if self.trained.parts:
            return False
        x = next(self.batches(self.rows.select(range(min(2, len(self.rows))))))[0]
        try:
            with torch.no_grad():
                made = head_of(self.module)[1](features_of(self.module, x))
                return made.shape == self.module(x).shape and bool(torch.allclose(made, self.module(x), atol=1e-4))
        except Unsupported:
            return False

    def last(self, records: Records) -> Gradients:
        """The last layer's gradients of these rows. Cost: one forward pass."""
        losses, r, h = row_losses(self.trained.recipe), [], []
        for x, y in self.batches(records):
            with torch.no_grad():
                features = features_of(self.module, x) if self.headed else None
                out = self.module(x) if features is None else head_of(self.module)[1](features)
            out = out.detach().requires_grad_()
            with torch.enable_grad():
                r.append(torch.autograd.grad(losses(out, y).sum(), out)[0].flatten(1))
            h += [] if features is None else [features]
        return Gradients(r=torch.cat(r), h=torch.cat(h) if h else None)

    @cached_property
    def whole(self) -> Gradients:
        """The last layer's gradients of all rows."""
        return self.last(self.rows)

    def of(self, asked: Asked) -> Gradients:
        """The last layer's gradients of the requested rows, strangers last; differences for a replacement."""
        held = self.whole.take(self.index(asked))
        if asked.new is not None:
            return self.last(asked.new).less(held)
        return held if asked.strangers is None else held.joined(self.last(asked.strangers))

    def pieces(self, records: Records) -> Iterator[Pieces]:
        """The gradients of these rows by all parameters, in factors, a batch at a time."""
        first = next(self.batches(records, 2))
        make, each = maker(self.objective, *first)
        for x, y in self.batches(records, max(1, min(BATCH, _NUMBERS // max(each, 1)))):
            yield make(x, y)

    @cached_property
    def squares(self) -> Tensor:
        """(n,) squared norms of all rows' gradients by all parameters. Cost: one forward and one backward pass."""
        return self.squares_of(self.rows)

    def squares_of(self, records: Records) -> Tensor:
        """(n,) squared norms of these rows' gradients by all parameters."""
        return torch.cat([inner(one, one) for one in self.pieces(records)])


def inner(a: Pieces, b: Pieces) -> Tensor:
    """(n,) inner products of the rows of two, row by row."""
    total = torch.zeros(a.rows, dtype=torch.float64)
    for mine, other in zip(a.pieces, b.pieces, strict=True):
        if isinstance(mine, Outer) and isinstance(other, Outer):
            total += ((mine.a * other.a).sum(1) * (mine.b * other.b).sum(1)).double().cpu()
        elif isinstance(mine, Matrix) and isinstance(other, Matrix):
            total += (mine.matrix * other.matrix).sum(1).double().cpu()
    return total


def seen(trained: Trained, records: Records) -> nn.Module:
    """The module that is differentiated: the model's own, or of a sharded one the mean of its shards."""
    if not trained.parts:
        return trained.module
    modules = [part.module for part in trained.parts if part.ids]
    outputs = records.classes if records.classes is not None else records.y.reshape(len(records), -1).shape[1]
    return ShardEnsemble(modules, outputs, trained.recipe.loss, "mean").eval()
