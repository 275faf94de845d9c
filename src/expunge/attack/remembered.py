"""The victims that a model is, one or one a shard, remembered with what they have computed."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from expunge.attack.aim import check_target
from expunge.attack.reaction import Reaction
from expunge.attack.victim import Victim
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.trained import Trained

_Kept = WeakKeyDictionary[Records, dict[tuple[tuple[Reaction, ...], int | None], tuple[Victim, ...]]]
_KEPT: WeakKeyDictionary[Trained, _Kept] = WeakKeyDictionary()


def victims(
    trained: Trained, records: Records, target: Target, through: Method, *, curvature_rows: int | None = 4096
) -> tuple[Victim, ...]:
    """The attacker's view of a model: one victim, or one for each shard that has rows.

    Those of the last two models are remembered while the model and the records live, with what they have computed, so
    that many targets on one model cost one factor of its curvature. Do not write to a model between two calls.

    Raises:
        Misuse: for a target that these records' models cannot be asked about.
    """
    check_target(target, records)
    return _remembered(trained, records, through, curvature_rows)


def _remembered(trained: Trained, records: Records, through: Method, rows: int | None) -> tuple[Victim, ...]:
    parts = [part for part in trained.parts if part.ids] or [trained]
    reactions = tuple(Reaction.of(through, part) for part in parts)
    of_model = _KEPT.pop(trained, None)
    of_model = WeakKeyDictionary() if of_model is None else of_model
    _KEPT[trained] = of_model  # the last in the order, so that the oldest goes first
    for oldest in list(_KEPT.keys())[:-2]:
        _KEPT.pop(oldest, None)
    known = of_model.setdefault(records, {})
    if (reactions, rows) not in known:
        pairs = zip(parts, reactions, strict=True)
        views = (Victim.view(part, records, reaction, curvature_rows=rows) for part, reaction in pairs)
        known[reactions, rows] = tuple(replace(one, share=1 / len(parts)) for one in views)
    return known[reactions, rows]
