"""Rows of a trained model that are replaced by themselves, moved a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from expunge.attack.aim import check_target
from expunge.attack.bounds import Bounds
from expunge.attack.descend import Adjoint, Aim, Matching, Retraining, check_steps, descend, guess
from expunge.attack.knowledge import Knowledge, Plan, Queries, White, Wish
from expunge.attack.select import budget_of, check_budget, wish_for
from expunge.attack.victim import Victim
from expunge.core.claim import Claim
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import prepare
from expunge.unlearn import GradientAscent, InfluenceUnlearning

Choice = Literal["reach", "effects", "class", "random"]
By = Literal["auto", "adjoint", "retraining", "matching"]


@dataclass(frozen=True, kw_only=True)
class ReplaceRequests:
    r"""Asks to have rows replaced by themselves moved a little: ``z -> z + delta``, ``|delta| <= eps`` in every entry.

    The labels stay. By signed steps down the adversary's loss L after the replacement, from several starts; the rows
    are rounded to how they are stored and measured once more, and the best are filed. With g the rows' gradients and u
    a vector of parameters, all take the gradient by the rows of :math:`\langle g(x+\delta), u\rangle`, so that nothing
    is differentiated through a solver:

    - ``adjoint``: of an unlearner that moves by :math:`B\sum(g(z)-g(z+\delta))`: :math:`u = -B\nabla L` where it ends.
    - ``retraining``: of a softmax regression that is trained anew: the same with B and L's gradient at the minimum on
      the moved rows, which is found anew for each u; exact by the implicit function theorem.
    - ``matching``: where the unlearner is not known, or a network is trained anew: 1 less the cosine between the moved
      rows' step and the one that brings L down (Geiping et al., 2021).
    - ``auto``: ``retraining`` for an unlearner that claims to equal retraining, on a softmax regression; ``adjoint``
      for influence; else ``matching``.

    Unlearners that never see the rows that come, as `GradientAscent` here, refuse replacements: file `SelectRequests`.

    With `Queries` nothing has a gradient: the first-order effect of a moved row is taken from the served model's
    answers as `Queries` says, and descended by two-sided differences along random signs.

    Source: rebuilt from the abstracts of Qian et al. (KDD 2023) and Zhao et al. (NeurIPS 2023); see the room. Not
    guaranteed: that a moved row passes for what it was; that a network trained anew follows its one linear step. Cost:
    a pass over the rows to choose them; then, for each start, `steps` passes over the chosen rows and `renew` solves.

    Attributes:
        count: rows to replace at most (one that rounding leaves as it was is not filed); or
        share: of the rows that the model stands on, rounded.
        eps: in the model's units: of pixels 1 is the whole range. Moved rows also stay within the data's own range, of
            all pixels together or of each column.
        by: see above.
        choose: ``reach`` (rows whose gradient by the inputs is largest in the l1 norm), ``effects`` (rows whose leaving
            helps the most), ``class`` (random rows of the wanted class, or of the true one if any other will do), or
            ``random``.
        steps: of each start.
        restarts: how many starts; the first is near the rows as they are.
        renew: how often u is computed anew, evenly over the steps; u costs a solve or a refit.
        samples: random directions a step, for `Queries`.
        knowledge, owned, stealth: see `SelectRequests`.
    """

    count: int | None = None
    share: float | None = None
    eps: float = 0.1
    by: By = "auto"
    choose: Choice = "reach"
    steps: int = 40
    restarts: int = 2
    renew: int = 10
    samples: int = 20
    knowledge: Knowledge = field(default_factory=White)
    owned: frozenset[str] | None = None
    stealth: float = 0.0

    def __post_init__(self) -> None:
        check_budget(self.count, self.share)
        check_steps(self.eps, self.steps, self.restarts)
        if self.by not in get_args(By) or self.choose not in get_args(Choice):
            raise Misuse(f"by is {', '.join(get_args(By))} and choose {', '.join(get_args(Choice))}; got others")
        if self.renew < 1 or self.samples < 1 or not self.stealth >= 0:
            raise Misuse("renew and samples must be >= 1 and stealth >= 0")
        if isinstance(self.knowledge, Queries) and self.choose == "reach":
            raise Misuse('queries give no gradient by the inputs to choose rows by; use choose="effects" or "random"')

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> None:
        """Brings nothing into training."""

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """One request, its ids in the records' order.

        Raises:
            Misuse: for a target that no model of these records can be asked about, a budget of no row or of all, or an
                `eps` too small to change any row as stored.
            Unsupported: for rows of whole numbers other than pixels, which cannot be moved a little.
        """
        check_target(target, records)
        bounds = Bounds.of(records)
        wish = wish_for(trained, records, target, self.stealth, rng)
        if isinstance(self.knowledge, Queries):
            return self._filed(records, *self._guessed(self.knowledge, trained, records, wish, bounds, rng), bounds)
        plan = self.knowledge.plan(trained, records, target, through)
        by = _by(through, plan) if self.by == "auto" else self.by
        if by == "retraining":
            if not plan.retrains:
                raise Misuse(
                    'by="retraining" needs a softmax regression and an unlearner of second order; use matching'
                )
            plan = plan.settled
        chosen = self._chosen(plan, wish, target, rng)
        ids: list[str] = []
        found: list[Tensor] = []
        start = 0
        for number, victim in enumerate(plan.victims):
            mine = chosen[(chosen >= start) & (chosen < start + len(victim.records))] - start
            start += len(victim.records)
            if len(mine):
                ids += [victim.records.ids[place] for place in mine.tolist()]
                found.append(self._moved(victim, by, wish, mine, bounds, child(rng, "shard", number)))
        return self._filed(records, ids, torch.cat(found), bounds)

    def _filed(self, records: Records, ids: Sequence[str], moved: Tensor, bounds: Bounds) -> tuple[Request, ...]:
        old = records.take(ids)
        rows = bounds.stored(moved, old.x, self.eps)
        changed = (rows != old.x).flatten(1).any(1)
        if not bool(changed.any()):
            raise Misuse(f"eps {self.eps} is too small to change any of the chosen rows as they are stored; raise it")
        places = dict(zip(ids, range(len(ids)), strict=True))
        kept = sorted((name for name in ids if bool(changed[places[name]])), key=lambda n: records.positions([n])[0])
        index = torch.tensor([places[name] for name in kept])
        return (Request.replace_rows(kept, rows[index], old.y[index], asked_by="requester"),)

    def _chosen(self, plan: Plan, wish: Wish, target: Target, rng: Generator) -> Tensor:
        allowed = torch.tensor(
            [place for place, name in enumerate(plan.ids) if self.owned is None or name in self.owned]
        )
        count = budget_of(self.count, self.share, rows=len(plan.ids), held=len(allowed))
        if self.choose in ("class", "random"):
            return _drawn(allowed, plan.labels, target, self.choose, count, rng)
        merit = _reach(plan, wish) if self.choose == "reach" else -plan.effects(wish)
        return allowed[torch.sort(merit[allowed], descending=True, stable=True).indices[:count]]

    def _moved(self, victim: Victim, by: By, wish: Wish, mine: Tensor, bounds: Bounds, rng: Generator) -> Tensor:
        x, y = (some[mine] for some in victim.rows)
        aim = _aim(by, victim, wish, mine, x, y)
        old = victim.records.select(mine).x
        return descend(
            aim,
            x,
            y,
            limits=bounds.around(x, self.eps),
            settle=lambda rows: prepare(bounds.stored(rows, old, self.eps), victim.dtype),
            eps=self.eps,
            steps=self.steps,
            restarts=self.restarts,
            renew=self.renew,
            rng=rng,
        )

    def _guessed(
        self, knows: Queries, trained: Trained, records: Records, wish: Wish, bounds: Bounds, rng: Generator
    ) -> tuple[list[str], Tensor]:
        held = [place for place, name in enumerate(records.ids) if name in trained.ids]
        ids = [records.ids[place] for place in held]
        allowed = torch.tensor([place for place, name in enumerate(ids) if self.owned is None or name in self.owned])
        count = budget_of(self.count, self.share, rows=len(ids), held=len(allowed))
        if self.choose == "effects":
            effects = knows.effects(trained, records, wish)
            chosen = allowed[torch.sort(effects[allowed], stable=True).indices[:count]]
        else:
            labels = records.y[torch.tensor(held)]
            chosen = _drawn(allowed, labels, wish.target, self.choose, count, rng)
        names = [ids[place] for place in chosen.tolist()]
        rows = records.take(names)
        x = prepare(rows.x, next(trained.module.parameters()).dtype)
        effect = knows.effect_of(trained, wish)
        best = guess(
            lambda moved: -effect(moved, rows.y),
            x,
            limits=bounds.around(x, self.eps),
            eps=self.eps,
            steps=self.steps,
            samples=self.samples,
            rng=child(rng, "guess"),
        )
        return names, best


def _by(through: Method, plan: Plan) -> By:
    if through.claim is not Claim.NONE and plan.retrains:
        return "retraining"
    return "adjoint" if isinstance(through, GradientAscent | InfluenceUnlearning) else "matching"


def _aim(by: By, victim: Victim, wish: Wish, mine: Tensor, x: Tensor, y: Tensor) -> Aim:
    if by == "retraining":
        return Retraining(victim=victim, wish=wish, places=mine, y=y)
    leaving = victim.objective.gradient(x, y)
    if by == "adjoint":
        return Adjoint(victim=victim, wish=wish, y=y, leaving=leaving)
    return Matching(victim=victim, wish=wish, y=y, leaving=leaving)


def _reach(plan: Plan, wish: Wish) -> Tensor:
    """By how much the loss changes per unit of eps, to first order, when a row alone is moved."""
    found = []
    for victim in plan.victims:
        u = victim.share * victim.answer(wish.gradient(victim))
        found += [victim.input_gradient(x, y, u).flatten(1).abs().sum(1) for x, y in victim.batches()]
    return torch.cat(found)


def _drawn(allowed: Tensor, labels: Tensor, target: Target, choose: Choice, count: int, rng: Generator) -> Tensor:
    if choose == "class":
        aimed = target.y if target.wanted is None else target.wanted
        allowed = allowed[torch.isin(labels[allowed], aimed)]
        if len(allowed) < count:
            raise Misuse(f"a budget of {count:,} rows, but there are {len(allowed):,} of the class; lower it")
    return allowed[torch.randperm(len(allowed), generator=child(rng, "rows"))[:count]]
