"""Requests that are dear to carry out: valid removals, chosen so that unlearning costs as much as it can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from expunge.attack.solves import Solves
from expunge.attack.victim import Victim
from expunge.calculus.factored import maker
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Method, Target
from expunge.core.recipe import Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.shards import slice_epochs
from expunge.screen.scene import inner

_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class SlowDown:
    r"""Asks for the removal of the rows that are dearest to remove; what the model answers is of no interest to it.

    Of a sharded model: one owner for each shard, in the earliest slice, so that all shards are trained again from the
    start; where each row is its own request, the largest shard's first slice, again and again. Without the salt it
    cannot tell where an owner lies, and picks owners at random: k of them touch ``s (1 - (1 - 1/s)^k)`` of s shards.
    Of any other model: the rows whose removal moves the parameters the furthest, :math:`\|H^{-1} g_i\|`, in one request
    a set of which the sum is long (greedily); those use up a certified method's budget, or need more steps.

    Source: sharded: Bourtoule et al. (2021) say that such requests exist; influence norm: Marchant, Rubinstein and
    Alfeld (2022), who craft rows by it, where here rows are chosen. Cost: of a sharded model, a hash of each owner; of
    others, a solve for each of `candidates` rows (`Solves`), and numbers for each candidate and parameter up to `kept`;
    past that the sums are found by two more solves for each row of the budget.

    Not guaranteed: that it slows down anything: retraining costs the same whatever is removed.

    Attributes:
        budget: rows to ask for.
        together: all in one request; else one request a row.
        knows_salt: whether it can tell the shard of an owner.
        owned: the owners that it may speak for; None: all.
        candidates: rows that are solved for, those with the longest gradients; at least the budget.
        kept: numbers that may be kept, at 4 or 8 bytes each; in which way sums are found changes them by rounding, and
            above 8192 parameters by the solver's tolerance.
    """

    budget: int = 10
    together: bool = True
    knows_salt: bool = True
    owned: frozenset[str] | None = None
    candidates: int = 500
    kept: int = field(default=1 << 26, repr=False)  # a matter of memory: studies kept before it go on

    def __post_init__(self) -> None:
        for name in ("budget", "candidates", "kept"):
            if getattr(self, name) < 1:
                raise Misuse(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.owned is not None and not self.owned:
            raise Misuse("an attacker that owns nothing can ask for nothing; name owners, or None for all")

    def contribute(self, records: Records, target: Target | None, *, rng: Generator) -> None:
        """Nothing: this attacker brings no rows."""

    def requests(
        self, trained: Trained, records: Records, target: Target | None, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """The requests; the target plays no part, and may be None.

        Raises:
            Misuse: if fewer rows than the budget can be asked for, or nothing would remain.
        """
        owned = self.owned
        mine = records.where(lambda name, owner: name in trained.ids and (owned is None or owner in owned))
        if len(mine) < self.budget or len(trained.ids) <= self.budget:
            raise Misuse(
                f"{self.budget} rows are to be asked for, of {len(mine)} that this attacker may speak for and "
                f"{len(trained.ids)} in all; lower the budget"
            )
        sharding = trained.recipe.sharding
        if not trained.parts or sharding is None:
            picked = _furthest(self, trained, records, mine, through)
        elif self.knows_salt:
            picked = _dearest(self, trained, records, mine, sharding)
        else:
            picked = _strewn(mine, self.budget, child(rng, "owners"))
        ids = [mine.ids[row] for row in picked]
        return (Request.remove(ids),) if self.together else tuple(Request.remove([name]) for name in ids)


def stage_costs(records: Records, trained: Trained) -> list[list[int]]:
    """Rows read when a shard is trained again from each of its slices on: ``costs[shard][slice]``.

    Raises:
        Misuse: for a model without shards.
    """
    sharding = trained.recipe.sharding
    if sharding is None:
        raise Misuse("a model without shards has no stages; this is for sharded ones")
    held = Counter((sharding.shard_of(o), sharding.slice_of(o)) for o in _owners(records, trained))
    epochs, costs = slice_epochs(trained.recipe.epochs, sharding.slices), []
    for shard in range(sharding.shards):
        sizes = [held[shard, slice_] for slice_ in range(sharding.slices)]
        read = [sum(sizes[: stage + 1]) * epochs for stage in range(sharding.slices)]
        costs.append([sum(read[start:]) for start in range(sharding.slices)])
    return costs


def _owners(records: Records, trained: Trained) -> list[str]:
    return [owner for name, owner in zip(records.ids, records.owners, strict=True) if name in trained.ids]


def _dearest(attack: SlowDown, trained: Trained, records: Records, mine: Records, sharding: Sharding) -> list[int]:
    """Rows by what they cost: in one request each shard counts once, from its earliest slice that is touched."""
    costs = stage_costs(records, trained)
    price = [costs[sharding.shard_of(owner)][sharding.slice_of(owner)] for owner in mine.owners]
    order = sorted(range(len(mine)), key=lambda row: -price[row])
    if not attack.together:
        return order[: attack.budget]
    first: dict[int, int] = {}
    for row in order:
        first.setdefault(sharding.shard_of(mine.owners[row]), row)
    chosen = list(first.values())
    taken = set(chosen)
    return (chosen + [row for row in order if row not in taken])[: attack.budget]


def _strewn(mine: Records, budget: int, rng: Generator) -> list[int]:
    """A row of each of as many random owners as there are, then further rows of theirs."""
    seen: Counter[str] = Counter()
    ranked = []
    for row in torch.randperm(len(mine), generator=rng).tolist():
        seen[mine.owners[row]] += 1
        ranked.append((seen[mine.owners[row]], row))
    return [row for _, row in sorted(ranked, key=lambda one: one[0])[:budget]]


def _furthest(attack: SlowDown, trained: Trained, records: Records, mine: Records, through: Method) -> list[int]:
    victim = Victim.of(trained, records, through)
    places = torch.tensor(victim.records.positions(mine.ids), dtype=torch.int64)
    x, y = victim.rows[0][places], victim.rows[1][places]
    few = lengths(victim, x, y).argsort(descending=True, stable=True)[: max(attack.candidates, attack.budget)]
    x, y, solves = x[few], y[few], Solves(victim=victim)
    if not attack.together:
        norms = torch.cat([moves.norm(dim=1) for moves in solves.of_gradients(x, y)])
        return [int(few[i]) for i in norms.argsort(descending=True, stable=True)[: attack.budget]]
    if len(x) * victim.objective.size > attack.kept:
        return [int(few[i]) for i in longest_sum_again(solves, x, y, attack.budget)]
    return [int(few[i]) for i in longest_sum(torch.cat(list(solves.of_gradients(x, y))), attack.budget)]


def lengths(victim: Victim, x: Tensor, y: Tensor) -> Float[Tensor, " n"]:
    """The norm of each row's gradient, in float64. Cost: a forward and a backward pass where layers allow it."""
    make, _ = maker(victim.objective, x, y)
    blocks = (make(*some) for some in zip(x.split(_ROWS), y.split(_ROWS), strict=True))
    return torch.cat([inner(one, one) for one in blocks]).clamp_min(0).sqrt()


def longest_sum(moves: Float[Tensor, "n p"], count: int) -> Sequence[int]:
    """`count` rows, one after the other, each the one with which the sum so far becomes longest."""
    squares, total = moves.square().sum(1), torch.zeros_like(moves[0])
    chosen: list[int] = []
    for _ in range(count):
        gain = squares + 2 * moves @ total
        if chosen:
            gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        total = total + moves[chosen[-1]]
    return chosen


def longest_sum_again(solves: Solves, x: Tensor, y: Tensor, count: int) -> Sequence[int]:
    """`longest_sum` of ``(H + d I)^-1 g_i`` without keeping them: ``<A g_i, s> = <g_i, A s>``, A being symmetric.

    Cost: two solves more for each row chosen, and a forward-mode pass over the candidates.
    """
    objective = solves.victim.objective
    squares = torch.cat([moves.square().sum(1) for moves in solves.of_gradients(x, y)])
    answer, chosen = torch.zeros_like(objective.vector()), list[int]()
    for _ in range(count):
        along = [
            objective.scores(some, labels, answer) for some, labels in zip(x.split(_ROWS), y.split(_ROWS), strict=True)
        ]
        gain = squares + 2 * torch.cat(along)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        last = slice(chosen[-1], chosen[-1] + 1)
        answer = answer + solves(solves(objective.gradients(x[last], y[last])))[0]
    return chosen
