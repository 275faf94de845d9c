"""Asking for the deletion of real rows, chosen so that the model without them errs on a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from expunge.attack.aim import check_target
from expunge.attack.knowledge import Knowledge, Plan, Queries, White, Wish
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import prepare

How = Literal["one-shot", "greedy", "relaxed"]
_KEPT = 512
_STEPS = (1.0, 0.3)


@dataclass(frozen=True, kw_only=True)
class SelectRequests:
    r"""Asks for the deletion of the rows whose absence brings the adversary's loss down the most.

    ``one-shot``: the rows with the most negative effect :math:`\langle\nabla\ell_i, B\nabla L\rangle`. ``greedy``: some
    at a time, the model refitted without those picked before the effects are computed again. ``relaxed``: deletions
    :math:`m\in[0,1]^n` with :math:`\sum m = k` by projected gradient descent, the gradient by the implicit function
    theorem at the minimum :math:`\theta(1-m)`, which is exact for a softmax regression of up to 512 parameters and no
    more rows than the curvature is a mean over; above, the curvature is that with all rows, or of a sample of them.
    Rounded to the k largest, mended by swaps; and the best of these sets, the greedy and the one-shot one by the loss
    that a refit without them gives.

    A refit is exact retraining to convergence for a softmax regression (with the weight decay's share as it was when
    all rows were there), and one step for a network, where nothing says that retraining does the same. Real rows of
    the attacker's own, and true labels: a request of this kind is a valid one. A target that is reached already is
    attacked all the same, to reach it by more.

    Source: rebuilt from the abstracts of Qian et al. (KDD 2023) and Zhao et al. (NeurIPS 2023); see the room.
    Not guaranteed: that any k rows suffice. Cost: one solve and one pass over the rows a target for ``one-shot``, as
    much plus a refit for each of the `rounds`, and for each of about 4 `steps`.

    Attributes:
        count: rows to delete; or
        share: of the rows that the model stands on, rounded.
        how: see above.
        rounds: of ``greedy``, at most one a row.
        steps: of each descent of ``relaxed``.
        knowledge: what the attacker knows; `Queries` gives only ``one-shot``.
        owned: ids that it may ask about; None: all.
        stealth: weight beta of the mean loss of 512 rows drawn at random, which should not grow.
    """

    count: int | None = None
    share: float | None = None
    how: How = "greedy"
    rounds: int = 10
    steps: int = 30
    knowledge: Knowledge = field(default_factory=White)
    owned: frozenset[str] | None = None
    stealth: float = 0.0

    def __post_init__(self) -> None:
        check_budget(self.count, self.share)
        if self.how not in get_args(How):
            raise Misuse(f'how must be one of {", ".join(get_args(How))}, got "{self.how}"')
        if self.rounds < 1 or self.steps < 1:
            raise Misuse(f"rounds and steps must be >= 1, got {self.rounds} and {self.steps}")
        if not self.stealth >= 0:
            raise Misuse(f"stealth must be >= 0, got {self.stealth}")
        if self.how != "one-shot" and not self.knowledge.refits:
            raise Misuse(f'{self.how} refits a model, which queries do not give; use how="one-shot" or a surrogate')

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> None:
        """Brings nothing into training."""

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """One request, its ids in the records' order.

        Raises:
            Misuse: for a target that no model of these records can be asked about, or a budget of no row, or of all.
        """
        check_target(target, records)
        wish = wish_for(trained, records, target, self.stealth, rng)
        if isinstance(self.knowledge, Queries):
            ids = tuple(name for name in records.ids if name in trained.ids)
            allowed, count = self._bounds(ids)
            picked = _lowest(self.knowledge.effects(trained, records, wish), allowed, count)
        else:
            plan = self.knowledge.plan(trained, records, target, through)
            ids = plan.ids
            allowed, count = self._bounds(ids)
            picked = self._picked(plan, wish, allowed, count)
        chosen = {ids[place] for place in picked.tolist()}
        return (Request.remove([name for name in records.ids if name in chosen], asked_by="requester"),)

    def _bounds(self, ids: Sequence[str]) -> tuple[Tensor, int]:
        allowed = torch.tensor([place for place, name in enumerate(ids) if self.owned is None or name in self.owned])
        return allowed, budget_of(self.count, self.share, rows=len(ids), held=len(allowed))

    def _picked(self, plan: Plan, wish: Wish, allowed: Tensor, count: int) -> Tensor:
        if self.how == "one-shot":
            return _lowest(plan.effects(wish), allowed, count)
        start = plan.settled
        greedy = _greedy(start, wish, allowed, count, self.rounds)
        if self.how == "greedy":
            return greedy
        sets = [greedy, *(_lowest(one.effects(wish), allowed, count) for one in (start, plan))]
        even = torch.full((len(allowed),), count / len(allowed), dtype=torch.float64)
        half = even / 2 + torch.isin(allowed, greedy).double() / 2
        for m in (even, half):
            for size in _STEPS:
                sets.append(_relaxed(start, wish, allowed, m, size, self.steps))
        return _mended(start, wish, allowed, *_best(start, wish, sets), self.rounds)


def check_budget(count: int | None, share: float | None) -> None:
    """Misuse unless exactly one of the two is given, and is above nothing."""
    if (count is None) == (share is None):
        raise Misuse(f"give a budget as count or as share, one of them, got count={count}, share={share}")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise Misuse(f"a budget of {count} rows asks for nothing; give a whole number >= 1")
    if share is not None and not 0 < share < 1:
        raise Misuse(f"a budget's share of the rows must lie between 0 and 1, got {share}")


def budget_of(count: int | None, share: float | None, *, rows: int, held: int) -> int:
    """How many rows, of `rows` that the model stands on and `held` that the attacker may ask about."""
    found = round((share or 0) * rows) if count is None else count
    if found < 1:
        raise Misuse(f"a share of {share} of {rows} rows is none; give a larger one, or a count")
    if found > held:
        raise Misuse(f"a budget of {found:,} rows, but the attacker may ask about {held:,}; lower it")
    if found >= rows:
        raise Misuse(f"a budget of {found:,} rows is all that the model stands on; leave some to train on")
    return found


def wish_for(trained: Trained, records: Records, target: Target, stealth: float, rng: Generator) -> Wish:
    """The adversary's loss, with the mean loss of rows drawn at random if `stealth` is above 0."""
    if not stealth:
        return Wish(target=target)
    held = torch.tensor([place for place, name in enumerate(records.ids) if name in trained.ids])
    drawn = held[torch.randperm(len(held), generator=child(rng, "stealth"))[:_KEPT]]
    some = records.select(drawn)
    dtype = next(trained.module.parameters()).dtype
    return Wish(target=target, beta=stealth, kept=(prepare(some.x, dtype), some.y))


def capped_simplex(v: Float[Tensor, " n"], total: float) -> Float[Tensor, " n"]:
    """The nearest point with entries in [0, 1] that sum to `total`: ``clip(v - mu, 0, 1)``, mu by bisection.

    Raises:
        Misuse: if `total` is below 0 or above the number of entries.
    """
    if not 0 <= total <= len(v):
        raise Misuse(f"{len(v)} numbers in [0, 1] cannot sum to {total}")
    low, high = float(v.min()) - 1, float(v.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((v - middle).clamp(0, 1).sum()) > total else (low, middle)
    return (v - (low + high) / 2).clamp(0, 1)


def _lowest(effects: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Places of the allowed rows of lowest effect; of ties the first."""
    return allowed[torch.sort(effects[allowed], stable=True).indices[:count]]


def _without(plan: Plan, picked: Tensor) -> Tensor:
    weights = torch.ones(len(plan.ids), dtype=torch.float64)
    weights[picked] = 0
    return weights


def _greedy(plan: Plan, wish: Wish, allowed: Tensor, count: int, rounds: int) -> Tensor:
    picked, state = allowed[:0], plan
    rounds = min(rounds, count)
    for turn in range(rounds):
        some = (count * (turn + 1)) // rounds - len(picked)
        free = allowed[~torch.isin(allowed, picked)]
        picked = torch.cat([picked, _lowest(state.effects(wish), free, some)])
        if len(picked) < count:
            state = state.refit(_without(plan, picked))
    return picked


def _relaxed(plan: Plan, wish: Wish, allowed: Tensor, m: Tensor, size: float, steps: int) -> Tensor:
    """The largest entries after descending from the deletions `m`; `size`: of the largest change in the first step."""
    count, state = round(float(m.sum())), plan
    for step in range(steps):
        weights = torch.ones(len(plan.ids), dtype=torch.float64)
        weights[allowed] = 1 - m
        state = (state if plan.retrains else plan).refit(weights)
        slope = state.effects(wish)[allowed].double()
        pace = size * (1 - step / steps) / float(slope.abs().max().clamp_min(1e-300))
        before, m = m, capped_simplex(m - pace * slope, count)
        if float((m - before).abs().max()) < 1e-4:
            break
    return allowed[torch.sort(m, descending=True, stable=True).indices[:count]]


def _best(plan: Plan, wish: Wish, sets: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The set of lowest loss after a refit without it, and that loss."""
    different = {tuple(sorted(one.tolist())): one for one in sets}
    losses = [(plan.refit(_without(plan, one)).loss(wish), one) for one in different.values()]
    loss, best = min(losses, key=lambda pair: pair[0])
    return best, loss


def _mended(plan: Plan, wish: Wish, allowed: Tensor, picked: Tensor, loss: float, rounds: int) -> Tensor:
    """The set with its least helpful row put back for the most helpful one outside, while that lowers the loss."""
    for _ in range(rounds):
        effects = plan.refit(_without(plan, picked)).effects(wish)
        outside = allowed[~torch.isin(allowed, picked)]
        if not len(outside):
            break
        worst, best = picked[effects[picked].argmax()], outside[effects[outside].argmin()]
        if float(effects[worst]) <= float(effects[best]):
            break
        other = torch.where(picked == worst, best, picked)
        after = plan.refit(_without(plan, other)).loss(wish)
        if after >= loss:
            break
        picked, loss = other, after
    return picked
