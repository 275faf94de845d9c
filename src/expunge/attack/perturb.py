"""Rows that are moved a little and brought into training, to be deleted later."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Generator

from expunge.attack.aim import check_target
from expunge.attack.bounds import Bounds
from expunge.attack.descend import Matching, check_steps, descend
from expunge.attack.knowledge import Surrogate, Wish
from expunge.attack.reaction import Reaction
from expunge.attack.select import check_budget
from expunge.attack.victim import Victim
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Method, Target
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import prepare


@dataclass(frozen=True, kw_only=True)
class PerturbRequests:
    """Brings rows into training, moved a little and rightly labelled, and asks for their deletion later.

    The rows are copies of rows of the target's class, its own ones if it has some, moved so that the step an unlearner
    of first order takes when they leave points down the adversary's loss: by gradient matching on a model that the
    attacker trained without them, as the true one does not exist yet.

    Against exact retraining it does nothing, whatever the rows: the model retrained without them is the one that would
    have been had they never come, and a test holds the two to the same bytes. What it can do, it does to an unlearner
    that is not retraining. On 480 digits, 30 rows, eps .4 and six targets, influence unlearning (damping .01) took back
    more than the rows had brought: three targets were lost, and none with copies that were not moved. Gradient ascent
    was harmed less by moved rows than by copies: the model fits the moved ones well, so that they have small gradients.

    Source: as surveys tell of Qian et al. (KDD 2023); see the room. Cost: a training on `share` of the records,
    remembered for further targets, and `restarts` times `steps` passes over the chosen rows.

    Attributes:
        recipe: what the attacker believes that the model will be.
        count: rows to bring.
        eps, steps, restarts: see `ReplaceRequests`.
        supply: rows of its own; None: copies of the records'.
        owner: whose name they bear.
        knowledge: how it trains; its `recipe` is taken before this one's.
    """

    recipe: Recipe
    count: int
    eps: float = 0.1
    steps: int = 40
    restarts: int = 2
    supply: Records | None = None
    owner: str = "contributor"
    knowledge: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        check_budget(self.count, None)
        check_steps(self.eps, self.steps, self.restarts)

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> Records:
        """The moved rows, all of `owner`.

        Raises:
            Misuse: if the records have rows of that owner, or there are fewer rows of the target's class.
            Unsupported: for rows of whole numbers other than pixels.
        """
        check_target(target, records)
        if self.owner in records.owners:
            raise Misuse(f'owner "{self.owner}" holds records already; give the attacker a name of its own')
        bounds = Bounds.of(records)
        model = replace(self.knowledge.model(self.recipe, records), ids=frozenset(records.ids))
        wish = Wish(target=target)
        victim = Victim.view(model, records, Reaction(order="first"))
        supply = records if self.supply is None else self.supply
        alike = supply.select(torch.isin(supply.y, target.y).nonzero().flatten())
        if len(alike) < self.count:
            raise Misuse(f"there are {len(alike):,} rows of the target's class to bring, fewer than {self.count:,}")
        x = prepare(alike.x, victim.dtype)
        slopes = victim.objective.scores(x, alike.y, wish.gradient(victim))
        chosen = torch.sort(slopes, stable=True).indices[: self.count]
        x, old = x[chosen], alike.select(chosen)
        moved = descend(
            Matching(victim=victim, wish=wish, y=old.y, towards=-1.0),
            x,
            old.y,
            limits=bounds.around(x, self.eps),
            settle=lambda rows: prepare(bounds.stored(rows, old.x, self.eps), victim.dtype),
            eps=self.eps,
            steps=self.steps,
            restarts=self.restarts,
            renew=self.steps,
            rng=child(rng, "contribute"),
        )
        ids = [f"{self.owner}-{number:04d}" for number in range(self.count)]
        rows = bounds.stored(moved, old.x, self.eps)
        return Records(rows, old.y, ids, [self.owner] * self.count, classes=records.classes)

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """One request, for all rows that it brought. Misuse if the model stands on none of them."""
        check_target(target, records)
        mine = [
            name for name, owner in zip(records.ids, records.owners, strict=True)
            if owner == self.owner and name in trained.ids
        ]  # fmt: skip
        if not mine:
            raise Misuse(f'the model stands on no row of "{self.owner}"; train it on what contribute gives, too')
        return (Request.remove(mine, asked_by="requester"),)
