"""Two training systems that let removed rows leak into what they call exact retraining.

They import nothing of the liars, which name them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Generator, Tensor, nn

from expunge.core.claim import Claim
from expunge.core.errors import Unsupported
from expunge.core.protocols import Need, Unlearned
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.ensemble import ShardEnsemble
from expunge.learn.training import train
from expunge.testing.foreign import booked

_SHARDS = 4


class Normalised(nn.Module):
    """A module that sees its rows shifted and scaled."""

    mean: Tensor
    spread: Tensor

    def __init__(self, inner: nn.Module, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, x: Tensor) -> Tensor:
        """The inner module's answer to the normalised rows."""
        answer: Tensor = self.inner((x - self.mean) / self.spread)
        return answer


def leaky_statistics(recipe: Recipe, records: Records) -> Trained:
    """Train on rows normalised by mean and spread of all of them."""
    return _trained_normalised(recipe, records, records.x.mean(0), records.x.std())


def _trained_normalised(recipe: Recipe, records: Records, mean: Tensor, spread: Tensor) -> Trained:
    rows = Records((records.x - mean) / spread, records.y, records.ids, records.owners, classes=records.classes)
    trained = train(recipe, rows)
    return replace(trained, module=Normalised(trained.module, mean, spread).eval())


@dataclass(frozen=True, kw_only=True)
class _CalledExact:
    """What both liars share: they take any model, keep the books, and claim to be exact."""

    claim: ClassVar[Claim] = Claim.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})

    def supports(self, trained: Trained) -> Unsupported | None:
        """Models of its own system only."""
        fine = isinstance(trained.module, Normalised) or trained.parts
        return None if fine else Unsupported("this model was trained elsewhere; use retrain")


@dataclass(frozen=True, kw_only=True)
class FrozenStatistics(_CalledExact):
    """Retrains on the retained rows, normalised as before: mean and spread still hold the removed rows.

    Seen: every pipeline whose scaler is fitted once, before the first deletion.
    """

    name: ClassVar[str] = "FrozenStatistics"

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Retrain within the old normalisation."""
        problem = self.supports(trained)
        if problem is not None:
            raise problem
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        if not len(split.forget):
            return booked(trained, trained.module, split, Claim.NONE, name=self.name)
        old = trained.module.state_dict()
        again = _trained_normalised(trained.recipe, split.retain, old["mean"], old["spread"])
        return booked(trained, again.module, split, self.claim, "pathwise", name=self.name, seconds=1e-3)


def positional_shards(recipe: Recipe, records: Records) -> Trained:
    """Train one model on every fourth row each, by the row's position."""
    recipe = recipe.completed(records)
    parts = tuple(
        train(_of_shard(recipe, shard), records.select(range(shard, len(records), _SHARDS))) for shard in range(_SHARDS)
    )
    return _assembled(recipe, parts)


def _of_shard(recipe: Recipe, shard: int) -> Recipe:
    return replace(recipe, seed=recipe.seed + shard)


def _assembled(recipe: Recipe, parts: tuple[Trained, ...]) -> Trained:
    module = ShardEnsemble([part.module for part in parts], recipe.model_args["outputs"], recipe.loss, "mean").eval()
    return Trained(module=module, recipe=recipe, ids=frozenset().union(*(part.ids for part in parts)), parts=parts)


@dataclass(frozen=True, kw_only=True)
class PositionalShards(_CalledExact):
    """Retrains the touched shards, whose rows were dealt by position among rows that are no longer there.

    Without the removed rows every later row would stand in another shard, so this is no training from scratch, and
    the dealing tells where rows were removed. Seen: shards cut with ``array_split`` over the indices.
    """

    name: ClassVar[str] = "PositionalShards"

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Retrain the touched shards on what remains of them."""
        problem = self.supports(trained)
        if problem is not None:
            raise problem
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        if not len(split.forget):
            return booked(trained, trained.module, split, Claim.NONE, name=self.name)
        leaving = frozenset(split.forget.ids)
        parts = tuple(
            train(_of_shard(trained.recipe, shard), records.take(sorted(part.ids - leaving)))
            if part.ids & leaving
            else part
            for shard, part in enumerate(trained.parts)
        )
        after = _assembled(trained.recipe, parts)
        result = booked(trained, after.module, split, self.claim, "pathwise", name=self.name, seconds=1e-3)
        return replace(result, trained=replace(result.trained, parts=parts))
