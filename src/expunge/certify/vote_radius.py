r"""How many touched shards cannot flip a vote, and what that leaves of the accuracy.

Let :math:`N_c` be the votes for class c on a row, and w the lowest class among those with most votes, which is the
prediction. With :math:`D_c = N_w - N_c - [c < w]`, class c does not beat w as long as :math:`D_c \ge 0`. A touched
shard had at most one vote and has at most one afterwards, so that it lowers :math:`D_c` by at most 2: by 2 if its vote
moves from w to c, by 1 if a voter for w abstains. So requests that touch at most
:math:`\lfloor \min_{c \ne w} D_c / 2 \rfloor` shards leave the prediction as it is, whatever they remove or replace,
and whatever the touched shards answer afterwards. One more shard with free replies flips it: the radius is exact.

Source: the vote argument of deep partition aggregation (Levine and Feizi, 2021), with ties to the lowest class. The
proof in full, and where it ends: docs/votes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.errors import Impossible, Misuse
from expunge.core.estimate import Estimate, proportion


def winners(votes: Tensor) -> Tensor:
    """(n,) the class with most votes; of those with equally many the lowest. Misuse as for `radius`."""
    _refuse_other_than_votes(votes)
    classes = votes.shape[1]
    return (votes.to(torch.int64) * classes - torch.arange(classes, device=votes.device)).argmax(1)


def radius(votes: Tensor) -> Tensor:
    """How many touched shards cannot flip each prediction, whatever is removed from them.

    Args:
        votes: (n, classes) counts of equal votes, of any integer dtype.

    Returns:
        (n,) int64, >= 0, in shards. With one more shard some reply flips the prediction.

    Raises:
        Misuse: if these are no counts of votes, or nobody votes on some row.
        Impossible: with a single class, which nothing can flip: no radius says that.

    Cost: O(n classes).
    """
    won = winners(votes)[:, None]
    counts = votes.to(torch.int64)
    precedes = torch.arange(votes.shape[1], device=votes.device) < won
    rivals = (counts + precedes).scatter(1, won, -1)
    return (counts.gather(1, won)[:, 0] - rivals.amax(1)).div(2, rounding_mode="floor")


def _refuse_other_than_votes(votes: Tensor) -> None:
    if votes.dim() != 2 or votes.is_floating_point() or votes.is_complex() or votes.dtype is torch.bool:
        raise Misuse(f"votes must be counts of shape (rows, classes), got {votes.dtype} of {tuple(votes.shape)}")
    if votes.shape[1] < 2:
        raise Impossible(f"a vote needs two classes for one to be flipped to the other, got {votes.shape[1]}")
    if len(votes) and int(votes.min()) < 0:
        raise Misuse(f"counts of votes cannot be negative, got {int(votes.min())}")
    silent = (votes.sum(1) == 0).nonzero()
    if len(silent):
        raise Misuse(f"nobody votes on row {int(silent[0])}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What holds after any requests that touch at most `k` shards.

    Attributes:
        k: shards touched at most; k owners touch at most k.
        stable: share of predictions that cannot change.
        accuracy: lower bound on the accuracy: share of predictions that are right and cannot change.
    """

    k: int
    stable: Estimate
    accuracy: Estimate

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {"k": self.k, "stable": self.stable.to_json(), "accuracy": self.accuracy.to_json()}


@dataclass(frozen=True, kw_only=True, eq=False)
class DeletionRobustness:
    """The votes of a sharded model on some rows, and what follows from them.

    Of one model as it stands: the radius counts all shards touched since, in however many requests. A later model has
    votes and radii of its own.

    Attributes:
        model: digest of the model that voted.
        shards: how many it has, those without rows included.
        ids: the n rows' names.
        labels: (n,) their classes.
        votes: (n, classes) int64.
    """

    model: str
    shards: int
    ids: tuple[str, ...]
    labels: Tensor
    votes: Tensor

    def __post_init__(self) -> None:
        _refuse_other_than_votes(self.votes)
        if not len(self.ids) == len(self.labels) == len(self.votes):
            got = f"{len(self.ids)} ids, {len(self.labels)} labels and votes on {len(self.votes)} rows"
            raise Misuse(f"give one id and one label for each row, got {got}")
        if not len(self.ids):
            raise Misuse("robustness is of predictions, got no rows; give at least one")
        totals = self.votes.sum(1)
        if int(totals.min()) != int(totals.max()) or int(totals.max()) > self.shards:
            told = f"{int(totals.min())} to {int(totals.max())}"
            raise Misuse(f"each shard votes once on every row or never, got {told} votes of {self.shards} shards")

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, DeletionRobustness) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.model, self.shards, self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        middle, one = self.median_radius, self.floor(1)
        return (
            f"{self.shards} shards, median radius {middle:g}; accuracy {self.accuracy_floor(0):.1%} %, at least "
            f"{one.accuracy:.1%} % after any deletions from one shard"
        )

    @property
    def voters(self) -> int:
        """How many shards vote: all but those without rows."""
        return int(self.votes[0].sum())

    @cached_property
    def predicted(self) -> Tensor:
        """(n,) the model's predictions."""
        return winners(self.votes)

    @cached_property
    def radius(self) -> Tensor:
        """(n,) shards that may be touched without changing the prediction."""
        return radius(self.votes)

    @property
    def median_radius(self) -> float:
        """Median over the rows."""
        return float(np.median(self.radius.numpy()))

    def accuracy_floor(self, k: int) -> Estimate:
        """Accuracy that is left after any requests that touch at most k shards: share right with radius >= k.

        A lower bound: it lets every row meet its own worst case, and one set of requests is seldom the worst for all.
        A wrong prediction counts as wrong, whatever its radius. On these very rows the value itself is the bound; the
        interval (Clopper-Pearson) is for rows drawn as these were, and says nothing of other trainings.

        Raises:
            Misuse: if k is no integer >= 0.
        """
        return self._share((self.predicted == self.labels) & (self.radius >= _whole(k)))

    def floor(self, k: int) -> Floor:
        """Accuracy and share of unchanged predictions at least left after requests that touch at most k shards."""
        return Floor(k=k, stable=self._share(self.radius >= _whole(k)), accuracy=self.accuracy_floor(k))

    def curve(self) -> tuple[Floor, ...]:
        """The floors at k = 0, 1, ... until nothing is left."""
        return tuple(self.floor(k) for k in range(int(self.radius.max()) + 2))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        plain = {"labels": self.labels.tolist(), "votes": self.votes.tolist()}
        return {"model": self.model, "shards": self.shards, "ids": list(self.ids), **plain}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeletionRobustness:
        """The value that `to_json` wrote."""
        return cls(
            model=data["model"],
            shards=data["shards"],
            ids=tuple(data["ids"]),
            labels=torch.tensor(data["labels"], dtype=torch.int64),
            votes=torch.tensor(data["votes"], dtype=torch.int64),
        )

    def _share(self, chosen: Tensor) -> Estimate:
        return proportion(int(chosen.sum()), len(self))


def _whole(k: int) -> int:
    if not isinstance(k, int) or isinstance(k, bool) or k < 0:
        raise Misuse(f"k must be an integer >= 0, the number of shards touched, got {k!r}")
    return k
