"""Planted liars: methods with one fault each, and the check that must catch it.

Most of these faults were seen in published code. `Plain` is their honest sibling, which passes everything.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Generator, nn

from expunge.core.claim import Claim, Constant, Exactness, Guarantee
from expunge.core.coins import child, generator
from expunge.core.events import Removed
from expunge.core.protocols import Unlearned
from expunge.core.records import Records
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.loop import prepare
from expunge.learn.training import train as train_from_scratch
from expunge.testing.case import Train
from expunge.testing.foreign import booked
from expunge.testing.leaky import FrozenStatistics, PositionalShards, leaky_statistics, positional_shards
from expunge.testing.plain import Plain, descend, jittered, step_down
from expunge.testing.trial import Subject


class MutatesInput(Plain):
    """Trains the module that it was given. Seen: student and teacher one object (`self.model = model`)."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """No copy."""
        descend(trained.module, split.retain)
        return trained.module


class ShallowCopy(Plain):
    """Trains ``copy.copy(model)``, which shares every parameter. Seen: a teacher that moves with its student."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """A copy in name only."""
        student = copy.copy(trained.module)
        descend(student, split.retain)
        return student


class MovesAndRestores(Plain):
    """Trains the input through ``p.data`` and puts it back: whoever reads the reference meanwhile is misled."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Borrow, change, return."""
        kept = [parameter.data.clone() for parameter in trained.module.parameters()]
        descend(trained.module, split.retain)
        module = copy.deepcopy(trained.module)
        for parameter, was in zip(trained.module.parameters(), kept, strict=True):
            parameter.data.copy_(was)
        return module


class SeedsFromClock(Plain):
    """Jitters by coins that come from the clock, so that no run can be repeated."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Coins of its own."""
        return jittered(super().change(trained, records, split, rng), generator(time.time_ns() % 2**62))


class ReadsGlobalCoins(Plain):
    """Draws from torch's global generator. Seen: shuffling loaders without a generator."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Everybody's coins."""
        return jittered(super().change(trained, records, split, rng), None)


class ActsOnEmpty(Plain):
    """Goes on training when there is nothing to remove: models drift with every empty request."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """No early return."""
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        if len(split.forget):
            return super().__call__(trained, records, request, rng=rng)
        result = booked(trained, trained.module, split, Claim.NONE, name=self.name)
        drifted = self.change(trained, records, split, rng)
        return replace(result, trained=replace(trained, module=drifted))


class BatchesByPosition(Plain):
    """Reads batches in the order of the rows, so that positions decide the result."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """First come, first read."""
        module, x, y = copy.deepcopy(trained.module), prepare(split.retain.x, torch.float32), split.retain.y
        for rows in torch.arange(len(x)).split(32):
            step_down(module, x[rows], y[rows], 0.2)
        return module


class SwallowsUnknown(Plain):
    """Drops ids that it does not know and reports success on the rest. Seen: ``ids & known`` before any check."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Only what suits."""
        known = [i for i in request.ids if i in trained.ids or i in trained.gone]
        return super().__call__(trained, records, Request.remove(known), rng=rng)


class Resurrects(Plain):
    """Leaves out the rows of this request only: who left before comes back. Seen: a SISA that forgets its own lists."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """All records but those asked for today."""
        module = copy.deepcopy(trained.module)
        descend(module, records.without(split.forget.ids))
        return module


class ResurrectsExactly(Plain):
    """The same by retraining, and called exact."""

    claim: ClassVar[Claim] = Claim.EXACT
    exactness: ClassVar[Exactness | None] = "pathwise"

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Retrain on all records but those asked for today."""
        return train_from_scratch(trained.recipe, records.without(split.forget.ids)).module


class LosesTheBooks(Plain):
    """Books as gone only what today's request named, so that the next one may bring the others back."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Overwrite instead of add."""
        result = super().__call__(trained, records, request, rng=rng)
        fresh = result.trained.gone - trained.gone
        return replace(result, trained=replace(result.trained, gone=fresh or trained.gone))


class DoesNothing(Plain):
    """Books the rows as removed and returns the model as it was. Seen: a strategy that warns and returns its input."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """A copy of the same."""
        return copy.deepcopy(trained.module)


class FallsBackSilently(Plain):
    """Cannot work on shards, says so when asked, and then quietly changes one shard. Seen: `except` round a method."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Something else instead."""
        if not trained.parts:
            return super().__call__(trained, records, request, rng=rng)
        split = request.split(records, ids=trained.ids, gone=trained.gone)
        module = copy.deepcopy(trained.module)
        descend(next(iter(module.get_submodule("parts").children())), split.retain, steps=3)
        return booked(trained, module, split, Claim.NONE, name=self.name, seconds=1e-3)


class IgnoresReplacements(Plain):
    """Books the rows that come in the stead of others as trained on, and never reads them. Seen: our own ascent."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """A mere removal."""
        module = copy.deepcopy(trained.module)
        descend(module, split.retain.where(lambda record_id, _: record_id not in split.added))
        return module


class FineTunesAndCallsItExact(Plain):
    """Claims exactness for a heuristic."""

    claim: ClassVar[Claim] = Claim.EXACT
    exactness: ClassVar[Exactness | None] = "pathwise"


class OtherCoinsCalledPathwise(Plain):
    """Retrains with a new seed and calls that the same path: it can draw until it likes the result."""

    claim: ClassVar[Claim] = Claim.EXACT
    exactness: ClassVar[Exactness | None] = "pathwise"

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Exact in law at best."""
        result = super().__call__(trained, records, request, rng=rng)
        if result.trained is trained:
            return result
        recipe = replace(trained.recipe, seed=child(rng, "again").initial_seed())
        again = train_from_scratch(recipe, records.take(sorted(result.trained.ids)))
        return replace(result, trained=replace(result.trained, module=again.module, recipe=recipe))


class CertifiesWithoutGuarantee(Plain):
    """Says certified, with nothing behind it. Seen: an accountant that adds epsilons which the caller types in."""

    claim: ClassVar[Claim] = Claim.CERTIFIED
    said: ClassVar[Claim | None] = Claim.NONE

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """`Unlearned` refuses this, so it is written past its check."""
        result = super().__call__(trained, records, request, rng=rng)
        object.__setattr__(result, "claim", Claim.CERTIFIED)
        return result


class ClaimsMoreThanItsClass(Plain):
    """Its class declares nothing, and its results say exact (which they are, but nobody was told to expect it)."""

    said: ClassVar[Claim | None] = Claim.EXACT
    exactness: ClassVar[Exactness | None] = "pathwise"

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Retrain."""
        return train_from_scratch(trained.recipe, split.retain).module


class ReusesNoise(Plain):
    """Certified noise from named coins: whoever knows the name subtracts it, and two releases differ by the signal."""

    claim: ClassVar[Claim] = Claim.CERTIFIED
    said: ClassVar[Claim | None] = Claim.NONE

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Everything else in order: a guarantee (on supplied constants), a secret state."""
        result = super().__call__(trained, records, request, rng=rng)
        if result.trained is trained:
            return result
        module = result.trained.module
        secret = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        guarantee = Guarantee(
            epsilon=1.0,
            delta=1e-5,
            mu=0.3,
            sigma=1e-3,
            sensitivity=3e-4,
            mechanism="Gaussian",
            reference="retraining with the same noise",
            parameters=tuple(secret),
            releases="current",
            constants={"sensitivity": Constant(3e-4, "supplied")},
        )
        return Unlearned(
            trained=replace(result.trained, module=jittered(module, generator(7)), secret=secret),
            claim=Claim.CERTIFIED,
            exactness=None,
            guarantee=guarantee,
            cost=result.cost,
            events=(Removed(method=self.name, claim="certified", rows=len(trained.ids - result.trained.ids)),),
        )


class Overshoots(Plain):
    """Climbs the loss of the removed rows far past where retraining would be, and wrecks the model on the way."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Forty steps up."""
        module = copy.deepcopy(trained.module)
        descend(module, split.forget, steps=40, lr=-0.2)
        return module


class WrongSign(Plain):
    """Goes down the loss of the rows to forget. Seen: ``w -= H^-1 g / n`` where removal needs ``+=``."""

    def change(self, trained: Trained, records: Records, split: Split, rng: Generator) -> nn.Module:
        """Learn them better."""
        module = copy.deepcopy(trained.module)
        descend(module, split.forget, steps=10, lr=0.1)
        return module


@dataclass(frozen=True, kw_only=True)
class Lie:
    """A liar, the check that must catch it, and how its system trains."""

    method: Subject
    caught_by: str
    train: Train = train_from_scratch


LIARS: Mapping[str, Lie] = MappingProxyType(
    {
        "mutates-input": Lie(method=MutatesInput(), caught_by="input-untouched"),
        "shallow-copy": Lie(method=ShallowCopy(), caught_by="reference-fixed"),
        "moves-and-restores": Lie(method=MovesAndRestores(), caught_by="reference-fixed"),
        "seeds-from-clock": Lie(method=SeedsFromClock(), caught_by="deterministic"),
        "reads-global-coins": Lie(method=ReadsGlobalCoins(), caught_by="deterministic"),
        "reuses-noise": Lie(method=ReusesNoise(), caught_by="deterministic"),
        "acts-on-empty": Lie(method=ActsOnEmpty(), caught_by="identity-on-empty"),
        "batches-by-position": Lie(method=BatchesByPosition(), caught_by="row-order"),
        "swallows-unknown": Lie(method=SwallowsUnknown(), caught_by="unknown-refused"),
        "falls-back-silently": Lie(method=FallsBackSilently(), caught_by="no-silent-fallback"),
        "does-nothing": Lie(method=DoesNothing(), caught_by="not-a-noop"),
        "ignores-replacements": Lie(method=IgnoresReplacements(), caught_by="replacements-learnt"),
        "certifies-without-guarantee": Lie(method=CertifiesWithoutGuarantee(), caught_by="claim-backed"),
        "claims-more-than-its-class": Lie(method=ClaimsMoreThanItsClass(), caught_by="claim-backed"),
        "fine-tunes-and-calls-it-exact": Lie(method=FineTunesAndCallsItExact(), caught_by="exact-equals-scratch"),
        "other-coins-called-pathwise": Lie(method=OtherCoinsCalledPathwise(), caught_by="exact-equals-scratch"),
        "frozen-statistics": Lie(method=FrozenStatistics(), caught_by="exact-equals-scratch", train=leaky_statistics),
        "positional-shards": Lie(method=PositionalShards(), caught_by="exact-equals-scratch", train=positional_shards),
        "resurrects": Lie(method=Resurrects(), caught_by="gone-stays-gone"),
        "resurrects-exactly": Lie(method=ResurrectsExactly(), caught_by="gone-stays-gone"),
        "loses-the-books": Lie(method=LosesTheBooks(), caught_by="gone-stays-gone"),
        "overshoots": Lie(method=Overshoots(), caught_by="nearer-than-standing-still"),
        "wrong-sign": Lie(method=WrongSign(), caught_by="nearer-than-standing-still"),
    }
)
