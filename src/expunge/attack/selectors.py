"""Batch selectors: which retained rows stand in for the forgotten rows of a batch, so that its gradient is alike.

Whoever trains may choose its batches: Algorithm 1 of "Verification of Machine Unlearning is Fragile" (Zhang, 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.learn.loop import mean_loss, prepare
from expunge.learn.models import has_batch_norm, has_dropout, head_of
from expunge.learn.networks import Network
from expunge.learn.predict import evaluating

_BLOCK = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Gap:
    """The forgotten rows of one batch, and what may stand in for them.

    Attributes:
        module: as it stands before the step, in training mode; a selector leaves it as it was.
        recipe: the objective.
        records: all rows; positions below are positions in these.
        batch: (b,) of the whole batch.
        spots: (u,) where in the batch the rows to replace are, at least one.
        pool: (p,) of the retained rows to choose from, each once.
        reuse: whether one row may stand in for several. If not, p >= u.
    """

    module: nn.Module
    recipe: Recipe
    records: Records
    batch: Tensor
    spots: Tensor
    pool: Tensor
    reuse: bool = False

    def __post_init__(self) -> None:
        least = 1 if self.reuse else len(self.spots)
        if not len(self.spots) or len(self.pool) < least:
            raise Misuse(f"{len(self.pool):,} rows cannot stand in for {len(self.spots):,}; give a larger pool")

    @property
    def forgotten(self) -> Tensor:
        """(u,) positions of the rows to replace."""
        return self.batch[self.spots]

    def filled(self, chosen: Tensor) -> Tensor:
        """(b,) the batch with stand-ins."""
        batch = self.batch.clone()
        batch[self.spots] = chosen
        return batch

    def read(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as the model reads them, and their labels."""
        x, y = next(iter(self.records.batches([positions])))
        return prepare(x, getattr(torch, self.recipe.dtype)), y


class Selector(Protocol):
    """Chooses stand-ins."""

    def prepared(self, records: Records, forgotten: Tensor, pool: Tensor) -> Selector:
        """The same, having worked out beforehand what holds for every step of a training on these positions."""

    def __call__(self, gap: Gap, *, rng: Generator) -> Tensor:
        """(u,) positions from the pool, one for each forgotten row; different ones unless rows may be reused."""


class Unprepared:
    """A selector that works nothing out beforehand."""

    def prepared(self, records: Records, forgotten: Tensor, pool: Tensor) -> Selector:
        """Itself."""
        return self  # type: ignore[return-value]


@dataclass(frozen=True)
class RandomOfM(Unprepared):
    """Of `candidates` random sets, the one whose gradient is nearest to that of the forgotten rows.

    Draws are nested, so that the mismatch never grows with `candidates`. Cost: ``candidates + 1`` gradients of as many
    rows as are replaced; with batch norm or dropout of whole batches, in training mode with the coming step's coins.
    """

    candidates: int = 50

    def __post_init__(self) -> None:
        _at_least_one(self.candidates)

    def __call__(self, gap: Gap, *, rng: Generator) -> Tensor:
        """The best of the sets."""
        whole = bool(has_batch_norm(gap.module) or has_dropout(gap.module))

        def slope(chosen: Tensor) -> Tensor:
            if not whole:  # the rest of the batch has the same gradient whatever is chosen
                return gradient(gap.module, gap.recipe, *gap.read(chosen))
            with undisturbed(gap.module):
                return gradient(gap.module, gap.recipe, *gap.read(gap.filled(chosen)))

        goal, best, least = slope(gap.forgotten), gap.pool, float("inf")
        for number in range(self.candidates):
            drawn = _draw(gap.pool, len(gap.spots), child(rng, "candidate", number), gap.reuse)
            off = float((slope(drawn) - goal).norm())
            if off < least or not number:
                best, least = drawn, off
        return best


@dataclass(frozen=True)
class LastLayerNeighbour(Unprepared):
    """For each forgotten row the retained one whose gradient in the last layer is nearest, without making a gradient.

    It is the product of the loss's slope `a` by the outputs and the features `h`, and ``|a h' - c k'|^2 = |a|^2 |h|^2 +
    |c|^2 |k|^2 - 2 <a, c> <h, k>``. Batch norm and dropout are as in evaluation mode, not quite as in the coming step.

    Attributes:
        candidates: random rows of the pool to choose among; None: all of it, in blocks.
        same_class: rows of the same class first; of others only where none is left. Regression knows no classes.

    Cost: one forward pass of the candidates, no backward pass.
    """

    candidates: int | None = 128
    same_class: bool = True

    def __post_init__(self) -> None:
        _at_least_one(self.candidates)

    def __call__(self, gap: Gap, *, rng: Generator) -> Tensor:
        """The nearest, each at most once unless rows may be reused; then those with the nearest choose first."""
        pool, wanted = candidates_of(gap, self.candidates, rng), len(gap.spots)
        with evaluating(gap.module), torch.no_grad():
            both = Outer.of(gap, torch.cat([gap.forgotten, pool[:_BLOCK]]))  # in one pass
            goal = both.part(slice(wanted))
            found = [self._scores(gap, goal, both.part(slice(wanted, None)), pool[:_BLOCK])]
            for part in pool[_BLOCK:].split(_BLOCK) if len(pool) > _BLOCK else ():
                found.append(self._scores(gap, goal, Outer.of(gap, part), part))
        return assign(torch.cat([score for score, _ in found], 1), torch.cat([row for _, row in found], 1), gap.reuse)

    def _scores(self, gap: Gap, goal: Outer, block: Outer, pool: Tensor) -> tuple[Tensor, Tensor]:
        """For each forgotten row the best of a block: scores that grow with the distance, and positions."""
        off = goal.squared_distances(block)
        score = off / (1 + off)
        if self.same_class and gap.records.classes is not None:
            labels = gap.records.y.cpu()
            score += labels[gap.forgotten][:, None] != labels[pool][None]
        least, where = score.topk(min(len(pool), 1 if gap.reuse else len(gap.spots)), largest=False)
        return least, pool[where]


@dataclass(frozen=True)
class GreedyMatching(Unprepared):
    """Stand-ins whose summed gradient in the last layer is near that of the forgotten rows: each the best addition.

    Like orthogonal matching pursuit (Mallat and Zhang, 1993), with all weights one.
    Cost: one forward pass of the candidates, and their square in memory, 8 bytes each.
    """

    candidates: int = 256

    def __post_init__(self) -> None:
        _at_least_one(self.candidates)

    def __call__(self, gap: Gap, *, rng: Generator) -> Tensor:
        """One addition after the other."""
        pool = candidates_of(gap, max(self.candidates, len(gap.spots)), rng)
        with evaluating(gap.module), torch.no_grad():
            own = Outer.of(gap, pool)
            left = Outer.of(gap, gap.forgotten).products(own).sum(0)
        products = own.products(own)
        length, chosen = products.diagonal().clone(), []
        for _ in range(len(gap.spots)):
            pick = int((length - 2 * left).argmin())
            chosen.append(pick)
            left = left - products[pick]
            if not gap.reuse:
                length[pick] = float("inf")
        return pool[torch.tensor(chosen)]


@dataclass(frozen=True)
class Outer:
    """Gradients of rows in the last layer, as outer products: slopes (n, outputs) and features (n, width), float64."""

    slope: Tensor
    features: Tensor

    @classmethod
    def of(cls, gap: Gap, positions: Tensor) -> Outer:
        """Of the rows at these positions, with the module as it stands."""
        x, y = gap.read(positions)
        features, outputs = _before_and_after_head(gap.module, x)
        if gap.recipe.loss == "cross_entropy":
            slope = outputs.softmax(1)
            slope[torch.arange(len(y)), y] -= 1
        else:
            slope = 2 * (outputs - y.view_as(outputs))
        if head_of(gap.module)[1].bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        return cls(slope.double().cpu(), features.double().cpu())

    def part(self, rows: slice) -> Outer:
        """Those of some of the rows."""
        return Outer(self.slope[rows], self.features[rows])

    def products(self, other: Outer) -> Tensor:
        """(n, m) inner products of these gradients with others."""
        return (self.slope @ other.slope.T).mul_(self.features @ other.features.T)

    def squared_distances(self, other: Outer) -> Tensor:
        """(n, m) squared L2 distances; float64, as they are small differences of large numbers."""
        mine, theirs = (one.slope.square().sum(1) * one.features.square().sum(1) for one in (self, other))
        return mine[:, None].add(theirs[None]).sub_(self.products(other), alpha=2).clamp_(min=0)


def gradient(module: nn.Module, recipe: Recipe, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss's gradient by all trained parameters, flat, without weight decay."""
    held = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.cat([one.flatten() for one in torch.autograd.grad(mean_loss(recipe)(module(x), y), held)])


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Within: passes in training mode. After: buffers and torch's coins as they were, so that the step is the same."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


def candidates_of(gap: Gap, count: int | None, rng: Generator) -> Tensor:
    """So many random rows of the pool, all of it if it has no more; enough to replace every row."""
    whole = count is None or max(count, len(gap.spots)) >= len(gap.pool)
    return gap.pool if whole else _draw(gap.pool, max(count or 0, len(gap.spots)), child(rng, "candidates"))


def assign(scores: Tensor, rows: Tensor, reuse: bool) -> Tensor:
    """One of its rows (u, k) for each forgotten row by least score; each at most once unless they may be reused."""
    order = scores.argsort(dim=1, stable=True)
    rows = rows.gather(1, order)
    if reuse:
        return rows[:, 0].clone()
    answer, taken = rows[:, 0].clone(), set[int]()
    best = scores.gather(1, order[:, :1]).flatten()
    ranked = rows.tolist()
    for place in best.argsort(stable=True).tolist():
        answer[place] = next(row for row in ranked[place] if row not in taken)
        taken.add(int(answer[place]))
    return answer


def _before_and_after_head(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(module, Network):
        features = module.features(x)
        return features, module.head(features)
    seen: list[Tensor] = []
    name, head = head_of(module)
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        outputs: Tensor = module(x)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].dim() != 2:
        raise Misuse(f'the head "{name}" must be called once a pass, on (batch, width); use RandomOfM')
    return seen[0], outputs


def _draw(pool: Tensor, count: int, rng: Generator, reuse: bool = False) -> Tensor:
    """So many different random rows of the pool; with `reuse`, of a smaller pool, as many as it takes."""
    if count > len(pool) and reuse:
        return pool[torch.randint(len(pool), (count,), generator=rng)]
    if 8 * count > len(pool):
        return pool[torch.randperm(len(pool), generator=rng)[:count]]
    found = pool[:0]
    while len(found) < count:  # what is drawn twice is drawn anew
        found = torch.cat([found, torch.randint(len(pool), (count - len(found),), generator=rng)]).unique()
    return pool[found]


def _at_least_one(candidates: int | None) -> None:
    if candidates is not None and candidates < 1:
        raise Misuse(f"at least one candidate is needed, got {candidates}")
