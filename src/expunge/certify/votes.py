"""Predictions that deletions cannot flip: certified robustness of equal-weight hard votes over shards.

Deletions that touch at most as many shards as a prediction's radius cannot change it (`vote_radius.py` says why). That
untouched shards answer as before is not assumed but made so: a shard is a function of its own owners' rows, its recipe
and the salt (`learn/shards.py`). A proof against every attack by requests, at the cost of a count: docs/votes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.certify.vote_radius import DeletionRobustness, Floor, radius, winners
from expunge.core.claim import Claim
from expunge.core.errors import Impossible, Misuse, Unsupported
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.ensemble import ShardEnsemble
from expunge.learn.loop import Report
from expunge.learn.predict import outputs
from expunge.learn.shards import first_unclean_slices
from expunge.learn.training import train

__all__ = [
    "DeletionRobustness",
    "Floor",
    "deletion_robustness",
    "radius",
    "robustness_by_shards",
    "touched_shards",
    "winners",
]


def deletion_robustness(trained: Trained, records: Records) -> DeletionRobustness:
    """The votes of a sharded model on these rows, with the radius of each prediction.

    Holds for what `Sisa` gives, and for retraining by the same recipe with the same coins, on the same build with as
    many threads. Not for methods that change shards which held none of the rows, nor for retraining with fresh coins.
    Accuracy floors mean something only on rows that the model was not trained on.

    Args:
        trained: a model of shards that vote, of exact standing.
        records: rows to be predicted, with their labels.

    Raises:
        Unsupported: for a whole model, a mean of shards, or shards that are no longer what training made of their rows.
        Impossible: for regression, which has no votes.
        Misuse: without rows, or for rows without classes.

    Cost: one forward pass of each shard.
    """
    ensemble = _voting(trained)
    if records.classes is None:
        raise Misuse("these rows have float targets, and the model votes for classes; give rows with classes")
    if not len(records):
        raise Misuse("robustness is of predictions, got no rows; give at least one")
    return DeletionRobustness(
        model=trained.digest(),
        shards=len(trained.parts),
        ids=records.ids,
        labels=records.y.cpu(),
        votes=outputs(_Votes(ensemble), records).cpu().to(torch.int64),
    )


def touched_shards(trained: Trained, forget: Records) -> frozenset[int]:
    """The shards that a request for these rows touches: predictions with at least as large a radius cannot change.

    Raises:
        Unsupported: for a model without shards.

    Cost: one hash an owner.
    """
    _refuse_whole(trained)
    return frozenset(first_unclean_slices(trained, forget))


def robustness_by_shards(
    recipe: Recipe, records: Records, test: Records, shards: Sequence[int], *, report: Report | None = None
) -> tuple[DeletionRobustness, ...]:
    """Train the recipe in so many shards, once for each number, and count the votes on the test rows.

    Args:
        recipe: trained as it is but for the number of shards; slices and salt stay if it has some.
        records: trained on.
        test: rows that nothing is trained on.
        shards: the numbers, each >= 1.
        report: told (what, steps done, steps in all) now and then.

    Raises:
        Unsupported, Impossible, Misuse: as `deletion_robustness`, before any work.

    Cost: about one training for each number.
    """
    if not shards:
        raise Misuse("name at least one number of shards, as 5,10,20, got none")
    sharding = recipe.sharding or Sharding(shards=1)
    recipes = [replace(recipe, sharding=replace(sharding, shards=count)) for count in shards]
    _refuse_without_votes(recipes[0])
    found = []
    for place, one in enumerate(recipes):
        trained = train(one, records, report=_of_one(report, shards, place))
        found.append(deletion_robustness(trained, test))
    return tuple(found)


def _of_one(report: Report | None, shards: Sequence[int], place: int) -> Report | None:
    if report is None:
        return None
    return lambda stage, done, steps: report(
        f"{place + 1} of {len(shards)}: {stage}", place * steps + done, len(shards) * steps
    )


class _Votes(nn.Module):
    """Answers with counts of votes, as floats that hold them exactly: batches are then those of predictions."""

    def __init__(self, ensemble: ShardEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Tensor) -> Tensor:
        return self.ensemble.votes(x).to(torch.float64)


def _voting(trained: Trained) -> ShardEnsemble:
    _refuse_without_votes(trained.recipe)
    _refuse_whole(trained)
    if not isinstance(trained.module, ShardEnsemble):
        raise Unsupported(f"votes are counted of shards, and this model is a {type(trained.module).__name__}; train it")
    if trained.standing is not Claim.EXACT:
        raise Unsupported(
            "these shards are no longer what training made of their rows, so that later requests change others than "
            "the touched ones; retrain first"
        )
    return trained.module


def _refuse_whole(trained: Trained) -> None:
    if not trained.parts:
        raise Unsupported("robustness is counted in shards, and this model is whole; train it in shards: --shards 20")


def _refuse_without_votes(recipe: Recipe) -> None:
    if recipe.loss != "cross_entropy":
        raise Impossible("a mean of real numbers moves with every deletion; only votes for classes can stand still")
    if recipe.sharding is not None and recipe.sharding.aggregate != "vote":
        raise Unsupported(
            f'shards that answer by their {recipe.sharding.aggregate} have no radius; use Sharding(aggregate="vote")'
        )
