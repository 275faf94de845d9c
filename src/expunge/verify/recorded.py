"""Training that leaves a transcript, to the same bytes as training that leaves none."""

from __future__ import annotations

import os
import secrets
import shutil
import uuid
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core.errors import EmptyRetain, Misuse, Stopped, Unsupported
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records, seal
from expunge.core.trained import State, Trained
from expunge.learn.build import build
from expunge.learn.loop import Report, Tally, fit
from expunge.learn.resume import Progress, Saver
from expunge.learn.shards import ShardWarning, assemble, shard_sizes, shards_of
from expunge.verify.coin import Coin
from expunge.verify.recorder import SHARD, WHOLE, Recorder, recording
from expunge.verify.rows import data_root


def record(
    recipe: Recipe,
    records: Records,
    folder: str | Path,
    *,
    every: int = 100,
    salt: str | None = None,
    coin: Coin | None = None,
    stage: str = WHOLE,
    report: Report | None = None,
    tally: Tally | None = None,
) -> Trained:
    """Train as `expunge.train` does, to the same bytes, and leave a transcript in a new folder.

    A sharded recipe leaves one transcript a shard that has rows, in ``folder/part-0000`` and so on. After a removal
    record a touched shard alone: ``record(recipe.part(i), shards_of(retain, sharding)[i], folder, stage="slice-0")``.

    Args:
        recipe: as for `expunge.train`; with a coin, its seed and the shards' salt are replaced by the coin's.
        records: on what.
        folder: a new one; it appears whole, or not at all.
        every: steps between checkpoints; a spot check replays as many.
        salt: keys the rows' commitments, 32 hexadecimal digits or more; fresh and random if None.
        coin: the public coin, drawn after these rows were committed to as the ones that stay.
        stage: ``slice-0`` for a shard alone.
        report: told (stage, steps done, steps in all) now and then.
        tally: counts the work.

    Returns:
        The trained model.

    Raises:
        EmptyRetain, BadRecipe, BadRecords: as `expunge.train`.
        Unsupported: for pruned recipes and sliced shards.
        Misuse: if the folder is there, or the coin is of another recipe.
        Stopped: at an interruption; nothing is left behind.
    """
    if not len(records):
        raise EmptyRetain("there are no records to train on; give at least one")
    recipe = recipe.completed(records)
    if coin is not None and stage == WHOLE:
        recipe = _drawn(recipe, records, coin)
    if recipe.sharding is not None:
        return _record_shards(recipe, recipe.sharding, records, Path(folder), every, salt, coin, report, tally)
    recorder = Recorder(folder, recipe, records, stage=stage, every=every, salt=salt, coin=coin)
    with recording(recorder):
        module = build(recipe).to(records.device)
        hook = _Hook(recorder, tally)
        try:
            log = fit(module, recipe, records, stage=stage, saver=hook, report=report, tally=hook.watch)
        except Stopped:
            raise Stopped(
                "interrupted; no transcript was left, as one appears whole or not at all: record anew"
            ) from None
        trained = Trained(module=module, recipe=recipe, ids=frozenset(records.ids), log=log, seal=seal(records))
        recorder.finish(trained)
    return trained


def _drawn(recipe: Recipe, records: Records, coin: Coin) -> Recipe:
    """The recipe with the coin's coins, which must have been drawn for it and for these rows."""
    if not coin.agrees(recipe):
        raise Misuse("the coin was drawn for another recipe; commit to this one and draw anew")
    if data_root(records, coin.commitments.salt) != coin.commitments.retained:
        raise Misuse(
            "the coin was drawn for other rows than these; train on the rows that were committed to as staying"
        )
    return coin.recipe(recipe)


def _record_shards(
    recipe: Recipe,
    sharding: Sharding,
    records: Records,
    folder: Path,
    every: int,
    salt: str | None,
    coin: Coin | None,
    report: Report | None,
    tally: Tally | None,
) -> Trained:
    if sharding.slices != 1:
        raise Unsupported(f"transcripts are of shards with one slice each, got {sharding.slices}; use slices=1")
    if folder.exists():
        raise Misuse(f"{folder} is there already; name a new folder for the transcripts")
    sizes = shard_sizes(records, sharding)
    if sizes.uneven:
        warnings.warn(str(sizes), ShardWarning, stacklevel=3)
    salt = salt or (None if coin else secrets.token_hex(16))
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
    parts = []
    try:
        for index, rows in enumerate(shards_of(records, sharding)):
            own = recipe.part(index)
            if not len(rows):
                parts.append(Trained(module=build(own).to(records.device).eval(), recipe=own, ids=frozenset()))
                continue
            place = temporary / f"part-{index:04d}"
            parts.append(
                record(own, rows, place, every=every, salt=salt, coin=coin, stage=SHARD, report=report, tally=tally)
            )
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return assemble(recipe, tuple(parts))


class _Watch(Tally):
    """Remembers which rows the coming step reads."""

    def __init__(self, inner: Tally | None) -> None:
        super().__init__()
        self.inner = inner

    def saw(self, records: Records, positions: Tensor, x: Tensor, y: Tensor) -> None:
        self.records, self.positions = records, positions
        if self.inner is not None:
            self.inner.saw(records, positions, x, y)


class _Hook(Saver):
    """Stands where training saves, at every step, and tells the recorder instead."""

    def __init__(self, recorder: Recorder, tally: Tally | None) -> None:
        self.root = self.folder = recorder.folder
        self.recorder, self.watch = recorder, _Watch(tally)

    def due(self, step: int) -> bool:
        return True

    def restore(self, stage: str, module: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
        self.recorder.begin(module, optimiser)
        return Progress()

    def save(self, stage: str, module: nn.Module, optimiser: torch.optim.Optimizer, at: Progress) -> None:
        self.recorder.step(self.watch.records, self.watch.positions, module, optimiser)

    def checkpoints(self, stage: str, until: int) -> dict[int, State]:
        return {}
