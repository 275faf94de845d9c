"""Screens beside attacks: each alone and all together, calibrated alike, on requests in good faith and in bad."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from expunge.attack.judge import Attempt
from expunge.attack.judge_arms import size_of
from expunge.core.coins import child
from expunge.core.protocols import Screen
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.screen import Benign as Drawn
from expunge.screen import (
    Coalition,
    Decision,
    Desk,
    GradientInfluence,
    GradientNorm,
    Isolation,
    Membership,
    Screening,
    calibrate,
    understand,
)
from expunge.screen.calibrate import Kind
from expunge.screen.decide import decide
from expunge.screen.desk import named

TOGETHER = "combined"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What one policy said of one attempt's requests, together.

    Attributes:
        attack, target, budget: the attempt.
        policy: a screen's name, or ``combined``.
        score: the largest of its requests'.
        action: the gravest of its requests': refuse, purge, exact or carry out.
        delayed: whether any request was not carried out at once.
        reasons: for people, of the first such request.
    """

    attack: str
    target: int
    budget: int
    policy: str
    score: float
    action: str
    delayed: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Benign:
    """What one policy said of requests in good faith, of the sizes and kinds of an attack's.

    Attributes:
        group: sizes and kinds, as text.
        policy: a screen's name, or ``combined``.
        scores: one a draw.
        delayed: of each draw.
    """

    group: str
    policy: str
    scores: tuple[float, ...]
    delayed: tuple[bool, ...]


def group_of(attempt: Attempt, attack: str) -> str:
    """Kinds and sizes of an attack's requests: those in good faith that they are compared with have the same.

    An attacker who brought rows is compared on a model that has such rows too, and so has a group of its own.
    """
    made = ", ".join(f"{one.kind} {size_of(one, attempt.records)}" for one in attempt.requests)
    return f"{attack}: {made}" if attempt.brought else made


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """Policies on models: every screen alone, and all together, calibrated at once for a model, kind and size.

    Attributes:
        screens: at least one.
        rate: false alarms in good faith that each policy is calibrated to.
        draws: requests in good faith that it is calibrated on.
        rng: names the coins of calibrations and of good faith; attacks must have others.
    """

    screens: tuple[Screen, ...]
    rate: float
    draws: int
    rng: torch.Generator = field(repr=False)
    _made: dict[tuple[str, str, int], Screening] = field(default_factory=dict, repr=False)
    _desks: list[Desk] = field(default_factory=list, repr=False)

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the screens, and of their combination if there are several."""
        names = tuple(named(self.screens))
        return (*names, TOGETHER) if len(names) > 1 else names

    def attempt(self, attempt: Attempt, name: str, number: int, budget: int) -> list[Watched]:
        """What every policy says of an attack's requests.

        Each is looked at on the model as it was before the first.
        """
        found = [self._said(attempt.trained, attempt.records, one) for one in attempt.requests]
        found = found or [dict.fromkeys(self.policies, _Said(score=-_CERTAIN, action="carry out", delayed=False))]
        return [
            Watched(
                attack=name,
                target=number,
                budget=budget,
                policy=policy,
                score=max(said[policy].score for said in found),
                action=max((said[policy].action for said in found), key=_GRAVITY.index),
                delayed=any(said[policy].delayed for said in found),
                reasons=next((said[policy].reasons for said in found if said[policy].delayed), ()),
            )
            for policy in self.policies
        ]

    def benign(self, attempt: Attempt, group: str, draws: int) -> list[Benign]:
        """What every policy says of requests in good faith, as many draws of as many of the same kinds and sizes.

        Drawn as those of the calibration are, with other coins: random rows, replaced by other rows of their class.
        """
        found = [self._draw(attempt, child(self.rng, "good faith", draw)) for draw in range(draws)]
        return [
            Benign(
                group=group,
                policy=policy,
                scores=tuple(max(one[policy].score for one in said) for said in found),
                delayed=tuple(any(one[policy].delayed for one in said) for said in found),
            )
            for policy in self.policies
        ]

    def _draw(self, attempt: Attempt, coins: torch.Generator) -> list[dict[str, _Said]]:
        scene, said = self._desk(attempt.trained, attempt.records).scene, []
        for place, request in enumerate(attempt.requests):
            drawn = Drawn(scene, size=size_of(request, attempt.records), kind=kind_of(request))
            asked = drawn(child(coins, place)).request()
            said.append(self._said(attempt.trained, attempt.records, asked))
        return said

    def _said(self, trained: Trained, records: Records, request: Request) -> dict[str, _Said]:
        """Of each policy."""
        asked = understand(trained, records, request)
        every = self.decision(trained, records, request)
        if not asked.ids:  # every policy refuses what was never trained on
            return dict.fromkeys(self.policies, _Said.of(every, _CERTAIN))
        screening = self.screening(trained, records, kind=kind_of(request), size=len(asked.ids))
        wholes = screening.desk(trained, records).wholes(asked).tolist()
        found = {}
        for name, whole in zip(named(self.screens), wholes, strict=True):
            alone = decide(
                request,
                asked,
                p=every.p_values[name],
                p_values={name: every.p_values[name]},
                rate=self.rate,
                judgements={name: every.judgements[name]},
            )
            found[name] = _Said.of(alone, whole)
        if TOGETHER in self.policies:
            found[TOGETHER] = _Said.of(every, 1.0 - (1.0 if every.p is None else every.p))
        return found

    def decision(self, trained: Trained, records: Records, request: Request) -> Decision:
        """What all screens together say, calibrated for the request's kind and size."""
        size = max(1, len(understand(trained, records, request).ids))
        screening = self.screening(trained, records, kind=kind_of(request), size=size)
        return screening(trained, records, request, rng=self.rng)

    def screening(self, trained: Trained, records: Records, *, kind: Kind, size: int) -> Screening:
        """All screens together, calibrated on requests of this kind and size; made once."""
        desk = self._desk(trained, records)
        key = (desk.model, kind, size)
        if key not in self._made:
            self._made[key] = calibrate(
                self.screens,
                trained,
                records,
                size=size,
                kind=kind,
                rate=self.rate,
                draws=self.draws,
                rng=child(self.rng, "calibrate", kind, size),
                desk=desk,
            )
        return self._made[key]

    def _desk(self, trained: Trained, records: Records) -> Desk:
        """The screens that have looked at this model; of the last two models they keep what they saw."""
        for desk in self._desks:
            if desk.scene.trained is trained and desk.scene.records is records:
                return desk
        made = Desk(self.screens, trained, records, seed=child(self.rng, "looked").initial_seed())
        self._desks[:] = [*self._desks[-1:], made]
        models = {desk.model for desk in self._desks}
        for key in [key for key in self._made if key[0] not in models]:  # they hold what was seen of a whole model
            del self._made[key]
        return made


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a policy says of one request."""

    score: float
    action: str
    delayed: bool
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(cls, decision: Decision, score: float) -> _Said:
        delayed = decision.hold or decision.action != "carry out"
        return cls(score=score, action=decision.action, delayed=delayed, reasons=tuple(decision.reasons[:3]))


def kind_of(request: Request) -> Kind:
    """As screens are calibrated: rows given by content are removed too."""
    return "replace" if request.kind == "replace" else "remove"


SCREENS: Mapping[str, Callable[[], Screen]] = MappingProxyType(
    {
        "membership": Membership,
        "gradient-norm": GradientNorm,
        "gradient-influence": GradientInfluence,
        "isolation": Isolation,
        "coalition": Coalition,
    }
)
"""By the word on the command line, each with its defaults."""
_GRAVITY = ("carry out", "exact", "purge", "refuse")
_CERTAIN = 1e9
"""Score of a request that nothing was trained on, above any measured."""
