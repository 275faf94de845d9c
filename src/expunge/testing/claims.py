"""Checks of what a method claims, and of what stays gone."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Generator

from expunge.core.claim import Claim
from expunge.core.events import Removed
from expunge.core.protocols import Unlearned, Verdict
from expunge.core.trained import Trained
from expunge.testing.case import private_copy
from expunge.testing.trial import NamedCheck, Trial


class ClaimBacked(NamedCheck):
    """Nothing is claimed without what must stand behind it, and never more than the class declares.

    EXACT says in which sense; CERTIFIED has a guarantee with a basis, and nothing else has one; books and events
    carry the same claim as the result.
    """

    name: ClassVar[str] = "claim-backed"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Read one result."""
        declared, result = subject.method.claim, subject.first
        claim, guarantee = result.claim, result.guarantee
        backed = guarantee is not None and guarantee.basis != "none"
        said = [event.claim for event in result.events if isinstance(event, Removed)]
        rows = sum(event.rows for event in result.events if isinstance(event, Removed))
        faults = {
            f"claims {claim.value}, and the class declares {declared.value}": Claim.weaker(claim, declared)
            is not claim,
            "claims exact and does not say in which sense": claim is Claim.EXACT and result.exactness is None,
            "says in which sense it is exact without claiming so": claim is not Claim.EXACT and bool(result.exactness),
            "claims certified without a guarantee that has a basis": claim is Claim.CERTIFIED and not backed,
            "has a guarantee with a basis and does not claim it": claim is not Claim.CERTIFIED and backed,
            "the books say exact and the result does not": (result.trained.standing is Claim.EXACT)
            != (claim is Claim.EXACT),
            f"the events claim {', '.join(said) or 'nothing'}": said != [claim.value],
            f"the events tell of {rows} rows removed": rows != len(subject.case.forget),
        }
        return self.unless([why for why, fault in faults.items() if fault], f"claims {claim.value}, as it may")


class ExactEqualsScratch(NamedCheck):
    """What is called exact has the bytes of a training from scratch without the removed rows.

    Trained by the method's own system with the recipe that the result reports. Pathwise, that recipe is the old one;
    in law it may differ in its seed. Statistics or positions that remember removed rows are caught here.
    """

    name: ClassVar[str] = "exact-equals-scratch"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Compare digests after one removal."""
        result = subject.first
        if result.claim is not Claim.EXACT:
            return self.passed("does not claim to be exact")
        before, after = subject.start().recipe, result.trained.recipe
        same_coins = after == before if result.exactness == "pathwise" else replace(after, seed=before.seed) == before
        problems = [f"exact {result.exactness}, and yet trained by another recipe"] * (not same_coins)
        problems += ["the bytes are not those of a training from scratch"] * (
            not equals_scratch(subject, result.trained)
        )
        return self.unless(problems, f"the bytes are those of a training from scratch ({result.exactness})")


def equals_scratch(subject: Trial, trained: Trained) -> bool:
    """True if training without all that is gone, by the recipe that the model reports, gives its bytes."""
    scratch = subject.train(trained.recipe, subject.case.records.without(trained.gone))
    return scratch.digest() == trained.digest()


class GoneStaysGone(NamedCheck):
    """Over a stream of requests, some naming rows gone before, all that was ever removed stays out.

    The books are cumulative. The last removal gives the same model whether the records that it is handed still hold
    the rows gone before or not: who reads them trains on them again. An exact result equals a training without all.
    """

    name: ClassVar[str] = "gone-stays-gone"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Three requests: some rows, some more with repeats, and all that is left of the case's own."""
        trained, gone = subject.start(), frozenset[str]()
        for ids in _stream(subject, rng):
            before = private_copy(trained)
            result = subject.call(trained, ids)
            gone |= frozenset(ids)
            problems = _problems_of_books(subject, result, gone)
            if problems:
                return self.unless(problems, "")
            trained = private_copy(result.trained)
        # The last request again, on records that no longer hold what was gone before it.
        lean = subject.call(
            before, [i for i in ids if i in before.ids], records=subject.case.records.without(before.gone)
        )
        verdict = self.alike(subject, result, lean, "leaving the rows gone before out of the records")
        if verdict.outcome == "fail":
            problems.append(f"reads rows that are gone: {verdict.why}")
        if result.claim is Claim.EXACT and not equals_scratch(subject, result.trained):
            problems.append("the last result is not a training without all rows that are gone")
        if not problems and verdict.outcome == "inconclusive":
            return verdict
        return self.unless(problems, f"{len(gone)} rows removed in three requests stay out", **verdict.figures)


def _stream(subject: Trial, rng: Generator) -> tuple[list[str], ...]:
    """Ids of three requests: one owner's share of the case's forget set and some other rows, then more with repeats."""
    pool = list(subject.case.forget.ids)
    others = list(subject.case.retain.ids)
    mixed = [pool[i] for i in torch.randperm(len(pool), generator=rng).tolist()]
    extra = [others[i] for i in torch.randperm(len(others), generator=rng)[:4].tolist()]
    cut = max(1, len(mixed) // 3)
    first, second, third = mixed[:cut] + extra[:2], mixed[cut : 2 * cut] + extra[2:], mixed[2 * cut :]
    return first, second + first[:2], third + second[:1] + first[:1]


def _problems_of_books(subject: Trial, result: Unlearned, gone: frozenset[str]) -> list[str]:
    after = result.trained
    faults = {
        "a row that was removed is no longer booked as gone": not gone <= after.gone,
        "a row that nobody removed is booked as gone": not after.gone <= gone,
        "a row is both trained on and gone": bool(after.ids & after.gone),
        "the ids are not those that remain": after.ids != frozenset(subject.case.records.ids) - gone,
    }
    return [why for why, fault in faults.items() if fault]


CLAIMS: tuple[NamedCheck, ...] = (ClaimBacked(), ExactEqualsScratch(), GoneStaysGone())
