"""Verification as a stage of the journey of a request: the model to be released equals a replay of its retraining."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Generator

from expunge.core.coins import child
from expunge.core.errors import Corrupt, Impossible, Misuse, UnreadableFile, Unsupported
from expunge.core.protocols import Failed, Held, Job, NotDone, Passed, Verdict
from expunge.verify.reproduce import Replay, accepted
from expunge.verify.spot import All, Budget
from expunge.verify.tolerance import Tolerance
from expunge.verify.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class VerifyStage:
    """Replays the transcript of the retraining that made the model to be released, if one was recorded.

    The recipe agreed on is that of the model before. What it shows is what `Replay` shows without a public coin: it
    keeps honest operators from mistakes (a stale model, another recipe, rows left in), and no dishonest one from
    anything, who holds the folder too. Auditors run `expunge verify transcript` themselves.

    Attributes:
        folder: holds transcripts, each named by the digest of the model that it ends in.
        budget: which segments to replay.
        tolerance: how far off they may end; None measures it.
    """

    name: ClassVar[str] = "verify"
    folder: Path
    budget: Budget = All()  # noqa: RUF009
    tolerance: Tolerance | None = None

    def __call__(self, job: Job, *, rng: Generator) -> Passed | Held | Failed | NotDone:
        """Check the model after; not done, with the reason, where there is nothing to replay.

        Cost: with `All`, a training.
        """
        after = job.after
        if after is None:
            return NotDone(why="there is no model after the removal yet")
        place = self.folder / after.digest()
        if not place.is_dir():
            return NotDone(why="no transcript was recorded of the training that made this model")
        gone = (after.gone | frozenset().union(*(request.named(job.records) for request in job.requests))) - after.ids
        stays = job.records.where(lambda one, _: one in after.ids)
        forgotten = job.records.where(lambda one, _: one in gone)
        try:
            told = Transcript.open(place)
            verify = Replay(agreed=job.before.recipe, budget=self.budget, tolerance=self.tolerance)
            found = verify(told, stays, forget=forgotten, served=after, rng=child(rng, self.name))
        except (Unsupported, Impossible) as error:
            return NotDone(why=str(error))
        except (UnreadableFile, Corrupt, Misuse) as error:
            return Failed(why=f"the transcript cannot be replayed: {error}")
        evidence = {"commitment": told.commitment, "verdicts": [one.to_json() for one in found]}
        if accepted(found):
            return Passed(why=f"{len(found)} checks of its transcript passed", evidence=evidence)
        return Held(why="; ".join(_line(one) for one in found if not one.passed), evidence=evidence)


def _line(verdict: Verdict) -> str:
    return f"{verdict.check}: {verdict.outcome}, {verdict.why}"
