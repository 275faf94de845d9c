"""What is left of attacks where screens stand guard, what screens cost others, and which to take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from expunge.attack.measured import Measured, Outcome, Tried
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, mean, proportion
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_screens import TOGETHER

NO_SCREEN = "no screen"
_UNIT = "targets"


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is left of one attack where one policy stands guard, and what the policy costs others.

    Attributes:
        policy: a screen, ``combined`` or ``no screen``.
        caught: share of attempts that are not carried out at once, as calibrated; over targets. None without screen.
        hit: share of targets that are hit in the end, as calibrated.
        gain: the target's margin in the end less that of the model before, as calibrated; mean over targets.
        gain_equal: the same where the policy alarms on what scores above all but `rate` of the good faith measured
            here: what policies are compared by, as calibrations are off by chance, and an attempt of several requests
            gives each its chance.
        false_alarms: share of requests in good faith that are delayed, as calibrated; over draws.
        gradients: row gradients that a request in good faith costs more on average, for retraining after an alarm.
        auc: that an attempt is more suspicious than a request in good faith, ties counting half.
    """

    policy: str
    caught: Estimate | None
    hit: Estimate
    gain: Estimate
    gain_equal: Estimate
    false_alarms: Estimate | None
    gradients: float
    auc: float | None


def response(found: Redteam, policy: str, attack: str, budget: int) -> Response:
    """What is left of the attack under a policy, or under ``no screen``.

    An alarm decides about all requests of the attempt: a flagged erasure is carried out by exact retraining, a flagged
    replacement by purging both rows, a refused request not at all. A policy that is right still leaves what the attack
    does to exact retraining; that the release is held, and a person looks, is not in the figures.

    Raises:
        Misuse: if no attempt came to anything.
    """
    ends, equal = _ends(found, policy, attack, budget), gains(found, policy, attack, budget)
    if not ends:
        raise Misuse(f'no attempt of "{attack}" at {budget} rows came to anything')
    hits = [after.hit == 1.0 for after, _ in ends.values()]
    said = list(found.said(policy, attack, budget).values())
    alarms = None if policy == NO_SCREEN else found.false_alarms(policy, attack, budget)
    return Response(
        policy=policy,
        caught=proportion(sum(one.delayed for one in said), len(said)) if said else None,
        hit=proportion(sum(hits), len(hits)),
        gain=mean([after.margin - before.margin for after, before in ends.values()], unit=_UNIT),
        gain_equal=mean(list(equal.values()), unit=_UNIT),
        false_alarms=alarms,
        gradients=alarms.value * _retraining(found.measured[attack, budget]) if alarms else 0.0,
        auc=found.roc(policy, attack, budget)[1] if alarms else None,
    )


def gains(found: Redteam, policy: str, attack: str, budget: int) -> Mapping[int, float]:
    """By target, the margin in the end above that of the model before, at equal false alarms."""
    ends = _ends(found, policy, attack, budget, equal=True)
    return {target: after.margin - before.margin for target, (after, before) in ends.items()}


def _ends(
    found: Redteam, policy: str, attack: str, budget: int, *, equal: bool = False
) -> dict[int, tuple[Outcome, Outcome]]:
    """By target, the outcome in the end and the one before."""
    done = found.measured[attack, budget].done
    actions = dict.fromkeys((one.target for one in done), "carry out")
    if policy != NO_SCREEN:
        actions = _equal_actions(found, policy, attack, budget) if equal else _actions(found, policy, attack, budget)
    return {
        one.target: (_end(one, actions[one.target]), one.of("through", "nothing")[0])
        for one in done
        if one.target in actions
    }


def _actions(found: Redteam, policy: str, attack: str, budget: int) -> dict[int, str]:
    return {target: one.action for target, one in found.said(policy, attack, budget).items()}


def _equal_actions(found: Redteam, policy: str, attack: str, budget: int) -> dict[int, str]:
    good = sorted((score for one in found.good_faith(policy, attack, budget) for score in one.scores), reverse=True)
    if not good:
        return _actions(found, policy, attack, budget)
    limit = good[min(math.floor(found.about["rate"] * len(good)), len(good) - 1)]
    actions = {}
    for target, one in found.said(policy, attack, budget).items():
        answer = "purge" if "replace" in found.groups[attack, budget, target] else "exact"
        alarm = "refuse" if one.action == "refuse" else answer
        actions[target] = alarm if one.score > limit else "carry out"
    return actions


def _end(tried: Tried, action: str) -> Outcome:
    if action == "refuse":
        return tried.of("through", "nothing")[0]
    world = {"exact": "retrain", "purge": "purge", "carry out": "through"}[action]
    return (tried.of(world, "attack") or tried.of("retrain", "attack"))[0]  # an erasure has nothing to purge


def _retraining(at: Measured) -> float:
    """Row gradients that exact retraining takes beyond the unlearner, for a request in good faith."""
    exact, through = (at.mean(world, "random", "gradients").value for world in ("retrain", "through"))
    return max(0.0, exact - through)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which policy to take: by the mean over attacks, at the largest budget and equal false alarms, of what is gained.

    Attributes:
        best_single: the screen alone that leaves the least on average; chosen on these targets, which favours it. None
            if no policy leaves less than no screen.
        single_less_none: what it leaves less what no screen leaves, paired by target; below 0: it helps.
        combination_less_best: what the combination leaves less what the best single screen does; None without one.
    """

    best_single: str | None
    single_less_none: Estimate | None
    combination_less_best: Estimate | None

    @property
    def recommended(self) -> str:
        """The combination if it is shown to leave less than the best single screen; else that one if it helps.

        Else none: where retraining is harmed as the unlearner is, no alarm makes up for it.
        """
        if self.combination_less_best is not None and self.combination_less_best.high < 0:
            return TOGETHER
        helps = self.single_less_none is not None and self.single_less_none.high < 0
        return self.best_single if helps and self.best_single is not None else NO_SCREEN


def choose(found: Redteam) -> Choice:
    """Compare the policies."""
    alone = [one for one in found.policies if one != TOGETHER]
    left = {policy: _left(found, policy) for policy in (NO_SCREEN, *found.policies)}
    if not alone or not left[NO_SCREEN]:
        return Choice(best_single=None, single_less_none=None, combination_less_best=None)
    best = min(alone, key=lambda one: math.fsum(left[one].values()))
    if all(math.fsum(left[one].values()) >= math.fsum(left[NO_SCREEN].values()) for one in found.policies):
        # The best of them would be the one that fires least, which says nothing for it.
        return Choice(best_single=None, single_less_none=None, combination_less_best=None)
    together = _paired(left[TOGETHER], left[best]) if TOGETHER in left else None
    return Choice(
        best_single=best, single_less_none=_paired(left[best], left[NO_SCREEN]), combination_less_best=together
    )


def _left(found: Redteam, policy: str) -> dict[int, float]:
    """By target, the mean over attacks of what is gained."""
    by_target: dict[int, list[float]] = {}
    for name in found.about["attacks"]:
        for target, gain in gains(found, policy, name, found.largest).items():
            by_target.setdefault(target, []).append(gain)
    return {target: math.fsum(some) / len(some) for target, some in by_target.items()}


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate:
    return mean([ours[target] - theirs[target] for target in ours], unit=_UNIT)


def summary(found: Redteam) -> dict[str, Any]:
    """What follows, without the trials: an answer for each attack and budget, and what each policy leaves."""
    done = [name for name in found.about["attacks"] if found.at_most(name).done]
    policies = (NO_SCREEN, *found.policies)
    choice = choose(found)
    return {
        "attacks": [_told(name, rows, at) for (name, rows), at in found.measured.items()],
        "responses": [
            {"attack": name, **_finite(asdict(response(found, policy, name, found.largest)))}
            for name in done
            for policy in policies
        ],
        "harmful": list(found.harmful),
        "uncaught": list(found.uncaught),
        "refused": [list(one) for one in found.measured if one in found.refused],
        **_finite(asdict(choice)),
        "recommended": choice.recommended,
    }


def _told(name: str, rows: int, at: Measured) -> dict[str, Any]:
    differences = {w: {c: _finite(asdict(at.difference(w, c))) for c in at.controls(w)} for w in at.worlds}
    hits = {w: {arm: _finite(asdict(at.hits(w, arm))) for arm in ("attack", *at.controls(w))} for w in at.worlds}
    return {
        "attack": name,
        "budget": rows,
        "targets": len(at.done),
        "answer": at.answer if at.done else None,
        "sentence": at.sentence if at.done else "",
        "hits": hits,
        "differences": differences,
        "untried": list(at.untried),
    }


def _finite(value: Any) -> Any:
    """Plain JSON: of one target, intervals are infinite, which JSON cannot say; they become null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
