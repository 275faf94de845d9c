"""Carrying out: many requests about one model, resolved to records and removed in one go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Generator

from expunge.core.claim import Claim, Exactness, Guarantee
from expunge.core.errors import Corrupt, Unsupported
from expunge.core.events import Event, Retrained
from expunge.core.protocols import Method, Unlearned
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.unlearn.method import Method as OurMethod
from expunge.workflow.witness import Witness


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """What became of a model.

    Attributes:
        trained: the model after.
        mine: for each request, the ids that were removed for it.
        already: for each request, how many of its records were gone before.
        claim: the weakest of what its steps may claim.
        exactness: for EXACT, in which sense.
        guarantee: for CERTIFIED, what backs it.
        events: what happened.
        witness: who watched training; None if the method cannot be watched.
        changed: False if nothing was left to remove.
    """

    trained: Trained
    mine: Mapping[str, frozenset[str]]
    already: Mapping[str, int]
    claim: Claim
    exactness: Exactness | None
    guarantee: Guarantee | None
    events: tuple[Event, ...]
    witness: Witness | None
    changed: bool

    def carried_over(self) -> Iterable[str]:
        """Ids of the records of those parts that were not trained anew."""
        anew = {event.part for event in self.events if isinstance(event, Retrained)}
        if not self.trained.parts or -1 in anew:
            return ()
        return (one for index, part in enumerate(self.trained.parts) if index not in anew for one in part.ids)


def carry_out(
    method: Method, trained: Trained, records: Records, requests: Mapping[str, Request], *, rng: Generator
) -> Carried:
    """Carry out these requests together, in one call of the method.

    A record that several requests name is removed for the first of them, and was "already gone" for the others.

    Raises:
        UnknownRecord, NeverTrained, EmptyRetain, Unsupported: as the method does, before any work.
        Corrupt: if the model that the method hands back does not book the records as gone.
    """
    mine: dict[str, frozenset[str]] = {}
    already: dict[str, int] = {}
    taken: set[str] = set()
    for name, request in requests.items():
        refuse_replacement(request)
        split = request.split(records, ids=trained.ids - taken, gone=trained.gone | taken)
        mine[name] = frozenset(split.forget.ids)
        already[name] = split.already
        taken |= mine[name]
    if not taken:
        return _unchanged(trained, mine, already)
    witness = Witness() if isinstance(method, OurMethod) and method.claim is Claim.EXACT else None
    together = Request.remove(sorted(taken))
    if isinstance(method, OurMethod):
        answer = method(trained, records, together, rng=rng, tally=witness)
    else:
        answer = method(trained, records, together, rng=rng)
    _refuse_other_books(trained, answer.trained, frozenset(taken))
    _refuse_other_parts(trained, answer)
    claim = answer.claim if answer.claim is Claim.EXACT else Claim.weaker(answer.claim, trained.standing)
    if witness is not None:
        witness.due = trained.ids - taken
    return Carried(
        trained=answer.trained if answer.claim is Claim.EXACT else _without_log(answer.trained),
        mine=mine,
        already=already,
        claim=claim,
        exactness=answer.exactness,
        guarantee=answer.guarantee if claim is Claim.CERTIFIED else None,
        events=answer.events,
        witness=witness,
        changed=True,
    )


def refuse_replacement(request: Request) -> None:
    """Unsupported for a replace-request: a workspace holds no rows, so that the new ones would be lost."""
    if request.kind == "replace":
        raise Unsupported(
            "a workspace keeps no rows, so it cannot keep replacements; mend your data and register a model trained on "
            "it, or call a method with Request.replace_rows yourself"
        )


def _refuse_other_books(before: Trained, after: Trained, taken: frozenset[str]) -> None:
    if after.ids & taken or not taken | before.gone <= after.gone:
        raise Corrupt("the method's model still names records that were to be removed, or not all as gone; mend it")
    if after.ids - before.ids:
        raise Corrupt("the method's model stands on records that the model before did not stand on; mend the method")


def _refuse_other_parts(before: Trained, answer: Unlearned) -> None:
    """A part that the method does not say it trained anew must be the one that it was, to the bit."""
    anew = {event.part for event in answer.events if isinstance(event, Retrained)}
    if answer.claim is not Claim.EXACT or -1 in anew or not answer.trained.parts:
        return
    if len(before.parts) != len(answer.trained.parts):
        raise Corrupt("the method handed back another number of parts, and does not say that all were trained anew")
    for index, (old, new) in enumerate(zip(before.parts, answer.trained.parts, strict=True)):
        if index not in anew and (old.ids != new.ids or old.digest() != new.digest()):
            raise Corrupt(
                f"part {index} was changed, or its books were, and the method does not say that it was trained"
            )


def _without_log(trained: Trained) -> Trained:
    """What a method that is not exact notes of its steps may be secret, and is of no use to later requests."""
    return replace(trained, log=None, parts=tuple(map(_without_log, trained.parts)))


def _unchanged(trained: Trained, mine: Mapping[str, frozenset[str]], already: Mapping[str, int]) -> Carried:
    return Carried(
        trained=trained,
        mine=mine,
        already=already,
        claim=Claim.NONE,
        exactness=None,
        guarantee=None,
        events=(),
        witness=None,
        changed=False,
    )
