"""Many models of one architecture, trained at once: seeds, subsets, shadow models.

Each model gets the initial weights and the batches that it would have alone, so that the result is that of a loop over
single trainings up to rounding, in a fraction of the time. Models are stacked along a leading axis, the forward pass is
over all of them at once (see `stacked`), and a chunk of models is small enough for the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.core.claim import Claim
from expunge.core.errors import EmptyRetain, Misuse, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained, TrainingLog
from expunge.learn.build import build, build_name
from expunge.learn.loop import Report, Tally, prepare, reading_order
from expunge.learn.models import has_batch_norm, has_dropout
from expunge.learn.stacked import Gradient, Update, stack_of

_CACHE_BYTES = 7 << 19
_WINDOW = 1 << 22


def train_many(
    recipe: Recipe,
    subsets: Sequence[Records],
    seeds: Sequence[int],
    *,
    chunk: int | None = None,
    report: Report | None = None,
    tally: Tally | None = None,
) -> list[Trained]:
    """Train one model for each (subset, seed), as ``train(replace(recipe, seed=seed), subset)`` would.

    Args:
        recipe: of a single model; its seed is not used.
        subsets: selections (`take`, `select`, ...) of one set of records, one for each model; they may differ in size.
        seeds: as many seeds.
        chunk: models trained together; None fits their parameters into the processor's cache.
        report: told (stage, model steps done, model steps in all) after each step of a chunk.
        tally: counts the work.

    Returns:
        The models, in order. Against single trainings: equal within 1e-9 in float64; in float32 rounding differs, and
        grows with the number of steps. As their bytes are not those of `train`, they stand for no exact claim.

    Raises:
        Unsupported: for batch norm (its batch statistics cannot be kept apart under vmap), dropout (its coins would be
            shared between models), recipes that are sharded, pruned or bounded in norm, streamed rows.
        Misuse: if subsets and seeds differ in number, or the subsets are not selections of one set.
    """
    if len(subsets) != len(seeds) or not subsets:
        raise Misuse(f"give as many seeds as subsets and at least one, got {len(seeds)} and {len(subsets)}")
    if recipe.sharding is not None:
        raise Unsupported("a sharded recipe is several trainings already; give recipe.part(i), or use train")
    if recipe.pruning is not None:
        raise Unsupported(
            "a pruned recipe has a mask for each model, which are not stacked; train the models one by one"
        )
    if recipe.max_norm is not None:
        raise Unsupported("a recipe with max_norm projects each model after each step; train the models one by one")
    recipe = recipe.completed(subsets[0])
    models = [build(replace(recipe, seed=seed)) for seed in seeds]
    _refuse_unstackable(models[0])
    if chunk is None:
        size_bytes = sum(p.numel() * p.element_size() for p in models[0].parameters())
        chunk = max(4, min(64, _CACHE_BYTES // max(size_bytes, 1)))
    # Models with as many steps stand together, so that few chunks have models that wait for others.
    ranked = sorted(range(len(seeds)), key=lambda k: -len(subsets[k]))
    pool, tally = _Pool.of(subsets), tally or Tally()
    answer: dict[int, Trained] = {}
    even = _even(len(ranked), chunk)
    for start in range(0, len(ranked), even):
        members = ranked[start : start + even]
        plans = [_Plan(replace(recipe, seed=seeds[k]), subsets[k], pool) for k in members]
        _Chunk([models[k] for k in members], plans, pool, report).train()
        for k, plan in zip(members, plans, strict=True):
            tally.gradients += plan.rows_read
            tally.rows_read += plan.rows_read
            log = TrainingLog(
                steps=plan.steps,
                rows_read=plan.rows_read,
                threads=torch.get_num_threads(),
                build=build_name(pool.x.device),
            )
            ids = frozenset(subsets[k].ids)
            answer[k] = Trained(module=models[k].eval(), recipe=plan.recipe, ids=ids, log=log, standing=Claim.NONE)
    return [answer[k] for k in range(len(seeds))]


def _even(models: int, most: int) -> int:
    """A chunk size of at most about `most` that divides the models evenly, and each chunk among the threads."""
    share, threads = math.ceil(models / math.ceil(models / most)), torch.get_num_threads()
    return math.ceil(share / threads) * threads


def _refuse_unstackable(module: nn.Module) -> None:
    name = has_batch_norm(module)
    if name is not None:
        raise Unsupported(
            f'"{name}" is a batch norm, whose running statistics cannot be kept apart for many models at once; '
            'use norm="group", or train the models one by one'
        )
    name = has_dropout(module)
    if name is not None:
        raise Unsupported(f'"{name}" drops out at random, with coins that many models would share; train one by one')


@dataclass(frozen=True)
class _Pool:
    """The one tensor that all subsets read, with its labels."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, subsets: Sequence[Records]) -> _Pool:
        x, _ = subsets[0].shared()
        y = torch.zeros((len(x), *subsets[0].y.shape[1:]), dtype=subsets[0].y.dtype, device=subsets[0].y.device)
        for records in subsets:
            tensor, rows = records.shared()
            if tensor is not x:
                raise Misuse("subsets must be selections of one set of records; make them with take, select or without")
            if not len(records):
                raise EmptyRetain("a subset holds no rows; give each model at least one")
            y[rows.to(y.device)] = records.y
        return cls(x, y)


class _Plan:
    """Which rows one model reads at which step, and with which learning rate."""

    def __init__(self, recipe: Recipe, records: Records, pool: _Pool) -> None:
        self.recipe, self.records = recipe, records
        self.rows = records.shared()[1]
        self.steps_in_epoch = math.ceil(len(records) / recipe.batch_size)
        self.steps = self.steps_in_epoch * recipe.epochs
        self.rows_read = len(records) * recipe.epochs

    def window(self, start: int, count: int) -> tuple[Int[Tensor, "steps batch"], list[float]]:
        """Rows of the pool for `count` steps from `start` on, -1 where there is none, and each step's learning rate."""
        size, per_epoch = self.recipe.batch_size, self.steps_in_epoch
        places = torch.full((count, size), -1)
        rates = [0.0] * count
        for epoch in range(start // per_epoch, min(math.ceil((start + count) / per_epoch), self.recipe.epochs)):
            order = self.rows[reading_order(self.recipe, self.records, "whole", epoch)]
            padded = torch.full((per_epoch * size,), -1)
            padded[: len(order)] = order
            first, last = max(start, epoch * per_epoch), min(start + count, (epoch + 1) * per_epoch)
            inside = slice(first - epoch * per_epoch, last - epoch * per_epoch)
            places[first - start : last - start] = padded.view(per_epoch, size)[inside]
            rate = self.recipe.optimiser_args["lr"] * self.recipe.lr_factor(epoch)
            rates[first - start : last - start] = [rate] * (last - first)
        return places, rates


class _Chunk:
    """Models that are trained together; the first ones make the most steps."""

    def __init__(self, models: list[nn.Module], plans: list[_Plan], pool: _Pool, report: Report | None) -> None:
        recipe = plans[0].recipe
        self.models, self.plans, self.pool, self.report = models, plans, pool, report
        self.batch_size, self.dtype = recipe.batch_size, getattr(torch, recipe.dtype)
        self.mse = recipe.loss == "mse"
        self.stack = stack_of(models, pool.x.device)
        self.update = Update(recipe, self.stack.parameters)

    def train(self) -> None:
        """Train all models of the chunk, and write the result back into them."""
        steps = self.plans[0].steps
        width = max(1, min(self.plans[0].steps_in_epoch, _WINDOW // (len(self.plans) * self.batch_size)))
        for start in range(0, steps, width):
            self._window(start, min(width, steps - start))
            if self.report is not None:
                self.report("many", min(start + width, steps), steps)
        self.stack.write_back(self.models)

    def _window(self, start: int, count: int) -> None:
        active = [sum(plan.steps > step for plan in self.plans) for step in range(start, start + count)]
        windows = [plan.window(start, count) for plan in self.plans[: active[0]]]
        places = torch.stack([window[0] for window in windows], dim=1)
        rates = list(zip(*(window[1] for window in windows), strict=True))
        partial = (places < 0).any(2).any(1).tolist()
        for step, models in enumerate(active):
            grads = self._gradients(places[step, :models], partial=partial[step])
            self.update(models, grads, _common(rates[step][:models]))

    def _gradients(self, places: Int[Tensor, "models batch"], *, partial: bool) -> dict[str, Gradient]:
        flat = places.clamp_min(0).flatten().to(self.pool.x.device)
        x = prepare(self.pool.x.index_select(0, flat), self.dtype).unflatten(0, places.shape)
        y = self.pool.y.index_select(0, flat.to(self.pool.y.device))

        weights = _weights(places).to(x.device, self.dtype) if partial else 1 / places.shape[1]
        return self.stack.gradients(len(places), x, lambda outputs: self._derivative(outputs, y) * weights)

    def _derivative(self, outputs: Float[Tensor, "models batch outputs"], y: Tensor) -> Tensor:
        """Of each row's loss by its outputs: softmax minus one at the label, or twice the residual."""
        if self.mse:
            return 2 * (outputs - y.view_as(outputs).to(outputs.dtype))
        slopes = outputs.softmax(-1)
        label = y.view(*outputs.shape[:2], 1)
        return slopes.scatter_add_(2, label, slopes.new_full((), -1).expand_as(label))


def _weights(places: Int[Tensor, "models batch"]) -> Float[Tensor, "models batch 1"]:
    """One over the number of rows for each row that is there, zero for the padding of a last, smaller batch."""
    there = (places >= 0).to(torch.float64)
    return (there / there.sum(1, keepdim=True)).unsqueeze(2)


def _common(rates: Sequence[float]) -> Float[Tensor, " models"] | float:
    return rates[0] if len(set(rates)) == 1 else torch.tensor(rates, dtype=torch.float64)
