"""What red-teaming a model found: of each attack, of each screen, and of what is left of the one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from expunge.attack.measured import Measured, Tried, grouped
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, proportion
from expunge.study.redteam_screens import Benign, Watched


@dataclass(frozen=True, kw_only=True)
class Redteam:
    """Everything that was measured; the rest follows from it.

    Attributes:
        about: all settings.
        tried: every attempt.
        watched: what every policy said of it.
        benign: what every policy said of requests in good faith.
        groups: make-up of an attempt's requests, by attack, budget and target.
        targets: label, wanted class and picture of each.
    """

    about: Mapping[str, Any]
    tried: tuple[Tried, ...]
    watched: tuple[Watched, ...]
    benign: tuple[Benign, ...]
    groups: Mapping[tuple[str, int, int], str]
    targets: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(
        cls,
        about: Mapping[str, Any],
        cells: Mapping[tuple[str | int | float, ...], Mapping[str, Any]],
        targets: Sequence[Mapping[str, Any]],
    ) -> Redteam:
        """From the cells of a finished run."""
        trials = [line for key, line in cells.items() if key[0] == "tried"]
        tried = tuple(Tried.from_json(line["tried"]) for line in trials)
        return cls(
            about=dict(about),
            tried=tried,
            watched=tuple(_watched(one) for line in trials for one in line["watched"]),
            benign=tuple(_benign(one) for key, line in cells.items() if key[0] == "benign" for one in line["benign"]),
            groups={_key(one): line["group"] for one, line in zip(tried, trials, strict=True)},
            targets=tuple(dict(one) for one in targets),
        )

    # ---- attacks

    @cached_property
    def measured(self) -> Mapping[tuple[str, int], Measured]:
        """By attack and budget."""
        found = grouped(self.tried, exact=bool(self.about["exact"]))
        names, budgets = self.about["attacks"], self.about["budgets"]
        return {(name, rows): found[name, rows] for name in names for rows in budgets if (name, rows) in found}

    @property
    def policies(self) -> tuple[str, ...]:
        """Screens, and their combination last."""
        return tuple(self.about["policies"])

    @property
    def largest(self) -> int:
        """The largest budget, at which attacks are told of and policies compared."""
        return int(max(self.about["budgets"]))

    @property
    def carried_out(self) -> bool:
        """Whether any attempt came to anything."""
        return any(at.done for at in self.measured.values())

    def at_most(self, attack: str) -> Measured:
        """This attack at the largest budget."""
        return self.measured[attack, self.largest]

    @cached_property
    def refused(self) -> frozenset[tuple[str, int]]:
        """Attacks and budgets all of whose requests the unlearner refused: every target is as it was before."""
        return frozenset(key for key, at in self.measured.items() if at.done and all(map(_unmoved, at.done)))

    @property
    def screened(self) -> tuple[str, ...]:
        """Attacks that came to anything at the largest budget, without those that the unlearner refused."""
        names = self.about["attacks"]
        return tuple(one for one in names if self.at_most(one).done and (one, self.largest) not in self.refused)

    @property
    def harmful(self) -> tuple[str, ...]:
        """Attacks that move targets through the unlearner further than any control that does not know the target."""
        return tuple(name for name in self.about["attacks"] if self.at_most(name).harms("through"))

    @property
    def uncaught(self) -> tuple[str, ...]:
        """Harmful attacks that no policy catches."""
        return tuple(name for name in self.harmful if not any(self.catches(policy, name) for policy in self.policies))

    # ---- screens

    def said(self, policy: str, attack: str, budget: int) -> Mapping[int, Watched]:
        """What a policy said, by target."""
        of = (policy, attack, budget)
        return {one.target: one for one in self.watched if (one.policy, one.attack, one.budget) == of}

    def good_faith(self, policy: str, attack: str, budget: int) -> list[Benign]:
        """What it said of requests in good faith of the same make-up, of each make-up that the attack had."""
        made = {group for (name, rows, _), group in self.groups.items() if (name, rows) == (attack, budget)}
        return [one for one in self.benign if one.policy == policy and one.group in made]

    def false_alarms(self, policy: str, attack: str, budget: int) -> Estimate | None:
        """Share of requests in good faith of the attack's make-up that the policy delays; over draws.

        None if the attack filed nothing.
        """
        delayed = [flag for one in self.good_faith(policy, attack, budget) for flag in one.delayed]
        return proportion(sum(delayed), len(delayed)) if delayed else None

    def catches(self, policy: str, attack: str) -> bool:
        """True if attempts are caught more often than requests in good faith: the interval lies above that share."""
        said = self.said(policy, attack, self.largest)
        if not said:
            return False
        power = proportion(sum(one.delayed for one in said.values()), len(said))
        alarms = self.false_alarms(policy, attack, self.largest)
        return alarms is not None and power.low > max(alarms.value, self.about["rate"])

    def roc(self, policy: str, attack: str, budget: int) -> tuple[list[tuple[float, float]], float]:
        """Points (false alarms, caught) of all thresholds, and the area below; ties count half."""
        bad = [one.score for one in self.said(policy, attack, budget).values()]
        good = [score for one in self.good_faith(policy, attack, budget) for score in one.scores]
        if not bad or not good:
            raise Misuse(f'"{policy}" has nothing to say of "{attack}"; there is nothing to draw')
        points = [(0.0, 0.0)]
        for limit in sorted({*bad, *good}, reverse=True):
            points.append((sum(s >= limit for s in good) / len(good), sum(s >= limit for s in bad) / len(bad)))
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        return points, area

    # ---- JSON

    def to_json(self) -> dict[str, Any]:
        """All that was measured, and what follows from it, as plain JSON values."""
        return {
            "about": dict(self.about),
            "targets": [dict(one) for one in self.targets],
            "tried": [one.to_json() for one in self.tried],
            "watched": [asdict(one) for one in self.watched],
            "benign": [asdict(one) for one in self.benign],
            "groups": [[*key, group] for key, group in self.groups.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Redteam:
        """What `to_json` wrote."""
        return cls(
            about=dict(data["about"]),
            targets=tuple(dict(one) for one in data["targets"]),
            tried=tuple(Tried.from_json(one) for one in data["tried"]),
            watched=tuple(_watched(one) for one in data["watched"]),
            benign=tuple(_benign(one) for one in data["benign"]),
            groups={(name, rows, target): group for name, rows, target, group in data["groups"]},
        )


def _unmoved(tried: Tried) -> bool:
    """Whether requests were refused, and the model answers as before."""
    after, before = tried.of("through", "attack")[0], tried.of("through", "nothing")[0]
    return bool(after.refused) and (after.margin, after.accuracy) == (before.margin, before.accuracy)


def _key(tried: Tried) -> tuple[str, int, int]:
    return tried.attack, tried.budget, tried.target


def _watched(data: Mapping[str, Any]) -> Watched:
    return Watched(**{**data, "reasons": tuple(data["reasons"])})


def _benign(data: Mapping[str, Any]) -> Benign:
    return Benign(**{**data, "scores": tuple(data["scores"]), "delayed": tuple(data["delayed"])})
