"""Requests spread over a horizon, planned ahead while other people's requests come in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from expunge.attack.bounds import Box, movable
from expunge.attack.course import Course, Plan, assigned
from expunge.attack.remembered import victims
from expunge.attack.victim import Victim
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import prepare


@dataclass(frozen=True, kw_only=True)
class SequentialRequests:
    """One request a step over a horizon, each of a few rows, planned by optimal control.

    The class of attacks that a NeurIPS 2023 paper's abstract describes ("a stochastic optimal control problem"); its
    text was not at hand, so the dynamics, the adjoint and the planning here are a reconstruction, and no figure of
    that paper is claimed. Removals are planned by conditional gradients over relaxed selections, from whose vertices
    the best is taken; replacements by projected signed gradients. Benign requests are drawn `scenarios` times and the
    plan is for their mean (the same draws throughout). With `replan`, only the first request of a plan is filed, the
    state is moved on as predicted, and the rest is planned anew. A horizon of one, one round and no benign rows is the
    one-shot influence attack. Against an unlearner that retrains, order means nothing and only the union counts.

    Cost: with `replan` about ``horizon^2 / 2 * scenarios * rounds`` steps and as many Hessian products of the rows
    that move, a solve each; without, a factor ``horizon / 2`` less.

    Attributes:
        horizon: requests filed.
        per_step: rows of each; exactly so many are asked for.
        kind: ``remove`` or ``replace``.
        eps: for ``replace``: the most that any entry of a row changes, as the model reads it (pixels in 0 to 1).
        scenarios: draws of the benign requests.
        benign: rows that others have removed at each step.
        replan: plan anew after each request.
        rounds: of planning.
        restarts: of ``replace``, the first from the rows themselves.
        candidates: rows that are considered, those with the strongest effect now; None: 20 for each that is asked for.
        along: weight of the adversary's loss after each request but the last, against 1 after the last.
    """

    horizon: int = 5
    per_step: int = 5
    kind: Literal["remove", "replace"] = "remove"
    eps: float = 0.1
    scenarios: int = 4
    benign: int = 5
    replan: bool = True
    rounds: int = 5
    restarts: int = 2
    candidates: int | None = None
    along: float = 0.0

    def __post_init__(self) -> None:
        for name in ("horizon", "per_step", "scenarios", "rounds", "restarts"):
            if getattr(self, name) < 1:
                raise Misuse(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.benign < 0 or self.along < 0:
            raise Misuse(f"benign and along must be >= 0, got {self.benign} and {self.along}")
        if self.kind not in ("remove", "replace"):
            raise Misuse(f'kind must be remove or replace, got "{self.kind}"')
        if self.kind == "replace" and not self.eps > 0:
            raise Misuse(f"eps must be > 0, got {self.eps}")
        if self.candidates is not None and self.candidates < self.horizon * self.per_step:
            raise Misuse(
                f"candidates must be at least the {self.horizon * self.per_step} rows to ask for, got {self.candidates}"
            )

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> None:
        """Nothing: this attacker brings no rows."""

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """All requests, in order, from the predicted states.

        Raises:
            Misuse: for a target that the model cannot be asked about, or too few rows for horizon and benign requests.
            Unsupported: for replacing tokens.
        """
        front = _front(self, trained, records, target, through, rng)
        filed: list[Request] = []
        plan: Plan | None = None
        for step in range(self.horizon):
            if plan is None or self.replan:
                plan = front.planned(self, target, child(rng, "plan", step))
            now = plan.cut(slice(0, 1))
            filed.append(front.request(now))
            front, plan = front.after(now), plan.cut(slice(1, None))
        return tuple(filed)

    def next_request(
        self, trained: Trained, records: Records, target: Target, *, through: Method, left: int, rng: Generator
    ) -> Request:
        """The next request for whom the model can be watched: planned from its real state now, `left` steps ahead.

        Args:
            trained: the model as it is now; rows that are gone from it are not asked for again.
            records: the data set that holds its rows.
            target: as in `requests`.
            through: the unlearner.
            left: requests that are still to be filed, this one included.
            rng: names the coins.
        """
        rest = replace(self, horizon=left)
        front = _front(rest, trained, records, target, through, rng)
        return front.request(front.planned(rest, target, child(rng, "plan", 0)).cut(slice(0, 1)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Front:
    """Where all models of one victim stand, and the rows that may be asked for from here on."""

    pool: Records
    box: Box | None
    free: Tensor
    courses: tuple[Course, ...]
    mine: tuple[Tensor, ...]

    def after(self, now: Plan) -> _Front:
        courses = tuple(course.advanced(now.only(rows)) for course, rows in zip(self.courses, self.mine, strict=True))
        return replace(self, courses=courses, free=self.free & (now.weights[0] < 0.5))

    def value(self, target: Target, plan: Plan) -> float:
        pairs = zip(self.courses, self.mine, strict=True)
        return sum(course.victim.share * course.value(target, plan.only(rows)) for course, rows in pairs)

    def weight_gradient(self, target: Target, plan: Plan) -> Tensor:
        total = torch.zeros_like(plan.weights)
        for course, rows in zip(self.courses, self.mine, strict=True):
            total[:, rows] = course.victim.share * course.weight_gradient(target, plan.only(rows)).to(total)
        return total

    def planned(self, attack: SequentialRequests, target: Target, rng: Generator) -> Plan:
        left = len(self.courses[0].benign[0])
        if self.box is None:
            return self._removals(attack, target, left)
        return self._replacements(attack, target, self.box, left, rng)

    def _removals(self, attack: SequentialRequests, target: Target, left: int) -> Plan:
        relaxed = torch.zeros(left, len(self.pool), dtype=torch.float64)
        tried: list[tuple[float, Tensor]] = []
        for round_ in range(attack.rounds):
            vertex = assigned(self.weight_gradient(target, Plan(weights=relaxed)), self.free, attack.per_step)
            tried.append((self.value(target, Plan(weights=vertex)), vertex))
            relaxed = relaxed + 2 / (round_ + 2) * (vertex - relaxed)
        rounded = assigned(-relaxed, self.free, attack.per_step)
        tried.append((self.value(target, Plan(weights=rounded)), rounded))
        return Plan(weights=min(tried, key=lambda one: one[0])[1])

    def _replacements(self, attack: SequentialRequests, target: Target, box: Box, left: int, rng: Generator) -> Plan:
        weights = assigned(-self._powers(target, left), self.free, attack.per_step)
        stay, eps = box.start.expand(left, *box.start.shape), box.eps
        tried: list[tuple[float, Plan]] = []
        for restart in range(attack.restarts):
            coins = child(rng, "restart", restart)
            noise = 2 * torch.rand(stay.shape, generator=coins, dtype=stay.dtype) - 1
            moved = box.clipped(stay + (eps * noise if restart else 0.0))
            for _ in range(attack.rounds):
                gradient = torch.zeros_like(moved)
                for course, rows in zip(self.courses, self.mine, strict=True):
                    part = course.moved_gradient(target, Plan(weights=weights, moved=moved).only(rows))
                    gradient[:, rows] = part.to(gradient)
                moved = box.clipped(moved - 2.5 * eps / attack.rounds * gradient.sign())
            plan = Plan(weights=weights, moved=box.rounded(moved))
            tried.append((self.value(target, plan), plan))
        return min(tried, key=lambda one: one[0])[1]

    def _powers(self, target: Target, left: int) -> Tensor:
        """How much a small change of each row can do at each step: the 1-norm of the gradient by its entries."""
        found = torch.zeros(left, len(self.pool), dtype=torch.float64)
        for course, rows in zip(self.courses, self.mine, strict=True):
            empty = Plan(weights=torch.zeros(left, len(rows), dtype=torch.float64))
            for step, (at, answer) in enumerate(zip(*course.adjoints(target, 0, empty), strict=True)):
                for some in torch.arange(len(rows)).split(512):
                    ones = torch.ones(len(some), dtype=course.victim.dtype)
                    gradient = course.input_gradient(course.x[some], some, at, answer, ones)
                    found[step, rows[some]] = course.victim.share * gradient.flatten(1).abs().sum(1).double()
        return found

    def request(self, now: Plan) -> Request:
        rows = (now.weights[0] > 0.5).nonzero().flatten()
        ids = [self.pool.ids[i] for i in rows.tolist()]
        if self.box is None or now.moved is None:
            return Request.remove(ids)
        return Request.replace_rows(ids, self.box.stored(now.moved[0][rows]), self.pool.y[rows])


def _front(
    attack: SequentialRequests, trained: Trained, records: Records, target: Target, through: Method, rng: Generator
) -> _Front:
    models = victims(trained, records, target, through)
    here = records.where(lambda record_id, _: record_id in trained.ids)
    wanted = attack.candidates or 20 * attack.horizon * attack.per_step
    need = attack.horizon * (attack.per_step + attack.benign)
    if len(here) <= need:
        raise Misuse(f"{attack.horizon} steps move {need} rows of {len(here)}; lower horizon, per_step or benign")
    if attack.kind == "replace" and not movable(here.x):
        raise Unsupported("tokens cannot be changed by a little; use kind='remove'")
    strength = _strengths(attack, models, here, target)
    count = max(attack.horizon * attack.per_step, min(wanted, len(here) - attack.horizon * attack.benign))
    order = strength.argsort(stable=True)
    pool, others = here.select(order[:count].sort().values), here.select(order[count:].sort().values)
    scenarios = [_benign(others, attack, child(rng, "benign", number)) for number in range(attack.scenarios)]
    courses, mine = [], []
    for victim in models:
        rows = torch.tensor([i for i, name in enumerate(pool.ids) if name in victim.records], dtype=torch.int64)
        mine.append(rows)
        courses.append(_course(attack, victim, pool.select(rows), scenarios))
    return _Front(
        pool=pool,
        box=Box.of(pool, here, attack.eps, models[0].dtype) if attack.kind == "replace" else None,
        free=torch.ones(len(pool), dtype=torch.bool),
        courses=tuple(courses),
        mine=tuple(mine),
    )


def _course(
    attack: SequentialRequests, victim: Victim, rows: Records, scenarios: Sequence[Sequence[Records]]
) -> Course:
    benign = []
    for scenario in scenarios:
        own = [step.where(lambda name, _: name in victim.records) for step in scenario]
        benign.append([(prepare(step.x, victim.dtype), step.y) for step in own])
    start = victim.objective.vector()
    return Course(
        victim=victim,
        x=prepare(rows.x, victim.dtype),
        y=rows.y,
        benign=benign,
        starts=[start] * len(scenarios),
        along=attack.along,
    )


def _strengths(attack: SequentialRequests, models: Sequence[Victim], here: Records, target: Target) -> Tensor:
    """Of each row, the smaller the stronger: its effect if it leaves, or minus what moving it can do."""
    found = torch.zeros(len(here), dtype=torch.float64)
    for victim in models:
        places = torch.tensor(here.positions(victim.records.ids), dtype=torch.int64)
        if attack.kind == "remove":
            found[places] = victim.effects(target).double()
            continue
        answer, parts = victim.answer(victim.loss_gradient(target)), []
        for x, y in victim.batches():
            parts.append(-victim.share * victim.input_gradient(x, y, answer).flatten(1).abs().sum(1).double())
        found[places] = torch.cat(parts)
    return found


def _benign(others: Records, attack: SequentialRequests, rng: Generator) -> list[Records]:
    drawn = torch.randperm(len(others), generator=rng)
    return [others.select(drawn[t * attack.benign : (t + 1) * attack.benign]) for t in range(attack.horizon)]
