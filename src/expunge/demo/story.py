"""Data, models and requests of the story, shared by its chapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from expunge import datasets
from expunge.audit import Answers
from expunge.core.coins import child, generator
from expunge.core.recipe import Recipe, Sharding
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.training import train

if TYPE_CHECKING:
    from expunge.demo.journey import Honoured

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the story is told with.

    Attributes:
        seed: of the first training, and of the choice of who asks.
        seeds: how many trainings the unlearning chapter averages over.
        owners: artificial owners among whom MNIST is divided.
        askers: how many of them ask to be forgotten.
        label: the class that is forgotten.
        epochs: of training.
        shards: of the sharded model.
        folder: where the workspace and the certificates are made; None: a new temporary folder.
        show_removed: folder for pictures of the removed rows, outside the workspace; None draws none.
    """

    seed: int = 0
    seeds: int = 1
    owners: int = 200
    askers: int = 5
    label: int = 3
    epochs: int = 5
    shards: int = 20
    folder: Path | None = None
    show_removed: Path | None = None


def counted(number: int, what: str) -> str:
    """``5 owners``, ``1 owner``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def silent(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Story:
    """Data, models and requests, each made once and when it is first needed."""

    def __init__(self, settings: Settings, tell: Tell = silent, units: int = 1) -> None:
        """A story with these settings; `tell` hears (what, units done, units in all), of which there are `units`."""
        self.settings, self._tell = settings, tell
        self.seed = settings.seed
        self._done = 0
        self._all = units

    def step(self, what: str) -> None:
        """Say that a unit of work begins."""
        self._tell(what, min(self._done, self._all), self._all)
        self._done += 1

    @cached_property
    def data(self) -> datasets.DataSet:
        """Full MNIST, its training images divided among artificial owners."""
        self.step("read MNIST")
        return datasets.mnist(owners=self.settings.owners)

    @cached_property
    def answers(self) -> Answers:
        """What each model says of all training and test images, asked once."""
        return Answers(self.data.train, self.data.test)

    @cached_property
    def recipe(self) -> Recipe:
        """A multilayer perceptron, 784-128-10."""
        return Recipe(
            model="mlp",
            model_args={"hidden": [128]},
            epochs=self.settings.epochs,
            batch_size=128,
            optimiser_args={"lr": 0.1, "momentum": 0.9},
            seed=self.seed,
        )

    @cached_property
    def plain(self) -> Trained:
        """One model."""
        self.step("train one model")
        return train(self.recipe, self.data.train)

    @cached_property
    def sharded(self) -> Trained:
        """A model in shards."""
        self.step(f"train {self.settings.shards} shards")
        return train(replace(self.recipe, sharding=Sharding(shards=self.settings.shards)), self.data.train)

    @cached_property
    def folder(self) -> Path:
        """Where the workspace and the certificates are made."""
        given = self.settings.folder
        return Path(tempfile.mkdtemp(prefix="expunge-demo-")) if given is None else given

    @cached_property
    def honoured(self) -> Honoured:
        """The owners' requests, honoured in a workspace."""
        from expunge.demo.journey import honour

        return honour(self)

    @cached_property
    def askers(self) -> tuple[str, ...]:
        """The owners who ask to be forgotten, drawn by the seed."""
        owners = sorted(set(self.data.train.owners))
        drawn = torch.randperm(len(owners), generator=child(generator(self.settings.seed), "askers"))
        return tuple(owners[i] for i in drawn[: self.settings.askers].tolist())

    @cached_property
    def requests(self) -> Mapping[str, Request]:
        """The two removals: of the owners together, and of a class."""
        theirs = self.data.train.where(lambda _, owner: owner in self.askers)
        return {
            counted(len(self.askers), "owner"): Request.remove(theirs.ids),
            f"class {self.settings.label}": Request.remove_class(self.settings.label),
        }

    def again(self, seed: int) -> Story:
        """The same data and requests with other coins of training."""
        other = Story(self.settings, self._tell, self._all)
        other.seed, other._done = seed, self._done
        shared = {"data": self.data, "answers": self.answers, "askers": self.askers, "requests": self.requests}
        other.__dict__.update(shared)
        return other
