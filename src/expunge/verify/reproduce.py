"""Verification by replay: the steps of a transcript are made again, and every other promise in it is checked."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Generator, nn

from expunge.core.coins import generator
from expunge.core.digest import digest_tensors
from expunge.core.errors import Corrupt, EmptyRetain, Misuse, Unsupported
from expunge.core.protocols import Check, Verdict
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import threads
from expunge.learn.shards import shards_of
from expunge.verify import checks
from expunge.verify.coin import Coin, still_anchored
from expunge.verify.evidence import Evidence
from expunge.verify.recorder import SHARD, WHOLE, refuse_certified
from expunge.verify.segments import UNKNOWN, Segment, replay_segment
from expunge.verify.spot import All, Budget, at_random, chance_of_missing
from expunge.verify.states import GROUPS
from expunge.verify.tolerance import ForgeableWarning, Tolerance, calibrate_tolerance
from expunge.verify.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class Reexecution:
    """The check ``replay``: segments made again from their checkpoints, under the agreed recipe, and compared.

    Attributes:
        budget: which segments.
        tolerance: how far off they may end; None measures it on this machine first.
        threads: CPU threads to compute with; None: as many as are told, up to those of this machine.
    """

    budget: Budget = All()  # noqa: RUF009
    tolerance: Tolerance | None = None
    threads: int | None = None
    name: ClassVar[str] = "replay"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Make the chosen segments again. Cost: their steps, and a copy of the state each step."""
        told = subject.transcript
        drawn = self.budget.choose(told, rng=rng)
        chosen = sorted(drawn)
        count = self.threads or min(told.contract.threads, os.cpu_count() or 1)
        with threads(count):
            tolerance = self.tolerance or self._calibrated(subject)
            results = [replay_segment(subject, *told.segments[index]) for index in chosen]
        segments = [one for one in results if isinstance(one, Segment)]
        problems = [one for one in results if isinstance(one, str)]
        faults = problems + [fault for one in segments for fault in one.faults(tolerance)]
        every = len(chosen) == len(told.segments)
        figures = self._figures(subject, segments, tolerance, len(chosen), len(chosen) if every else at_random(drawn))
        self._warn(figures)
        unknown = [text for text in faults if text.endswith(UNKNOWN)]
        if unknown and len(unknown) == len(faults):
            return Verdict(check=self.name, outcome="inconclusive", why=unknown[0], figures=figures)
        missed = figures["miss_5_percent"]
        good = f"{len(chosen):,} of {len(told.segments):,} segments end where they are told to"
        if not every:
            good += (
                f"; one faulty segment is missed with chance {figures['miss_one']:.2g}, 5 % of them with {missed:.2g}"
            )
        if figures["worst_parameter"] > 0:
            good += f", off by up to {figures['worst_parameter']:.1e} ({figures['worst_of_step']:.1e} of a step)"
        if figures["forgeable"]:
            good += "; the tolerance is so wide that steps can be forged within it"
        return subject.judge(self.name, faults, good, figures)

    def _calibrated(self, subject: Evidence) -> Tolerance:
        longest = max((end - begin for begin, end in subject.transcript.segments), default=1)
        return calibrate_tolerance(subject.agreed, subject.records, every=longest, stage=subject.stage)

    def _figures(
        self, subject: Evidence, segments: list[Segment], tolerance: Tolerance, chosen: int, drawn: int
    ) -> dict[str, float]:
        every = len(subject.transcript.segments)
        lengths = [one.length["parameter"] for one in segments]
        figures = {
            "segments": float(every),
            "replayed": float(chosen),
            "drawn": float(drawn),
            "miss_one": chance_of_missing(every, min(1, every), drawn),
            "miss_5_percent": chance_of_missing(every, math.ceil(0.05 * every), drawn),
            "tolerance": max((tolerance.limit("parameter", length) for length in lengths), default=0.0),
            "forgeable": float(any(tolerance.forgeable(length) for length in lengths)),
            "worst_of_step": max((_share(one) for one in segments), default=0.0),
        }
        for group in GROUPS:
            figures[f"worst_{group}"] = max((_finite(one.error[group]) for one in segments), default=0.0)
        return figures

    def _warn(self, figures: dict[str, float]) -> None:
        if figures["forgeable"]:
            warnings.warn(
                "the tolerance is above 1 % of a step, where steps can be forged; leave it out to have it measured",
                ForgeableWarning,
                stacklevel=3,
            )


def _share(one: Segment) -> float:
    return _finite(one.error["parameter"] / max(one.length["parameter"], 1e-300))


def _finite(number: float) -> float:
    return min(number, 1e300)  # verdicts are written as JSON, which has no infinity


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Reproducing verification: seven named checks of a transcript, each with a verdict of its own.

    What it shows: the served model is what the agreed program makes of the rows that stay, up to the tolerance, for
    the segments that were replayed. Without a public coin it does not exclude that the batches were chosen to imitate
    the forgotten rows; with one, ``docs/verify.md`` lists what is left.

    Attributes:
        agreed: the recipe agreed on; never taken from the transcript.
        coin: the public coin; its seed, and salt of shards, replace the recipe's.
        shard: verify the transcript of this shard of a sharded recipe, against that shard's rows.
        budget: which segments to replay.
        tolerance: how far off they may end; None measures it on this machine first, see `calibrate_tolerance`.
        threads: CPU threads to compute with; None: as many as are told, up to those of this machine.
        order: whether batches must be those of the recipe's seed; None: under a public coin only.
    """

    agreed: Recipe
    coin: Coin | None = None
    shard: int | None = None
    budget: Budget = All()  # noqa: RUF009
    tolerance: Tolerance | None = None
    threads: int | None = None
    order: bool | None = None

    def checks(self) -> tuple[Check, ...]:
        """The checks, in order."""
        exact = self.tolerance is not None and self.tolerance.parameter == 0
        return (
            checks.Contract(),
            checks.Commitment(),
            checks.Initialisation(slack=0.0) if exact else checks.Initialisation(),
            checks.Removal(),
            checks.Sampler(self.order),
            Reexecution(budget=self.budget, tolerance=self.tolerance, threads=self.threads),
            checks.FinalModel(),
        )

    def __call__(
        self,
        transcript: Transcript,
        records: Records,
        *,
        forget: Records | None = None,
        served: Trained | nn.Module | str | None = None,
        committed: str | None = None,
        rng: Generator | None = None,
    ) -> tuple[Verdict, ...]:
        """Check a transcript, without changing it.

        Args:
            transcript: from `Transcript.open`.
            records: all rows that stay (of the shard, for a shard).
            forget: the rows that must not have been used.
            served: the model that is served, or its digest.
            committed: `Transcript.commitment` as the provider published it before `rng` was seeded.
            rng: draws spot checks; seed it from what the provider could not foresee. None: fresh entropy.

        Returns:
            One verdict each for contract, commitment, initialisation, removal, sampler, replay and final model.

        Raises:
            EmptyRetain: without rows that stay.
            Misuse: if rows to forget are among those that stay, where all of them would pass as rows that stay.
            Impossible: if the served model is a certified one.
            CodeNotAllowed: if the agreed recipe names code that nobody has allowed.
            Corrupt: if verifying changed the transcript.
        """
        if not len(records):
            raise EmptyRetain("there are no rows that stay, so that nothing can have been trained on them")
        if forget is not None and not set(forget.ids).isdisjoint(records.ids):
            raise Misuse("some rows to forget are among those that stay; give the rows without them")
        if isinstance(served, Trained):
            refuse_certified(served)
        whole = self._whole(records)
        evidence = Evidence(
            transcript=transcript,
            agreed=whole if self.shard is None else whole.part(self.shard),
            whole=whole,
            records=records,
            forget=forget,
            served=served,
            committed=committed,
            coin=self.coin,
            stage=WHOLE if self.shard is None else SHARD,
        )
        before = transcript.digest()
        rng = rng or generator(secrets.randbits(63))
        verdicts = tuple(check(evidence, rng=rng) for check in self.checks())
        if transcript.digest() != before:
            raise Corrupt("verifying changed the transcript; this is a fault of ours, and its verdicts are void")
        return verdicts

    def _whole(self, records: Records) -> Recipe:
        """The agreed recipe with its coins, of all shards for a shard."""
        recipe = self.agreed.completed(records)
        if self.coin is not None:
            recipe = self.coin.recipe(recipe)
        if self.shard is None and (recipe.sharding is not None or recipe.pruning is not None):
            raise Unsupported("replay is of dense models; verify each shard of a sharded one with shard=...")
        return recipe


def replay_shards(
    verify: Replay,
    transcripts: Mapping[int, Transcript],
    records: Records,
    *,
    forget: Records | None = None,
    served: Trained | None = None,
    rng: Generator | None = None,
) -> dict[int, tuple[Verdict, ...]]:
    """Check every shard of a sharded model by the transcript of its own last training.

    Args:
        verify: with the agreed, sharded recipe, and the coin if there is one; its `shard` is replaced.
        transcripts: by shard: of those with rows, all.
        records: all rows that stay.
        forget: all rows forgotten since the coin was drawn.
        served: the sharded model that is served.
        rng: draws spot checks; None: fresh entropy.

    Returns:
        The seven verdicts of each shard that has rows. Under a coin every shard's `commitment` fails if rows that stay
        and rows forgotten are not together what was anchored before the coin. A shard without a transcript has one
        verdict, a failed `commitment`. Every shard's `final model` fails if what is served is not its parts put
        together as agreed.

    Raises:
        Misuse: if the agreed recipe has no shards, or a transcript is of a shard that it has not.
        Impossible: if the served model is a certified one.
    """
    recipe = verify.agreed.completed(records)
    recipe = recipe if verify.coin is None else verify.coin.recipe(recipe)
    if recipe.sharding is None:
        raise Misuse("the agreed recipe has no shards; give the one with shards, or one transcript to replay by itself")
    shards = shards_of(records, recipe.sharding)
    strange = sorted(set(transcripts) - set(range(len(shards))))
    if strange:
        raise Misuse(f"there are {len(shards)} shards and a transcript of shard {strange[0]}; give those of the shards")
    faults: dict[str, str] = {}
    if verify.coin is not None and not still_anchored(verify.coin, records, forget):
        faults["commitment"] = "rows that stay and rows forgotten are not those anchored for the coin"
    if served is not None and not put_together(served, recipe, shards):
        faults["final model"] = "the served model is not its parts put together as agreed"
    found: dict[int, tuple[Verdict, ...]] = {}
    for index, rows in enumerate(shards):
        if len(rows) and index not in transcripts:
            found[index] = (
                Verdict(check="commitment", outcome="fail", why=f"shard {index} has rows and no transcript"),
            )
        elif len(rows):
            part = None if served is None or index >= len(served.parts) else served.parts[index]
            told = replace(verify, shard=index)(transcripts[index], rows, forget=forget, served=part, rng=rng)
            found[index] = tuple(_failed(one, faults) for one in told)
    return found


def put_together(served: Trained, recipe: Recipe, shards: Sequence[Records]) -> bool:
    """True if a served model is the parts of the shards with rows, and no others, put together as the recipe says."""
    if len(served.parts) != len(shards) or served.recipe.sharding != recipe.sharding:
        return False
    modules = tuple(part.module for part, rows in zip(served.parts, shards, strict=True) if len(rows))
    return digest_tensors(build(recipe, modules).state_dict()) == served.digest()


def _failed(verdict: Verdict, faults: Mapping[str, str]) -> Verdict:
    if verdict.check not in faults or verdict.outcome == "fail":
        return verdict
    return replace(verdict, outcome="fail", why=faults[verdict.check])


def accepted(verdicts: tuple[Verdict, ...]) -> bool:
    """True if every check passed; inconclusive is not passed."""
    return all(verdict.passed for verdict in verdicts)
