"""Exact retraining within a run leaves a transcript, inside the folder of the version that it makes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import torch
from safetensors import SafetensorError
from torch import Generator

from expunge.core.claim import Claim, Exactness
from expunge.core.errors import Unsupported, Unwritable
from expunge.core.events import Event, Retrained
from expunge.core.protocols import Method
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import threads
from expunge.learn.shards import assemble, first_unclean_slices, shard_sizes, shards_of
from expunge.unlearn.method import Done, Task
from expunge.unlearn.method import Method as OurMethod
from expunge.unlearn.retrain import Retrain
from expunge.unlearn.sisa import Sisa
from expunge.verify.recorded import record
from expunge.verify.recorder import SHARD

TRANSCRIPT: Final = "transcript"
"""Where a version's transcript lies, below its folder."""
SEGMENTS: Final = 20
"""Segments that a transcript is cut into: one more whole state than that is kept."""


@contextmanager
def transcribing(
    method: Method, trained: Trained, version: Path, before: Path, share: float
) -> Iterator[tuple[Method, Path | None]]:
    """Within: the method to call in this one's stead, and where its transcript will lie until the version is saved.

    The method itself, and None, where nothing is to be replayed or the method can leave no transcript: one that is not
    exact, one with coins of its own, a subclass that trains in its own way, models that are pruned, have several slices
    to a shard, or were certified. After: nothing is left of a transcript that did not get into its version.

    Args:
        method: what the run would call.
        trained: the model that it would be called on.
        version: folder that the result will be saved in, next to which there is room.
        before: folder of the version before, whose transcripts of untouched shards are taken over.
        share: of the training to be replayed.
    """
    if not share or not isinstance(method, OurMethod) or not _tells(method, trained):
        yield method, None
        return
    staging = version.with_name(f".{version.name}.told")
    try:
        yield Recorded(method=method, folder=staging / TRANSCRIPT, before=before / TRANSCRIPT), staging / TRANSCRIPT
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _tells(method: OurMethod, trained: Trained) -> bool:
    plain = (type(method) is Retrain and method.coins == "same") or type(method) is Sisa
    recipe = trained.recipe
    fits = recipe.pruning is None and (recipe.sharding is None or recipe.sharding.slices == 1)
    return plain and fits and not trained.releases and method.supports(trained) is None


@dataclass(frozen=True, kw_only=True)
class Recorded(OurMethod):
    """`Retrain` with the same coins, or `Sisa`, with a transcript: the same name, claim and bytes.

    Attributes:
        method: whose work is done.
        folder: a new one, for the transcript or those of the shards.
        before: where the transcripts of untouched shards lie, if there are any.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    method: OurMethod
    folder: Path
    before: Path

    @property
    def name(self) -> str:
        """The method's own."""
        return self.method.name

    @property
    def exactness(self) -> Exactness | None:
        """The method's own."""
        return self.method.exactness

    def supports(self, trained: Trained) -> Unsupported | None:
        """What the method does."""
        return self.method.supports(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        """The method's work.

        Raises:
            Unwritable: if the disk is full or read-only, or the folder was deleted amid it.
        """
        try:
            return self._touched(task) if isinstance(self.method, Sisa) else self._all(task)
        except (OSError, SafetensorError) as error:
            raise Unwritable(f"no transcript could be written in {self.folder.parent} ({error}); make room") from error

    def _all(self, task: Task) -> Done:
        recipe, rows = task.trained.recipe, len(task.retain)
        if recipe.sharding is not None:
            rows = max(shard_sizes(task.retain, recipe.sharding).rows)
        made = record(recipe, task.retain, self.folder, every=_every(recipe, rows), tally=task.tally)
        if made.parts:
            made = assemble(made.recipe, tuple(replace(part, seal=None) for part in made.parts))  # as `train` has them
        return Done(trained=made, events=(Retrained(part=-1, rows=len(task.retain)),))

    def _touched(self, task: Task) -> Done:
        trained, recipe = task.trained, task.trained.recipe
        if recipe.sharding is None:
            raise Unsupported("sisa needs a model trained in shards, and this one is whole; use retrain")
        touched = first_unclean_slices(trained, task.forget)
        rows, parts = shards_of(task.retain, recipe.sharding), list(trained.parts)
        self.folder.mkdir(parents=True)
        used = {part.log.threads for part in trained.parts if part.log is not None}
        with threads(
            min(used) if used else torch.get_num_threads()
        ):  # as the other shards were, or bytes are a mixture
            for index in sorted(touched):
                parts[index] = self._part(recipe.part(index), rows[index], self.folder / _name(index), task)
        for index in set(range(len(parts))) - set(touched):
            if (self.before / _name(index)).is_dir():
                shutil.copytree(self.before / _name(index), self.folder / _name(index))
        events: tuple[Event, ...] = tuple(Retrained(part=one, rows=len(parts[one].ids)) for one in sorted(touched))
        return Done(trained=assemble(recipe, tuple(parts)), events=events)

    def _part(self, recipe: Recipe, rows: Records, place: Path, task: Task) -> Trained:
        if not len(rows):
            return Trained(module=build(recipe).to(rows.device).eval(), recipe=recipe, ids=frozenset())
        made = record(recipe, rows, place, every=_every(recipe, len(rows)), stage=SHARD, tally=task.tally)
        return replace(made, module=made.module.eval(), seal=None)


def _name(shard: int) -> str:
    return f"part-{shard:04d}"


def _every(recipe: Recipe, rows: int) -> int:
    """Steps between checkpoints."""
    steps = recipe.epochs * math.ceil(rows / recipe.batch_size)
    return max(1, math.ceil(steps / SEGMENTS))


def move_in(told: Path, version: Path) -> None:
    """Let a transcript lie inside its version; OSError if it is gone."""
    os.replace(told, version / TRANSCRIPT)


def steps_told(root: Path) -> set[str]:
    """What transcripts below a workspace call the steps and the stage that they keep: names of no row."""
    names = {path.stem.removeprefix("checkpoint-") for path in root.glob(f"models/*/*/{TRANSCRIPT}/**/checkpoint-*")}
    return names | {str(int(name)) for name in names if name.isdecimal()} | ({SHARD} if names else set())
