"""What the checks of a transcript look at, worked out once for all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch import nn

from expunge.core.digest import digest_tensors
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.protocols import Verdict
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.verify.coin import Coin
from expunge.verify.recorder import WHOLE
from expunge.verify.rows import data_root, numbered, root_of, row_commitments
from expunge.verify.states import model_digest
from expunge.verify.transcript import Numbers, Transcript, first_link, next_link

FORGOTTEN, FOREIGN = -1, -2


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """A transcript and what a verifier knows by itself.

    Attributes:
        transcript: what the provider says.
        agreed: the completed recipe that was agreed on, with the coin's coins under a public coin.
        records: the rows that stay.
        forget: the rows that must not have been used; None if there are none.
        served: the model that is served, or the digest of its parameters and buffers; None if not known.
        committed: the transcript's commitment, as it was published before anything was drawn; None if it was not.
        coin: the public coin; None without one.
        stage: name of the training that was agreed on.
        whole: for a shard, the recipe of all shards; None: `agreed` is all there is.
    """

    transcript: Transcript
    agreed: Recipe
    records: Records
    forget: Records | None = None
    served: Trained | nn.Module | str | None = None
    committed: str | None = None
    coin: Coin | None = None
    stage: str = WHOLE
    whole: Recipe | None = None

    @cached_property
    def names(self) -> list[bytes]:
        """Commitments to the rows that stay, in the records' order."""
        return row_commitments(self.records, self.transcript.contract.salt)

    @cached_property
    def forgotten(self) -> dict[bytes, int]:
        """Commitment to each row to forget, and a place of it in `forget`."""
        if self.forget is None:
            return {}
        return {name: i for i, name in enumerate(row_commitments(self.forget, self.transcript.contract.salt))}

    @cached_property
    def kinds(self) -> dict[bytes, int]:
        """A number for each distinct commitment among the rows that stay."""
        return {name: number for number, name in enumerate(dict.fromkeys(self.names))}

    @cached_property
    def own(self) -> Numbers:
        """The number in `kinds` of each row that stays, in the records' order."""
        return np.array([self.kinds[name] for name in self.names], dtype=np.int64)

    @cached_property
    def place_of(self) -> dict[bytes, int]:
        """A place in the records of each commitment."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def held(self) -> Numbers:
        """How many rows that stay have each commitment, by its number in `kinds`."""
        return np.bincount(self.own, minlength=len(self.kinds)).astype(np.int64)

    @cached_property
    def told(self) -> Numbers:
        """What each place of the transcript's list of rows is: its number in `kinds`, FORGOTTEN or FOREIGN."""
        lost = dict.fromkeys(self.forgotten, FORGOTTEN)
        known: Mapping[bytes, int] = {**lost, **self.kinds}
        return np.array([known.get(row.tobytes(), FOREIGN) for row in self.transcript.rows], dtype=np.int64)

    @cached_property
    def shared(self) -> Numbers:
        """Numbers in `kinds` of commitments that rows to forget have too."""
        return np.array(sorted(self.kinds[name] for name in self.forgotten if name in self.kinds), dtype=np.int64)

    @property
    def steps_in_epoch(self) -> int:
        """Steps that the agreed contract makes of one pass over the rows that stay."""
        return math.ceil(len(self.records) / self.agreed.batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch (0-based) of a step (from 1)."""
        return (step - 1) // self.steps_in_epoch

    @cached_property
    def contract_faults(self) -> list[str]:
        """How the transcript's contract differs from the agreed one."""
        contract, agreed = self.transcript.contract, self.agreed
        mine, theirs = agreed.to_json(), contract.recipe.to_json()
        faults = [
            f"{name} is {theirs.get(name)!s:.60}, agreed {mine.get(name)!s:.60}"
            for name in sorted({*mine, *theirs})
            if theirs.get(name) != mine.get(name)
        ]
        if contract.stage != self.stage:
            faults.append(f"stage is {contract.stage:.60}, agreed {self.stage}")
        if contract.rows != len(self.records):
            faults.append(
                f"it trains on {contract.rows:,} rows, but {len(self.records):,} stay without those named as forgotten"
            )
        return faults + self._coin_faults()

    def _coin_faults(self) -> list[str]:
        if self.coin is None:
            return []
        contract, commitments = self.transcript.contract, self.coin.commitments
        if contract.coin is None or dict(contract.coin) != self.coin.to_json():
            return ["it names another public coin, or none"]
        if contract.salt != commitments.salt:
            return ["its rows are committed to under another salt than the coin's"]
        if not self.coin.agrees(self.whole or self.agreed):
            return ["the coin was drawn for another recipe"]
        return []

    @cached_property
    def chain_faults(self) -> list[str]:
        """Steps whose link does not follow from the link before and what is told of them."""
        transcript, faults = self.transcript, []
        links = [link.tobytes() for link in transcript.links]
        digests = [digest.tobytes() for digest in transcript.digests]
        kept = transcript.kept
        if first_link(transcript.contract, digests[0], kept[0]) != links[0] and not self.contract_faults:
            faults.append("the chain does not begin with this contract and start")
        for step in range(1, len(transcript) + 1):
            own = next_link(links[step - 1], step, transcript.names(step), digests[step], kept.get(step, b""))
            if own != links[step]:
                faults.append(f"the link of step {step:,} does not follow from what is told of it")
        return faults

    @cached_property
    def commitment_faults(self) -> list[str]:
        """What was committed to otherwise than it is told now."""
        transcript, faults = self.transcript, list(self.chain_faults)
        if self.committed is not None and self.committed != transcript.commitment:
            faults.append("another transcript was committed to")
        root = data_root(self.records, transcript.contract.salt)
        if transcript.contract.data_root != root:
            faults.append("the data root is not that of the rows that stay")
        if self.coin is not None and self.stage == WHOLE:
            if self.coin.commitments.retained != root:
                faults.append("the coin was drawn for other rows than those that stay")
            if self.coin.commitments.forget != self._forget_root():
                faults.append("the coin was drawn for other rows than those to forget")
        foreign = int((self.told[transcript.batch] == FOREIGN).sum()) if len(transcript.batch) else 0
        if foreign:
            faults.append(f"{foreign:,} rows of batches were never committed to")
        return faults + self._checkpoint_faults()

    def _forget_root(self) -> str:
        gone = [] if self.forget is None else row_commitments(self.forget, self.transcript.contract.salt)
        return root_of(numbered(gone, Counter(self.names) + Counter(gone)))

    def _checkpoint_faults(self) -> list[str]:
        faults = []
        for step, digest in self.transcript.kept.items():
            try:
                state = self.transcript.checkpoint(step)
            except UnreadableFile as error:
                faults.append(str(error))
                continue
            whole = bytes.fromhex(digest_tensors(state))
            if whole != digest or model_digest(state) != self.transcript.digests[step].tobytes().hex():
                faults.append(f"the checkpoint of step {step:,} is not the one committed to")
        return faults

    @property
    def sound(self) -> bool:
        """True if the transcript is the one committed to, and of the agreed contract."""
        return not self.commitment_faults and not self.contract_faults

    def served_otherwise(self) -> str | None:
        """How the served model's architecture differs from the agreed one; None if it does not, or cannot be told."""
        if not isinstance(self.served, Trained):
            return None
        for name in ("model", "model_args", "dtype"):
            mine, theirs = (one.to_json()[name] for one in (self.agreed, self.served.recipe))
            if mine != theirs:
                return f"has {name} {theirs!s:.60}, agreed {mine!s:.60}"
        return None

    def served_digest(self) -> str | None:
        """Digest of the served model; Misuse for text that is no digest."""
        served = self.served
        if served is None:
            return None
        if isinstance(served, str):
            if len(served) != 64:
                raise Misuse(f"a digest has 64 hexadecimal digits, got {served[:70]!r}; see Trained.digest")
            return served
        return served.digest() if isinstance(served, Trained) else digest_tensors(served.state_dict())

    def judge(self, check: str, faults: list[str], good: str, figures: Mapping[str, float] | None = None) -> Verdict:
        """The verdict of a check that depends on what contract and commitment found.

        A fault in what was never committed to, or was never agreed to be so, is named by those checks and leaves the
        others inconclusive: one fault, one name.
        """
        outcome: Literal["pass", "fail", "inconclusive"] = "pass" if not faults else "fail"
        why = good if not faults else said(faults)
        if faults and not self.sound:
            outcome, why = "inconclusive", f"{why}; see contract and commitment"
        return Verdict(check=check, outcome=outcome, why=why, figures=dict(figures or {}))


def said(faults: list[str]) -> str:
    """The first fault, and how many more there are, in one line; a stranger's words cannot steer a terminal."""
    more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
    plain = "".join(letter if letter.isprintable() else "?" for letter in " ".join(faults[0].split()))
    return plain[:300] + more
