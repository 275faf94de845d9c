"""Which rows are forgotten where it is asked what a cheat retains: random ones, and atypical ones with partial twins.

A row is *atypical* if models that never saw it are least sure of its label: they are trained on folds without it, with
coins of their own, so that no model that is judged later has a part in the choice. Its *partial twin* is its nearest
row of the same label. The row is forgotten only if the twin is within reach, and the twin then stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor

from expunge.attack.selectors_nearest import nearest_table
from expunge.audit.efficacy import confidence
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.learn.loop import prepare
from expunge.learn.predict import outputs
from expunge.learn.training import train
from expunge.screen.nearest import flat, spread

_SAMPLE = 2_000


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows are chosen.

    Attributes:
        forgotten: rows of a group at most.
        hard: share of all rows that is called atypical.
        reach: a twin is within reach if it is as near as this share of random rows have their nearest of the class.
        folds: of the models that say which rows are atypical.

    Raises:
        Misuse: for values that leave nothing to choose.
    """

    forgotten: int = 2_000
    hard: float = 0.1
    reach: float = 0.75
    folds: int = 3

    def __post_init__(self) -> None:
        if self.forgotten < 2 or self.folds < 2:
            raise Misuse(f"forgotten and folds must be >= 2, got {self.forgotten} and {self.folds}")
        if not (0 < self.hard < 1 and 0 < self.reach <= 1):
            raise Misuse(f"need 0 < hard < 1 and 0 < reach <= 1, got {self.hard} and {self.reach}")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows of one group.

    Attributes:
        positions: in the records, of the rows to forget.
        figures: what they are like. Distances are in root mean squared distances of two random rows.
    """

    positions: tuple[int, ...]
    figures: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Chosen:
        """What `to_json` wrote; other keys are left alone."""
        return cls(positions=tuple(data["positions"]), figures=dict(data["figures"]))


Pick = Callable[[Records, Recipe, Rules, Generator], Chosen]
"""Chooses the rows of a group from the records, what is to be trained, the rules and coins; and from nothing else."""


def random_rows(records: Records, recipe: Recipe, rules: Rules, rng: Generator) -> Chosen:
    """Rows drawn at random. Cost: the table of their neighbours."""
    drawn = torch.randperm(len(records), generator=child(rng, "random"))[: rules.forgotten]
    return _described(records, drawn, rng, {})


def atypical_rows(records: Records, recipe: Recipe, rules: Rules, rng: Generator) -> Chosen:
    """Atypical rows whose partial twins stay.

    Rows are taken in an order drawn by the coins; one is passed over if its twin is forgotten already, or if it is the
    twin of one that is.

    Raises:
        Misuse: if fewer than two rows are left.

    Cost: `folds` trainings on all rows but a fold, and the table of the atypical rows' neighbours.
    """
    scores = unseen_scores(records, recipe, rules.folds, rng)
    hard = scores.argsort()[: max(1, int(rules.hard * len(records)))]
    hard = hard[torch.randperm(len(hard), generator=child(rng, "atypical"))]
    every = torch.arange(len(records))
    usual = every[torch.randperm(len(records), generator=child(rng, "usual"))[:_SAMPLE]]
    reach = float(_apart(records, usual, nearest_table(records, usual, every, "l2").long()).quantile(rules.reach))
    twins = nearest_table(records, hard, every, "l2").long()
    near = (_apart(records, hard, twins) <= reach) & (records.y.cpu()[hard] == records.y.cpu()[twins])
    forgotten, stays = set[int](), set[int]()
    for row, twin in zip(hard[near].tolist(), twins[near].tolist(), strict=True):
        if len(forgotten) < rules.forgotten and row not in stays and twin not in forgotten:
            forgotten.add(row)
            stays.add(twin)
    if len(forgotten) < 2:
        raise Misuse(f"of {len(hard):,} atypical rows {len(forgotten)} have a twin within reach; raise hard or reach")
    drawn = torch.tensor(sorted(forgotten))
    kept = set(hard.tolist())
    figures = {
        "reach": reach / spread(flat(records.select(usual))),
        "atypical": float(len(hard)),
        "within reach": float(near.sum()),
        "highest score": float(scores[hard].max()),
        "wrong when unseen": float((scores[drawn] < 0).double().mean()),
        "twins that are atypical": sum(twin in kept for twin in stays) / len(stays),
    }
    return _described(records, drawn, rng, figures)


GROUPS: Mapping[str, Pick] = MappingProxyType({"random": random_rows, "atypical": atypical_rows})


def unseen_scores(records: Records, recipe: Recipe, folds: int, rng: Generator) -> Tensor:
    """(n,) each row's log odds of its label under a model that was trained on all folds but the row's own."""
    fold = torch.randint(folds, (len(records),), generator=child(rng, "folds"))
    scores = torch.zeros(len(records), dtype=torch.float64)
    for number in range(folds):
        seed = child(rng, "fold", number).initial_seed() >> 1
        inside = (fold == number).nonzero().flatten()
        model = train(replace(recipe, seed=seed), records.select((fold != number).nonzero().flatten()))
        held = records.select(inside)
        scores[inside] = confidence(outputs(model.module, held), held.y).cpu()
    return scores


def _described(records: Records, drawn: Tensor, rng: Generator, figures: Mapping[str, float]) -> Chosen:
    """With how near the nearest row of the class that stays is, beside random rows of the class."""
    stays = torch.ones(len(records), dtype=torch.bool)
    stays[drawn] = False
    pool = stays.nonzero().flatten()
    sample = pool[torch.randperm(len(pool), generator=child(rng, "sample"))[:_SAMPLE]]
    unit = spread(flat(records.select(sample)))
    near = nearest_table(records, drawn, pool, "l2").long()
    other, labels = torch.empty_like(drawn), records.y.cpu()
    for label in labels[drawn].unique().tolist():
        mine, same = labels[drawn] == label, pool[labels[pool] == label]
        same = same if len(same) else pool
        other[mine] = same[torch.randint(len(same), (int(mine.sum()),), generator=child(rng, "pairs", label))]
    about = {
        "rows": float(len(drawn)),
        "nearest that stays, median": float(_apart(records, drawn, near).median()) / unit,
        "random row of the class, median": float(_apart(records, drawn, other).median()) / unit,
    }
    return Chosen(positions=tuple(drawn.tolist()), figures={**about, **figures})


def _apart(records: Records, ones: Tensor, others: Tensor) -> Tensor:
    """L2 distances of rows, pair by pair; a row may stand in several."""
    sides = [next(prepare(x, torch.float32).flatten(1) for x, _ in records.batches([rows])) for rows in (ones, others)]
    return (sides[0] - sides[1]).square().sum(1).sqrt().cpu()
