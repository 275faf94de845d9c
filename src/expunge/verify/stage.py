"""Verification as a stage of the journey of a request: the model to be released equals a replay of its retraining."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Generator

from expunge.core.coins import child
from expunge.core.errors import Corrupt, Impossible, Misuse, UnreadableFile, Unsupported
from expunge.core.protocols import Failed, Held, Job, NotDone, Passed, Verdict
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.shards import shards_of
from expunge.verify.reproduce import Replay, accepted, put_together
from expunge.verify.spot import All, Both, Budget, Random, TopQ
from expunge.verify.tolerance import EXACT, Tolerance
from expunge.verify.transcript import Transcript


@dataclass(frozen=True)
class Share:
    """A share of a transcript's segments, drawn by what the transcript commits to, and the largest update beside.

    Attributes:
        share: above 0; from 1 on all segments. One segment is drawn at least.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise Misuse(f"a share of the segments is above 0 and at most 1, got {self.share!r}")

    def choose(self, transcript: Transcript, *, rng: Generator) -> frozenset[int]:
        """Indices into `Transcript.segments`. Cost: below 1, reads every checkpoint once."""
        many = math.ceil(self.share * len(transcript.segments) - 1e-9)
        budget = All() if many >= len(transcript.segments) else Both((TopQ(1), Random(many)))
        return budget.choose(transcript, rng=rng)


@dataclass(frozen=True, kw_only=True)
class VerifyStage:
    """Replays the transcript of the retraining that made the model to be released, if one was recorded.

    The recipe agreed on is that of the model before. What it shows is what `Replay` shows without a public coin: it
    keeps honest operators from mistakes (a stale model, another recipe, rows left in), and no dishonest one from
    anything, who holds the folder too. Auditors run `expunge verify transcript` themselves.

    Of a sharded model those shards are checked that are not, to the bit, what they were before.

    Attributes:
        folder: of the transcript, or of the shards' transcripts as `record` lays them out; None: a `Journey` names it.
        budget: which segments to replay.
        tolerance: how far off they may end; None: not at all, or where a replay does end elsewhere, as on another kind
            of processor, as far as is measured on this machine.
    """

    name: ClassVar[str] = "verify"
    folder: Path | None = None
    budget: Budget = All()  # noqa: RUF009
    tolerance: Tolerance | None = None

    def at(self, folder: Path) -> VerifyStage:
        """This stage for the transcript in a folder, unless it has been given another."""
        return self if self.folder is not None else replace(self, folder=folder)

    def __call__(self, job: Job, *, rng: Generator) -> Passed | Held | Failed | NotDone:
        """Check the model after; not done, with the reason, where there is nothing to replay.

        Cost: with `All`, the retraining once more, and a SHA-256 of the model at each of its steps.
        """
        after, sharding = job.after, job.before.recipe.sharding
        if after is None:
            return NotDone(why="there is no model after the removal yet")
        if sharding is not None and sharding.slices != 1:
            return NotDone(why=f"transcripts are of shards with one slice each, and these have {sharding.slices}")
        if self.folder is None or not self.folder.is_dir():
            return NotDone(why="no transcript was recorded of the training that made this model")
        try:
            told = self._replayed(job, after, self.folder, child(rng, self.name))
        except (Unsupported, Impossible) as error:
            return NotDone(why=str(error))
        except (UnreadableFile, Corrupt, Misuse) as error:
            return Failed(why=f"the transcript cannot be replayed: {error}")
        return _judged(told)

    def _replayed(self, job: Job, after: Trained, folder: Path, rng: Generator) -> _Told:
        named = (request.named(job.records, job.before.gone, job.before.ids) for request in job.requests)
        gone = (after.gone | frozenset().union(*named)) - after.ids
        stays = job.records.where(lambda one, _: one in after.ids)
        forgotten = job.records.where(lambda one, _: one in gone)
        recipe = job.before.recipe.completed(stays)
        if recipe.sharding is None:
            told = Transcript.open(folder)
            found = self._checked(Replay(agreed=recipe), told, stays, forgotten, after, rng)
            return _Told(told.commitment, found)
        if len(job.before.parts) != len(after.parts):
            raise Misuse(f"the model before has {len(job.before.parts)} shards, the one after {len(after.parts)}")
        commitments: dict[str, str] = {}
        verdicts: list[Verdict] = []
        rows = shards_of(stays, recipe.sharding)
        for index in _anew(job.before, after, rows):
            place = folder / f"part-{index:04d}"
            if not place.is_dir():
                why = "it was trained anew, and there is no transcript of it"
                verdicts.append(Verdict(check=f"shard {index}, commitment", outcome="fail", why=why))
                continue
            told = Transcript.open(place)
            verify = Replay(agreed=recipe, shard=index)
            found = self._checked(verify, told, rows[index], forgotten, after.parts[index], rng)
            verdicts += [replace(one, check=f"shard {index}, {one.check}") for one in found]
            commitments[str(index)] = told.commitment
        if verdicts and not put_together(after, recipe, rows):
            why = "the served model is not its shards put together as the recipe says"
            verdicts.append(Verdict(check="final model", outcome="fail", why=why))
        return _Told(commitments, tuple(verdicts))

    def _checked(
        self, verify: Replay, told: Transcript, stays: Records, forgotten: Records, served: Trained, rng: Generator
    ) -> tuple[Verdict, ...]:
        """Seven verdicts; to the bit first, because to measure what else is honest costs hundreds of steps."""
        verify = replace(verify, budget=self.budget, tolerance=self.tolerance or EXACT)
        found = verify(told, stays, forget=forgotten, served=served, rng=rng)
        if self.tolerance is None and [one.check for one in found if not one.passed] == ["replay"]:
            found = replace(verify, tolerance=None)(told, stays, forget=forgotten, served=served, rng=rng)
        return found


@dataclass(frozen=True)
class _Told:
    """What was replayed: the commitment of a transcript, or of each shard's, and the verdicts."""

    commitment: str | Mapping[str, str]
    verdicts: tuple[Verdict, ...]


def _anew(before: Trained, after: Trained, rows: list[Records]) -> list[int]:
    """Shards with rows that are not what they were before."""
    pairs = zip(before.parts, after.parts, strict=True)
    changed = (old.ids != new.ids or old.digest() != new.digest() for old, new in pairs)
    return [index for index, one in enumerate(changed) if one and len(rows[index])]


def _judged(told: _Told) -> Passed | Held | NotDone:
    found = told.verdicts
    if not found:
        return NotDone(why="no shard with rows was trained anew, so that there is nothing to replay")
    evidence: dict[str, Any] = {"commitment": told.commitment, "verdicts": [one.to_json() for one in found]}
    if accepted(found):
        return Passed(why=f"{len(found)} checks of its transcript passed", evidence=evidence)
    return Held(why="; ".join(_line(one) for one in found if not one.passed), evidence=evidence)


def _line(verdict: Verdict) -> str:
    return f"{verdict.check}: {verdict.outcome}, {verdict.why}"
