"""What all cells of the matrix of providers and verifiers share: rows with planted triggers, models, and an auditor."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Generator

from expunge.attack.providers import Draw, HonestSisa
from expunge.attack.providers_hiding import SelectiveServer
from expunge.core.coins import child, order
from expunge.core.protocols import Provider
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import Keep
from expunge.learn.shards import ShardWarning
from expunge.learn.training import train
from expunge.verify import (
    BackdoorVerifier,
    Coin,
    CoinRegistry,
    Columns,
    Commitments,
    Pixels,
    Tolerance,
    TriggerKey,
    calibrate_tolerance,
    commit,
    plant,
    record,
)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a matrix is set up.

    Attributes:
        askers: owners who plant triggers, and ask to be forgotten.
        share: of each asker's rows of other classes that it stamps.
        places: entries of a trigger: pixels, or fields of a table.
        asked: queries of each asker in the backdoor test.
        every: steps between checkpoints of a transcript.
        shards: of the sharded model.
    """

    askers: int = 1
    share: float = 0.5
    places: int = 8
    asked: int = 100
    every: int = 20
    shards: int = 4


@dataclass(kw_only=True, eq=False)
class Ground:
    """One seed's rows, requests and models before; each is made once, when it is first needed.

    Attributes:
        clean: the rows without triggers.
        queries: rows that nobody trains on.
        recipe: agreed on; its seed is this ground's.
        terms: how it is set up.
        rng: names all coins.
        folder: where transcripts are left.
    """

    clean: Records
    queries: Records
    recipe: Recipe
    terms: Terms
    rng: Generator
    folder: Path

    @cached_property
    def askers(self) -> tuple[str, ...]:
        """The owners who plant and ask."""
        names = sorted(set(self.clean.owners))
        firsts = {owner: place for place, owner in reversed(list(enumerate(self.clean.owners)))}
        rows = self.clean.select([firsts[name] for name in names])
        ranked = order(rows.keys, self.rng.initial_seed(), "askers").tolist()
        return tuple(names[place] for place in ranked[: self.terms.askers])

    @cached_property
    def keys(self) -> tuple[TriggerKey, ...]:
        """What each asker keeps to itself."""
        seed = self.rng.initial_seed()
        return tuple(
            TriggerKey(
                owner=owner,
                secret=hashlib.sha256(f"expunge matrix {seed} {owner}".encode()).digest(),
                family=self._family,
                classes=self.clean.classes or 0,
            )
            for owner in self.askers
        )

    @cached_property
    def _family(self) -> Pixels | Columns:
        shape = self.clean.shape
        if len(shape) > 1:
            levels = 17 if self.clean.x.is_floating_point() else 256
            return Pixels(shape=shape, count=self.terms.places, levels=levels)
        return Columns.of(self.queries, count=self.terms.places)

    @cached_property
    def records(self) -> Records:
        """All rows as registered, some of the askers' with triggers on them."""
        rows = self.clean.without([one for owner in self.askers for one in self.clean.of_owner(owner).ids])
        for key in self.keys:
            mine = self.clean.of_owner(key.owner)
            rows = rows.plus(plant(mine, key.trigger, self.terms.share, child(self.rng, "plant", key.owner))[0])
        return rows

    @cached_property
    def request(self) -> Request:
        """All rows of the askers."""
        return Request.remove(self.records.where(lambda _, owner: owner in self.askers).ids)

    @cached_property
    def retain(self) -> Records:
        """The rows that stay with an honest provider."""
        return self.records.where(lambda _, owner: owner not in self.askers)

    @cached_property
    def trained(self) -> Trained:
        """The model before, with its state after every step."""
        return train(self.recipe, self.records, keep=Keep(every=1))

    @cached_property
    def original(self) -> Path:
        """The transcript of the model before."""
        record(self.recipe, self.records, self.folder / "original", every=self.terms.every)
        return self.folder / "original"

    @cached_property
    def sharded(self) -> Trained:
        """A model in shards, trained under a coin that was drawn for all rows, with transcripts."""
        place = self.folder / "shards"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShardWarning)  # what shards cost is not the matter here
            return record(self._cut, self.records, place, every=self.terms.every, coin=self.shard_coin)

    @cached_property
    def shard_coin(self) -> Coin:
        """The coin of the sharded model."""
        return self.draw("shards")(commit(self._cut, self.records, salt=self._salt))

    @property
    def _cut(self) -> Recipe:
        return replace(self.recipe, sharding=Sharding(shards=self.terms.shards))

    @property
    def _salt(self) -> str:
        return hashlib.sha256(f"expunge matrix {self.rng.initial_seed()}".encode()).hexdigest()[:32]

    def draw(self, subject: str) -> Draw:
        """An auditor of this ground; its nonces follow from the seed, so that the matrix can be made again."""
        registry = CoinRegistry(self.folder / "coins.json")

        def drawn(commitments: Commitments) -> Coin:
            registry.anchor(commitments, subject)
            seed = self.rng.initial_seed()
            nonce = hashlib.sha256(f"expunge matrix {seed} {subject} {commitments.digest()}".encode()).hexdigest()
            return registry.draw(commitments, subject, nonce=nonce)

        return drawn

    @cached_property
    def tolerance(self) -> Tolerance:
        """Measured on this machine."""
        return calibrate_tolerance(self.recipe.completed(self.retain), self.retain, every=self.terms.every)

    def backdoor(self, before: Trained) -> BackdoorVerifier:
        """The askers' test, calibrated on a model before."""
        cached = self._backdoors.get(id(before))
        if cached is None:
            test = BackdoorVerifier(keys=self.keys, queries=self.queries, asked=self.terms.asked)
            cached = self._backdoors[id(before)] = test.calibrated(before, rng=child(self.rng, "calibration"))
        return cached

    @cached_property
    def _backdoors(self) -> dict[int, BackdoorVerifier]:
        return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What a provider answered.

    Attributes:
        provider: who; its `predict` is what strangers get.
        before: the model before.
        shown: the model that it says it serves.
        stays: the rows that it says stay.
        forgotten: the rows that it was asked to forget.
        transcripts: that of the whole training under -1, or one for each shard; empty if it hands none over.
        coin: the public coin that it asked for; None without one.
    """

    provider: Provider
    before: Trained
    shown: Trained
    stays: Records
    forgotten: Records
    transcripts: dict[int, Path]
    coin: Coin | None


Maker = Callable[[Ground, Path, Draw | None], Provider]
"""Makes a provider: on a ground, with a folder for its transcript, and an auditor if it is to ask for a coin."""


@dataclass(kw_only=True, eq=False)
class Hearing:
    """One provider before the verifiers: what it answers without a coin and with one, each made when it is needed."""

    name: str
    make: Maker
    ground: Ground

    @cached_property
    def plain(self) -> Answer:
        """Its answer where training has the recipe's own coins."""
        return self._answer("plain", None)

    @cached_property
    def public(self) -> Answer:
        """Its answer where it has to ask for a public coin."""
        return self._answer("public", self.ground.draw(self.name))

    def _answer(self, world: str, draw: Draw | None) -> Answer:
        provider = self.make(self.ground, self.ground.folder / self.name.replace(" ", "-") / world, draw)
        coins = child(self.ground.rng, "answer", self.name, world)
        shown = provider.unlearn(self.ground.request, rng=coins)
        held = provider.honest if isinstance(provider, SelectiveServer) else provider
        told = getattr(held, "transcript", None)
        transcripts = held.transcripts if isinstance(held, HonestSisa) else {} if told is None else {-1: told}
        stays, forgotten = getattr(held, "stays", None), getattr(held, "forgotten", None)
        return Answer(
            provider=provider,
            before=getattr(held, "trained", self.ground.trained),
            shown=shown,
            stays=self.ground.retain if stays is None else stays,
            forgotten=self.ground.records.take(self.ground.request.ids) if forgotten is None else forgotten,
            transcripts=transcripts,
            coin=getattr(held, "coin", None),
        )
