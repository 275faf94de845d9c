"""Sharded, isolated, sliced, aggregated training (SISA; Bourtoule et al., 2021), with no leak between the rows.

The shard and slice of a row are functions of its owner and the salt; the order of reading, of its owner and content.
The votes are equal. So a shard's bytes are a function of its own rows alone, and after a removal the touched shards,
trained again from the last slice that the removed rows had no part in, are the bytes of a training from scratch.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.trained import State, Trained, TrainingLog, copy_state
from expunge.learn.build import build
from expunge.learn.engine import LOCAL, Engine
from expunge.learn.loop import NOTHING, Keep, Report, Tally, fit, threads
from expunge.learn.resume import Saver


class ShardWarning(UserWarning):
    """A shard is so large that forgetting within it costs much more than it should."""


@dataclass(frozen=True)
class ShardSizes:
    """How evenly the rows fall into the shards.

    Attributes:
        rows: rows of each shard.
        largest_owner_rows: rows of the largest owner; no number of shards makes a shard smaller than that.
        suggested: the largest number of shards, up to the asked one, at which no shard passes twice the mean.
    """

    rows: tuple[int, ...]
    largest_owner_rows: int
    suggested: int

    @property
    def uneven(self) -> bool:
        """True if a shard holds more than twice the mean."""
        return max(self.rows) > 2 * sum(self.rows) / len(self.rows)

    @property
    def largest_share(self) -> float:
        """Share of a full retraining that forgetting somebody in the largest shard costs."""
        return max(self.rows) / max(sum(self.rows), 1)

    def __str__(self) -> str:
        total, count = sum(self.rows), len(self.rows)
        text = f"{count} shards of {min(self.rows):,} to {max(self.rows):,} rows, mean {total / count:,.0f}"
        if self.uneven:
            text += (
                f"; the largest costs {self.largest_share:.0%} of a full retraining to forget in, where 1/{count} was "
                f"wanted (the largest owner alone holds {self.largest_owner_rows:,} rows); "
                f"{self.suggested} shard{'s' if self.suggested > 1 else ''} would be even"
            )
        return text


def shard_sizes(records: Records, sharding: Sharding) -> ShardSizes:
    """How evenly these rows fall into these shards. Cost: a hash of each owner for each number of shards tried."""
    held = Counter(records.owners)
    suggested = sharding.shards
    while suggested > 1 and _uneven(_sizes(held, replace(sharding, shards=suggested))):
        suggested -= 1
    return ShardSizes(_sizes(held, sharding), max(held.values(), default=0), suggested)


def _sizes(held: Mapping[str, int], sharding: Sharding) -> tuple[int, ...]:
    sizes = [0] * sharding.shards
    for owner, rows in held.items():
        sizes[sharding.shard_of(owner)] += rows
    return tuple(sizes)


def _uneven(sizes: tuple[int, ...]) -> bool:
    return max(sizes) > 2 * sum(sizes) / len(sizes)


def shards_of(records: Records, sharding: Sharding) -> list[Records]:
    """The rows of each shard, some perhaps empty."""
    home = {owner: sharding.shard_of(owner) for owner in set(records.owners)}
    places: list[list[int]] = [[] for _ in range(sharding.shards)]
    for position, owner in enumerate(records.owners):
        places[home[owner]].append(position)
    return [records.select(place) for place in places]


def slice_epochs(recipe_epochs: int, slices: int) -> int:
    """Epochs of each slice's stage: such that all stages together read about as many rows as unsliced training.

    Stage r reads slices 0 to r, so that all read (slices + 1) / 2 times the rows an epoch; the authors' rule
    ``2 / (slices + 1) * epochs`` (Bourtoule et al., 2021, section V), rounded up.
    """
    return recipe_epochs if slices == 1 else math.ceil(2 * recipe_epochs / (slices + 1))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to train: its recipe, rows, the first slice to train anew and the state before that slice."""

    index: int
    recipe: Recipe
    sharding: Sharding
    records: Records
    from_slice: int = 0
    kept: tuple[State, ...] = ()
    threads: int | None = None
    keep: Keep = NOTHING
    saver: Saver | None = None
    report: Report | None = None


def _train_part(job: _Job, tally: Tally) -> Trained:
    with threads(job.threads or torch.get_num_threads()):
        return _trained_part(job, tally)


def _trained_part(job: _Job, tally: Tally) -> Trained:
    module = build(job.recipe)
    module.to(job.records.device)
    ids = frozenset(job.records.ids)
    if not len(job.records):
        return Trained(module=module.eval(), recipe=job.recipe, ids=ids)
    slices, logs = list(job.kept[: job.from_slice]), []
    if slices:
        module.load_state_dict(dict(slices[-1]))
    home = [job.sharding.slice_of(owner) for owner in job.records.owners]
    for stage in range(job.from_slice, job.sharding.slices):
        rows = job.records.select([position for position, place in enumerate(home) if place <= stage])
        if len(rows):
            logs.append(_train_slice(module, job, rows, stage, tally))
        slices.append(copy_state(module))
    log = _joined(logs, tuple(slices) if job.sharding.slices > 1 else ())
    return Trained(module=module.eval(), recipe=job.recipe, ids=ids, log=log)


def _train_slice(module: nn.Module, job: _Job, rows: Records, stage: int, tally: Tally) -> TrainingLog:
    return fit(
        module,
        job.recipe.staged(slice_epochs(job.recipe.epochs, job.sharding.slices)),
        rows,
        stage=f"slice-{stage}",
        keep=job.keep,
        saver=job.saver,
        report=job.report,
        tally=tally,
    )


def _joined(logs: list[TrainingLog], slices: tuple[State, ...]) -> TrainingLog:
    checkpoints: dict[int, State] = {}
    batches: list[tuple[str, ...]] = []
    steps = 0
    for log in logs:
        checkpoints.update({steps + step: state for step, state in log.checkpoints.items()})
        batches += log.batches
        steps += log.steps
    return TrainingLog(
        steps=steps,
        rows_read=sum(log.rows_read for log in logs),
        threads=logs[0].threads,
        build=logs[0].build,
        losses=tuple(loss for log in logs for loss in log.losses),
        batches=tuple(batches),
        checkpoints=checkpoints,
        slices=slices,
    )


def train_shards(
    recipe: Recipe,
    records: Records,
    *,
    keep: Keep = NOTHING,
    saver: Saver | None = None,
    report: Report | None = None,
    engine: Engine = LOCAL,
    tally: Tally | None = None,
) -> Trained:
    """Train every shard of a completed recipe. Warns (`ShardWarning`) of a shard past twice the mean."""
    sharding = _sharding(recipe)
    sizes = shard_sizes(records, sharding)
    if sizes.uneven:
        warnings.warn(str(sizes), ShardWarning, stacklevel=3)
    jobs = [
        _Job(
            index=index,
            recipe=recipe.part(index),
            sharding=sharding,
            records=rows,
            keep=keep,
            saver=saver.part(index) if saver is not None else None,
            report=_of_part(report, index, sharding.shards),
        )
        for index, rows in enumerate(shards_of(records, sharding))
    ]
    parts = dict(engine.map(_train_part, jobs, tally or Tally()))
    return assemble(recipe, tuple(parts[index] for index in range(len(jobs))))


def retrain_shards(
    trained: Trained, retain: Records, touched: Mapping[int, int], *, engine: Engine = LOCAL, tally: Tally | None = None
) -> Trained:
    """Train the touched shards again on their rows in `retain`, and leave the others as they are.

    With the thread count that the others were trained with, whatever it is now: else the bytes would be a mixture.

    Args:
        trained: a sharded model.
        retain: all rows that stay.
        touched: for each touched shard, the first slice that is no longer clean.
        engine: where to train.
        tally: counts the work.
    """
    recipe, sharding = trained.recipe, _sharding(trained.recipe)
    rows = shards_of(retain, sharding)
    used = {part.log.threads for part in trained.parts if part.log is not None}
    jobs = []
    for index, from_slice in sorted(touched.items()):
        log = trained.parts[index].log
        kept = log.slices if log is not None else ()
        clean = min(from_slice, len(kept))
        keep = Keep(batches=bool(log and log.batches))
        jobs.append(
            _Job(
                index=index,
                recipe=recipe.part(index),
                sharding=sharding,
                records=rows[index],
                from_slice=clean,
                kept=kept,
                threads=min(used) if used else None,
                keep=keep if clean == 0 else NOTHING,
            )
        )
    parts = list(trained.parts)
    for place, part in engine.map(_train_part, jobs, tally or Tally()):
        parts[jobs[place].index] = part
    return assemble(recipe, tuple(parts))


def first_unclean_slices(trained: Trained, forget: Records) -> dict[int, int]:
    """For each shard that holds one of these rows: the first slice that does."""
    sharding = _sharding(trained.recipe)
    touched: dict[int, int] = {}
    for owner in set(forget.owners):
        shard = sharding.shard_of(owner)
        touched[shard] = min(sharding.slice_of(owner), touched.get(shard, sharding.slices))
    return touched


def assemble(recipe: Recipe, parts: tuple[Trained, ...]) -> Trained:
    """One sharded model of these parts; those without rows abstain."""
    modules = tuple(part.module for part in parts if part.ids)
    ids = frozenset().union(*(part.ids for part in parts))
    return Trained(module=build(recipe, modules).eval(), recipe=recipe, ids=ids, parts=parts)


def _sharding(recipe: Recipe) -> Sharding:
    if recipe.sharding is None:
        raise ValueError("this needs a sharded recipe")
    return recipe.sharding


def _of_part(report: Report | None, index: int, shards: int) -> Report | None:
    if report is None:
        return None
    return lambda stage, done, steps: report(
        f"shard {index + 1} of {shards}, {stage}", index * steps + done, shards * steps
    )
