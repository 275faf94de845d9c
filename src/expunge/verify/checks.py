"""The named checks of a transcript that need no training: each finds one kind of fault, and leaves the others be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator

from expunge.core.errors import UnreadableFile
from expunge.core.protocols import Verdict
from expunge.learn.build import build, build_name, seeded
from expunge.learn.loop import reading_order
from expunge.verify.evidence import FORGOTTEN, Evidence, said
from expunge.verify.states import GROUPS, Stepper, distance, misfit, same_coins, snapshot
from expunge.verify.transcript import Numbers


@dataclass(frozen=True)
class Contract:
    """The recipe, stage, rows and coin are those agreed on. Threads and builds may differ; figures tell."""

    name: ClassVar[str] = "contract"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Compare field by field."""
        contract, faults = subject.transcript.contract, subject.contract_faults
        same = contract.build == build_name(subject.records.device) and contract.threads == torch.get_num_threads()
        figures = {"threads": float(contract.threads), "same_build_and_threads": float(same)}
        if subject.coin is not None:
            figures["tries"] = float(subject.coin.tries)
        why = said(faults) if faults else "the contract is the one agreed on"
        return Verdict(check=self.name, outcome="fail" if faults else "pass", why=why, figures=figures)


@dataclass(frozen=True)
class Commitment:
    """The data root is that of the rows that stay, the chain holds, and every row and checkpoint was committed to."""

    name: ClassVar[str] = "commitment"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Recompute every link and digest. Cost: reads every checkpoint once."""
        faults, steps = subject.commitment_faults, len(subject.transcript)
        early = subject.committed is not None
        good = f"{steps:,} links, {len(subject.transcript.kept):,} checkpoints and the data root are as committed to"
        if not early:
            good += "; nobody was told beforehand what that is"
        figures = {"steps": float(steps), "faults": float(len(faults)), "committed_beforehand": float(early)}
        why = said(faults) if faults else good
        return Verdict(check=self.name, outcome="fail" if faults else "pass", why=why, figures=figures)


@dataclass(frozen=True)
class Initialisation:
    """Training began where the agreed recipe's seed begins: weights, buffers, fresh optimiser, dropout's coins.

    To the bit on the provider's own build; elsewhere weights may be off by `slack` of their norm. What build it was
    the provider says, so that any slack is the provider's to use: `Replay` leaves none at tolerance zero.
    """

    slack: float = 1e-6
    name: ClassVar[str] = "initialisation"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Build the untrained model and compare."""
        records, agreed = subject.records, subject.agreed
        try:
            told = subject.transcript.checkpoint(0)
        except UnreadableFile as error:
            return subject.judge(self.name, [str(error)], "")
        with seeded(agreed.seed, "dropout", subject.stage):
            stepper = Stepper(build(agreed).to(records.device), agreed)
            mine = snapshot(stepper.module, stepper.optimiser)
            problem = misfit(told, stepper.module, stepper.optimiser)
        if problem is not None:
            return subject.judge(self.name, [f"the start {problem}"], "")
        off = sum(distance(told, mine, group) for group in GROUPS)
        zero = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
        same = subject.transcript.contract.build == build_name(records.device)
        bound = 0.0 if same else self.slack * distance(mine, zero, "parameter")
        faults = [] if off <= bound else [f"training began {off:.2e} away from where the seed begins"]
        if not same_coins(told, mine, stepper.module):
            faults.append("dropout's coins began elsewhere than the seed begins")
        return subject.judge(self.name, faults, "training began where the seed begins", {"error": min(off, 1e300)})


@dataclass(frozen=True)
class Removal:
    """No step used a row to forget, by owner and content. Another owner's identical row is another row, and may stay.

    Where an owner keeps a row alike in content to one that it has forgotten, each epoch may use as many as stay.
    """

    name: ClassVar[str] = "removal"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Match every row of every step to a row that stays."""
        transcript = subject.transcript
        rows = subject.told[transcript.batch]
        forgotten = int((rows == FORGOTTEN).sum())
        faults = []
        if forgotten:
            first = int(np.searchsorted(transcript.ends, int(np.argmax(rows == FORGOTTEN)), side="right"))
            faults.append(f"{forgotten:,} times a step used a row to forget, first in step {first:,}")
        for epoch, (used, _) in enumerate(_epochs(subject) if len(subject.shared) else []):
            over = int(np.maximum(_count(used, subject) - subject.held, 0)[subject.shared].sum())
            if over:
                faults.append(f"epoch {epoch + 1} used {over:,} rows more than stay of those alike to forgotten ones")
        figures = {"rows_used": float(len(rows)), "forgotten_used": float(forgotten)}
        if subject.forget is None:
            why = "nothing was said to be forgotten"
            return Verdict(check=self.name, outcome="inconclusive", why=why, figures=figures)
        why = said(faults) if faults else f"none of {len(rows):,} rows used is one of {len(subject.forget):,} to forget"
        return Verdict(check=self.name, outcome="fail" if faults else "pass", why=why, figures=figures)


@dataclass(frozen=True)
class Sampler:
    """Each epoch uses every row that stays exactly once; with `order`, in exactly the order that the coins give.

    Attributes:
        order: None asks for the order under a public coin only: without one the provider chose the seed.
    """

    order: bool | None = None
    name: ClassVar[str] = "sampler"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Compare every epoch. A forgotten or foreign row is named by removal or commitment, not here."""
        order = subject.coin is not None if self.order is None else self.order
        expected = subject.agreed.epochs * subject.steps_in_epoch
        steps = len(subject.transcript)
        faults = [] if steps == expected else [f"{steps:,} steps were made, the contract makes {expected:,}"]
        most, others = 0, 0
        for epoch, (used, sizes) in enumerate(_epochs(subject)):
            count, strange = _count(used, subject), int((used < 0).sum())
            most, others = max(most, int(count.max(initial=0))), others + strange
            faults += self._faults(subject, epoch, used, sizes, count, strange, order)
        figures = {"epochs": float(subject.agreed.epochs), "most_uses": float(most), "strange_rows": float(others)}
        if others and not faults:
            why = f"{others:,} rows that removal or commitment names stand in other rows' places"
            return Verdict(check=self.name, outcome="inconclusive", why=why, figures=figures)
        how = "in the order that the coins give" if order else "in some order: the provider may have chosen it"
        return subject.judge(self.name, faults, f"every epoch uses each row once, {how}", figures)

    def _faults(
        self,
        subject: Evidence,
        epoch: int,
        used: Numbers,
        sizes: list[int],
        count: Numbers,
        strange: int,
        order: bool,
    ) -> list[str]:
        n, batch = len(subject.records), subject.agreed.batch_size
        over = int(np.maximum(count - subject.held, 0).sum())
        if over:
            return [f"epoch {epoch + 1} used {over:,} rows more often than they are held, one {int(count.max())} times"]
        if len(used) != n or sizes != [min(batch, n - start) for start in range(0, n, batch)]:
            return [f"epoch {epoch + 1} used {len(used):,} rows in {len(sizes):,} batches, not each of {n:,} once"]
        if order and epoch < subject.agreed.epochs:
            true = subject.own[reading_order(subject.agreed, subject.records, subject.stage, epoch).numpy()]
            wrong = int(((used != true) & (used >= 0)).sum())
            if wrong and not strange:
                return [f"epoch {epoch + 1} read {wrong:,} rows in another order than the coins give"]
            if wrong:
                return [f"epoch {epoch + 1} read {wrong:,} rows in another order, beside {strange:,} strange ones"]
        return []


@dataclass(frozen=True)
class FinalModel:
    """The model that is served is the one after the last step."""

    name: ClassVar[str] = "final model"

    def __call__(self, subject: Evidence, *, rng: Generator) -> Verdict:
        """Compare digests, and the architecture of a `Trained`. What others are served nobody sees here."""
        served = subject.served_digest()
        if served is None:
            return Verdict(check=self.name, outcome="inconclusive", why="no served model was given to compare with")
        same, other = served == subject.transcript.final, subject.served_otherwise()
        why = "is that after the last step" if same else "is another than that after the last step"
        why = said([f"the served model {other or why}"])
        return Verdict(check=self.name, outcome="pass" if same and other is None else "fail", why=why)


def _count(used: Numbers, subject: Evidence) -> Numbers:
    return np.bincount(used[used >= 0], minlength=len(subject.held)).astype(np.int64)


def _epochs(subject: Evidence) -> list[tuple[Numbers, list[int]]]:
    """For each epoch, as the contract cuts them: what its rows are (see `Evidence.told`), and its batches' sizes."""
    transcript, per = subject.transcript, subject.steps_in_epoch
    found = []
    for first in range(0, len(transcript), per):
        ends = transcript.ends[first : min(first + per, len(transcript)) + 1]
        found.append((subject.told[transcript.batch[ends[0] : ends[-1]]], np.diff(ends).tolist()))
    return found
