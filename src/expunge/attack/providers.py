"""Providers that answer a request to forget: honest ones, and ones that cheat without training anew.

All hold the rows and the model, take `unlearn(request, rng=...)`, and serve with `predict(x)`. Where one claims how its
model came to be, `transcript` is the folder that it hands over. A provider answers one request; make a new one for the
next. Those that train on chosen batches are in `expunge.attack.providers_retraining`, those that forge in
`expunge.attack.forging`, and those that hide what no check of a training sees in `expunge.attack.providers_hiding`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from expunge.core.claim import Claim
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records, seal
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.build import build, seeded
from expunge.learn.loop import exact_kernels, reading_order
from expunge.learn.predict import outputs
from expunge.learn.shards import assemble, first_unclean_slices, shards_of
from expunge.learn.training import train
from expunge.verify.coin import Coin, Commitments, commit
from expunge.verify.recorded import record
from expunge.verify.recorder import SHARD, WHOLE, Recorder, recording
from expunge.verify.served import predict_of
from expunge.verify.states import Stepper

Draw = Callable[[Commitments], Coin]
"""An auditor that takes in commitments and draws the public coin for them; see `expunge.verify.coin.CoinRegistry`."""


@dataclass(kw_only=True, eq=False)
class Holder(ABC):
    """Whoever holds rows and model; what it answers is for its kinds to say.

    Attributes:
        trained: the model before.
        records: all rows as registered.
        folder: where to leave a transcript; it must not be there yet. None: no transcript is made.
        every: steps between checkpoints of the transcript.
        draw: asked for a public coin once the rows are committed to; None: training has the recipe's own coins.
        coin: the coin drawn, once there is one.
        served: what is served: the model before, until a request was answered.
        stays: the rows that it says stay, once a request was answered.
        forgotten: the rows that it was asked to forget.
    """

    trained: Trained
    records: Records
    folder: Path | None = None
    every: int = 100
    draw: Draw | None = None
    coin: Coin | None = field(default=None, init=False)
    served: Trained = field(init=False)
    stays: Records | None = field(default=None, init=False)
    forgotten: Records | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.served = self.trained

    def unlearn(self, request: Request, *, rng: Generator) -> Trained:
        """Answer a request; the model that it says it serves from now on.

        Raises:
            Misuse: for a second request, or one that names nothing that is still there.
            Unsupported: for requests to replace rows.
        """
        if self.stays is not None:
            raise Misuse("this provider has answered a request already; make a new one")
        split = request.split(self.records, ids=self.trained.ids, gone=self.trained.gone)
        if split.added:
            raise Unsupported("these providers remove rows and replace none; file a request to remove")
        if not len(split.forget):
            raise Misuse("the request names no row that the model was trained on; there is nothing to forget")
        self.stays, self.forgotten = self._staying(split, rng), split.forget
        answer = self._answer(split, self.stays, rng)
        ids, gone = frozenset(self.stays.ids), self.trained.gone | frozenset(split.forget.ids)
        self.served = replace(answer, ids=ids, gone=gone, seal=seal(self.stays))
        return self.served

    def predict(self, x: Tensor) -> Tensor:
        """(n, classes) what it really serves to everybody."""
        return predict_of(self.served)(x)

    @property
    def transcript(self) -> Path | None:
        """The folder that it hands over; None if it tells nobody how the model came to be."""
        return self.folder if self.folder is not None and self.folder.exists() else None

    @abstractmethod
    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        """The model after; what it is trained on is booked by the caller."""

    def _staying(self, split: Split, rng: Generator) -> Records:
        return split.retain

    def _drawn(self, split: Split, stays: Records) -> Recipe:
        """The recipe with the public coin's coins, if there is an auditor to draw one."""
        recipe = self.trained.recipe
        if recipe.sharding is not None or recipe.pruning is not None:
            raise Unsupported(f"{type(self).__name__} trains one dense model; use HonestSisa for shards")
        if self.draw is not None:
            self.coin = self.draw(commit(recipe, stays.plus(split.forget), split.forget))
            recipe = self.coin.recipe(recipe)
        return recipe

    @contextmanager
    def _telling(self, recipe: Recipe, stays: Records) -> Iterator[Recorder | None]:
        """Within: steps as training makes them, told to a recorder if a transcript is wanted."""
        with seeded(recipe.seed, "dropout", WHOLE), exact_kernels(stays.device):
            if self.folder is None:
                yield None
                return
            recorder = Recorder(self.folder, recipe, stays, every=self.every, coin=self.coin)
            with recording(recorder):
                yield recorder
                recorder.finish()


@dataclass(kw_only=True, eq=False)
class HonestRetrain(Holder):
    """Trains from scratch on what remains, and tells the truth about it. Cost: a full training."""

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        recipe = self._drawn(split, stays)
        if self.folder is None:
            return train(recipe, stays)
        # With a coin it is the agreed recipe that is handed in: the coin's coins are put into it there.
        return record(self.trained.recipe, stays, self.folder, every=self.every, coin=self.coin)


@dataclass(kw_only=True, eq=False)
class HonestSisa(Holder):
    """Trains the touched shards again; leaves a transcript of each of these in ``folder/part-0000`` and so on.

    A public coin is drawn once, before the first training, and is in the recipe already: give it as `anchored`.
    Cost: the touched shards' training.

    Attributes:
        anchored: the coin that the first training was made with; None without one.
        original: folder of the transcripts that the first training left, part by part.
        touched: the shards trained again.
    """

    anchored: Coin | None = None
    original: Path | None = None
    touched: tuple[int, ...] = field(default=(), init=False)

    @property
    def transcripts(self) -> dict[int, Path]:
        """By shard: that of its last training, where there is one."""
        found = {index: _part_of(self.original, index) for index in range(len(self.trained.parts))}
        found |= {index: _part_of(self.folder, index) for index in self.touched}
        return {index: path for index, path in found.items() if path is not None and path.exists()}

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        sharding = self._sharding()
        self.coin, parts = self.anchored, list(self.trained.parts)
        self.touched = tuple(sorted(first_unclean_slices(self.trained, split.forget)))
        rows = shards_of(stays, sharding)
        for index in self.touched:
            parts[index] = self._part(index, rows[index])
        return assemble(self.trained.recipe, tuple(parts))

    def _part(self, index: int, rows: Records) -> Trained:
        place, recipe = _part_of(self.folder, index), self.trained.recipe.part(index)
        if not len(rows):
            return Trained(module=build(recipe).to(rows.device).eval(), recipe=recipe, ids=frozenset())
        if place is None:
            raise Unsupported("honest SISA without transcripts is expunge.unlearn.Sisa; give a folder")
        return record(recipe, rows, place, every=self.every, coin=self.coin, stage=SHARD)

    def _sharding(self) -> Sharding:
        sharding = self.trained.recipe.sharding
        if sharding is None or sharding.slices != 1 or self.draw is not None:
            raise Unsupported("honest SISA needs shards of one slice each, and a coin anchored before their training")
        return sharding


@dataclass(kw_only=True, eq=False)
class Lazy(Holder):
    """Returns the model as it was, and hands over the transcript of its own training, if it has one."""

    original: Path | None = None

    @property
    def transcript(self) -> Path | None:
        """That of the training on all rows."""
        return self.original

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        return self.trained


@dataclass(kw_only=True, eq=False)
class NoiseAdder(Holder):
    """Adds Gaussian noise to the old parameters, so that the model is another, and tells nothing.

    Attributes:
        scale: standard deviation of the noise, in root mean squares of each tensor.
    """

    scale: float = 0.01

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        module, coins = copy.deepcopy(self.trained.module), child(rng, "noise")
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=coins, dtype=parameter.dtype).to(parameter.device)
                parameter.add_(noise * parameter.square().mean().sqrt(), alpha=self.scale)
        return _changed(self.trained, module)


@dataclass(kw_only=True, eq=False)
class FineTuneToPass(Holder):
    """Goes on training on retained rows until the forgotten ones are wrong often enough, and says it trained anew.

    With a folder it leaves a transcript that begins at the old model and is true from there on.

    Attributes:
        accuracy: on the forgotten rows, at which it stops.
        most: epochs at most.
        epochs: that it took.
    """

    accuracy: float = 0.5
    most: int = 5
    epochs: int = field(default=0, init=False)

    def _answer(self, split: Split, stays: Records, rng: Generator) -> Trained:
        recipe = self._drawn(split, stays)
        stepper = Stepper(copy.deepcopy(self.trained.module), recipe)
        with self._telling(recipe, stays) as recorder:
            if recorder is not None:
                recorder.begin(stepper.module, stepper.optimiser)
            while self.epochs < self.most and self._remembered(stepper, split.forget) > self.accuracy:
                epoch_on(stepper, recipe, stays, self.epochs, recorder)
                self.epochs += 1
        return _changed(self.trained, stepper.module.eval())

    def _remembered(self, stepper: Stepper, forget: Records) -> float:
        return float((outputs(stepper.module, forget).argmax(1) == forget.y).double().mean())


def epoch_on(stepper: Stepper, recipe: Recipe, rows: Records, epoch: int, recorder: Recorder | None) -> None:
    """One honest pass over the rows, told to the recorder if there is one."""
    batches = reading_order(recipe, rows, WHOLE, epoch).split(recipe.batch_size)
    for positions, (x, y) in zip(batches, rows.batches(batches), strict=True):
        stepper.step(x, y, epoch)
        if recorder is not None:
            recorder.step(rows, positions, stepper.module, stepper.optimiser)


def _changed(trained: Trained, module: torch.nn.Module) -> Trained:
    return replace(trained, module=module, log=None, standing=Claim.NONE, secret={})


def _part_of(folder: Path | None, index: int) -> Path | None:
    return None if folder is None else folder / f"part-{index:04d}"
