"""What is to be done with a request, and why: never is a valid erasure dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from expunge.core.protocols import Judgement
from expunge.core.request import Request
from expunge.screen.asked import Asked

Action = Literal["carry out", "exact", "purge", "refuse"]
_REASONS = 5
"""Rows named for each screen; their judgements hold all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What follows from screening a request.

    ``carry out``: as asked. ``exact``: a valid erasure that screens flagged; it is carried out all the same, by exact
    retraining, and the release waits until its targets are checked and a person has seen the reasons. ``purge``: a
    flagged replacement; both the row and what was to replace it go. ``refuse``: the model was trained on none of the
    rows, so that nothing is there to remove.

    Attributes:
        action: see above.
        hold: whether the release waits for a person.
        request: what to carry out; of a request with rows that were never trained on, the others; empty if refused.
        p: p-value of the request among benign ones of its size; None if it was not compared with any.
        rate: flagged if p is at most this.
        p_values: of each screen alone, not corrected for their number.
        judgements: of each screen, one for each row.
        reasons: for people, one line each; they name records by id and hold no contents.
    """

    action: Action
    hold: bool
    request: Request
    p: float | None
    rate: float
    p_values: Mapping[str, float] = field(default_factory=dict)
    judgements: Mapping[str, tuple[Judgement, ...]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def flagged(self) -> bool:
        """Whether the screens found the request unlike benign ones."""
        return self.p is not None and self.p <= self.rate

    def __str__(self) -> str:
        p = "" if self.p is None else f" · p {self.p:.3g} at a false-alarm rate of {self.rate:g}"
        return f"{self.action}{' · held' if self.hold else ''}{p}"

    @property
    def told(self) -> str:
        """What was found, in words that name no record and hold none of its contents: a permanent log may keep them."""
        if self.action == "refuse":
            return "the model was trained on none of the rows"
        if self.p is None:
            return "nothing was asked that is still there"
        at = f"p {self.p:.3g}, at {100 * self.rate:g} % false alarms"
        if not self.flagged:
            return f"not flagged: {at}"
        by = [(name, p) for name, p in sorted(self.p_values.items(), key=lambda one: one[1]) if p <= self.rate]
        if len(self.p_values) == 1:
            return f"flagged by {next(iter(self.p_values))}: {at}"
        alone = "; ".join(f"by {name}: p {p:.3g}" for name, p in by) or "by no screen alone"
        return f"flagged {alone}; by all {len(self.p_values)} together: {at}"

    def to_json(self) -> dict[str, Any]:
        """All but rows' contents as plain JSON values: a person or a log can keep it."""
        rows = {
            name: [
                {"record": one.record, "score": one.score, "flagged": one.flagged, "reason": one.reason}
                for one in judged
            ]
            for name, judged in self.judgements.items()
        }
        return {
            "action": self.action,
            "hold": self.hold,
            "p": self.p,
            "rate": self.rate,
            "p_values": dict(self.p_values),
            "judgements": rows,
            "reasons": list(self.reasons),
            "kind": self.request.kind,
            "ids": list(self.request.ids),
        }


def nothing_asked(request: Request, rate: float) -> Decision:
    """Of a request for nothing, or for what is gone already: the identity."""
    return Decision(action="carry out", hold=False, request=request, p=None, rate=rate)


def refused(request: Request, asked: Asked, rate: float, judgements: Mapping[str, tuple[Judgement, ...]]) -> Decision:
    """Of a request for rows that the model was never trained on."""
    empty = replace(Request.remove(()), **_about(request))
    reasons = ("nothing was ever trained on: there is nothing to remove", *_strangers(asked))
    return Decision(
        action="refuse", hold=False, request=empty, p=None, rate=rate, judgements=judgements, reasons=reasons
    )


def decide(
    request: Request,
    asked: Asked,
    *,
    p: float,
    p_values: Mapping[str, float],
    rate: float,
    judgements: Mapping[str, tuple[Judgement, ...]],
) -> Decision:
    """Of a request with rows that were trained on, and its p-values."""
    action: Action = "carry out"
    out = request if asked.strangers is None else replace(asked.request(), **_about(request))
    reasons = _strangers(asked)
    if p <= rate:
        action = "exact" if asked.kind != "replace" else "purge"
        if action == "purge":
            out = replace(Request.remove(asked.ids), **_about(request))
        reasons = (*_why(p, p_values, rate, judgements, action), *reasons)
    return Decision(
        action=action,
        hold=p <= rate,
        request=out,
        p=p,
        rate=rate,
        p_values=p_values,
        judgements=judgements,
        reasons=reasons,
    )


def _about(request: Request) -> dict[str, Any]:
    """Who asked and when; not the key, under which another request was filed."""
    return {name: getattr(request, name) for name in ("asked_by", "received_at", "due_at")}


def _strangers(asked: Asked) -> tuple[str, ...]:
    names = () if asked.strangers is None else asked.strangers.ids
    return tuple(f"{name}: {why}" for name, why in zip(names, asked.why, strict=True))


def _why(
    p: float,
    p_values: Mapping[str, float],
    rate: float,
    judgements: Mapping[str, tuple[Judgement, ...]],
    action: Action,
) -> tuple[str, ...]:
    said = {
        "exact": "a valid erasure is never dropped: it goes to exact retraining, and the release is held for a person",
        "purge": "the rows and their replacements are both removed, and the release is held for a person",
    }[action]
    lines = [f"p {p:.3g} among benign requests of its size, at most {rate:g}; {said}"]
    for name, value in sorted(p_values.items(), key=lambda one: one[1]):
        if value <= rate:
            top = sorted(judgements.get(name, ()), key=lambda one: (not one.flagged, -one.score))[:_REASONS]
            lines.append(f"{name}: p {value:.3g}")
            lines += [f"{name}: {one.record}: {one.reason}" for one in top]
    return tuple(lines)
