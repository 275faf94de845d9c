"""What a study of retention found: accuracies, paired gains over an honest retraining of as many steps, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.audit.metrics import auc
from expunge.core.estimate import Estimate, mean
from expunge.study.retention_parties import YARDSTICKS
from expunge.study.retention_rows import Chosen
from expunge.study.store import Key, Line

Figure = Literal["accuracy", "score", "seen"]
Word = Literal["retained", "not shown", "less than the honest retrain"]
FIGURES: tuple[Figure, ...] = ("accuracy", "score", "seen")
_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What was found. All intervals are Student's t over seeds: they cover training anew, not other forgotten rows.

    Attributes:
        about: all settings.
        seeds: how many runs.
        chosen: the rows of each group.
        models: by (group, seed, party), its line.
        matched: by (group, seed, steps), that of the honest retraining.
    """

    about: Mapping[str, Any]
    seeds: int
    chosen: Mapping[str, Chosen]
    models: Mapping[tuple[str, int, str], Line]
    matched: Mapping[tuple[str, int, int], Line]

    @classmethod
    def of(cls, about: Mapping[str, Any], cells: Mapping[Key, Line], seeds: int) -> Retention:
        """From the cells of a finished run."""
        kinds: dict[str, dict[Any, Line]] = {"rows": {}, "model": {}, "matched": {}}
        for key, line in cells.items():
            kinds[str(key[0])][key[1:]] = line
        chosen = {key[0]: Chosen.from_json(line) for key, line in kinds["rows"].items() if key[0] in about["groups"]}
        return cls(about=dict(about), seeds=seeds, chosen=chosen, models=kinds["model"], matched=kinds["matched"])

    @property
    def judged(self) -> tuple[str, ...]:
        """Parties that are no yardstick."""
        return tuple(name for name in self.about["parties"] if name not in YARDSTICKS)

    def accuracy(self, group: str, party: str, level: float = _LEVEL) -> Estimate:
        """On the forgotten rows, as a share."""
        return mean([line["accuracy"] for line, _ in self._pairs(group, party)], level)

    def honest_accuracy(self, group: str, party: str, level: float = _LEVEL) -> Estimate:
        """The same, of the honest retraining of as many steps."""
        return mean([honest["accuracy"] for _, honest in self._pairs(group, party)], level)

    def test(self, group: str, party: str, level: float = _LEVEL) -> Estimate:
        """Accuracy on test rows, as a share."""
        return mean([line["test"] for line, _ in self._pairs(group, party)], level)

    def gain(self, group: str, party: str, figure: Figure, level: float = _LEVEL) -> Estimate | None:
        """The party's figure minus that of the honest retraining of as many steps, paired by seed.

        ``accuracy`` is a share; ``score`` the mean of the forgotten rows' log odds; ``seen`` the AUC of telling the
        party's scores from the honest one's, each as its distance from the mean of other seeds' honest retrainings in
        their standard deviations, less one half. Seeds share those, so that intervals of ``seen`` are approximate.

        Returns:
            None for ``seen`` of fewer than three seeds.
        """
        pairs = self._pairs(group, party)
        if figure == "accuracy":
            return mean([line["accuracy"] - honest["accuracy"] for line, honest in pairs], level)
        ours, theirs = _scores(pairs)
        if figure == "score":
            return mean((ours - theirs).mean(1).tolist(), level)
        if len(pairs) < 3:
            return None
        found = []
        for seed in range(len(pairs)):
            others = torch.cat([theirs[:seed], theirs[seed + 1 :]])
            centre, width = others.mean(0), others.std(0).clamp_min(1e-3)
            found.append(auc((ours[seed] - centre) / width, (theirs[seed] - centre) / width).value - 0.5)
        return mean(found, level)

    def over_rows(self, group: str, party: str, level: float = _LEVEL) -> Estimate:
        """The gain in score with an interval over rows: it covers other rows of the group, not training anew."""
        ours, theirs = _scores(self._pairs(group, party))
        return mean((ours - theirs).mean(0).tolist(), level, "rows")

    def verdict(self, group: str, party: str, figure: Figure, level: float = _LEVEL) -> Word:
        """In words: whether the whole interval of the gain lies above zero, below it, or neither."""
        gain = self.gain(group, party, figure, level)
        if gain is not None and gain.low > 0:
            return "retained"
        return "less than the honest retrain" if gain is not None and gain.high < 0 else "not shown"

    @property
    def joint_level(self) -> float:
        """Of each interval, so that all of those of the judged parties hold at once with 95 % (Bonferroni)."""
        return 1 - (1 - _LEVEL) / max(1, len(self.judged) * len(self.chosen) * len(FIGURES))

    @property
    def widest(self) -> float:
        """Of all intervals of accuracies and of their gains, the widest, in points."""
        asked = [(group, party) for group in self.chosen for party in self.about["parties"]]
        gains = [self.gain(*one, "accuracy") for one in asked]
        every = [self.accuracy(*one) for one in asked] + [self.honest_accuracy(*one) for one in asked]
        return 100 * max(one.high - one.low for one in [*every, *gains] if one is not None)

    def _pairs(self, group: str, party: str) -> list[tuple[Line, Line]]:
        lines = [self.models[group, seed, party] for seed in range(self.seeds)]
        return [(line, self.matched[group, seed, line["match"]]) for seed, line in enumerate(lines)]

    def row(self, group: str, party: str) -> dict[str, Any]:
        """One line of the table as plain JSON values."""
        lines = [line for line, _ in self._pairs(group, party)]
        plain: dict[str, Any] = {
            "accuracy": self.accuracy(group, party).to_json(),
            "honest_accuracy": self.honest_accuracy(group, party).to_json(),
            "test": self.test(group, party).to_json(),
            "steps": sorted({line["steps"] for line in lines}),
            "matched_steps": sorted({line["match"] for line in lines}),
            "score_gain_over_rows": self.over_rows(group, party).to_json(),
        }
        for figure in FIGURES:
            gain = self.gain(group, party, figure)
            plain[figure + "_gain"] = None if gain is None else gain.to_json()
            plain[figure + "_verdict"] = self.verdict(group, party, figure)
            plain[figure + "_verdict_jointly"] = self.verdict(group, party, figure, self.joint_level)
        return plain

    def to_json(self) -> dict[str, Any]:
        """All but the single rows' scores as plain JSON values."""
        return {
            "about": dict(self.about),
            "seeds": self.seeds,
            "widest_points": self.widest,
            "joint_level": self.joint_level,
            "chosen": {name: dict(one.figures) for name, one in self.chosen.items()},
            "rows": {
                group: {party: self.row(group, party) for party in self.about["parties"]} for group in self.chosen
            },
        }


def _scores(pairs: list[tuple[Line, Line]]) -> tuple[Tensor, Tensor]:
    """(seeds, rows) of the party and of the honest retraining."""
    ours, theirs = (torch.tensor([pair[side]["scores"] for pair in pairs], dtype=torch.float64) for side in (0, 1))
    return ours, theirs
